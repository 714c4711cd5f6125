"""openapi.yaml against the table of request fields, the routes, and what the daemon says.

SPDX-License-Identifier: Apache-2.0
"""
import copy
import json
import re
import shutil

import pytest
import yaml

from conftest import ROOT, Daemon, until

SPEC = yaml.safe_load((ROOT / "openapi.yaml").read_text())
LIMITS = {"INT32_MAX": 2 ** 31 - 1, "INT64_MAX": 2 ** 63 - 1, "INT64_MIN": -2 ** 63, "UNSET": None}
ENDPOINTS = {"C": "ChatRequest", "T": "CompletionRequest"}


def resolve(schema):
    if "$ref" in schema:
        at = SPEC
        for key in schema["$ref"].removeprefix("#/").split("/"):
            at = at[key]
        return resolve(at)
    if "allOf" in schema:
        merged = {"type": "object", "required": [], "properties": {}}
        for part in map(resolve, schema["allOf"]):
            merged["required"] += part.get("required", [])
            merged["properties"] |= part["properties"]
        return merged
    return schema


KNOWN = {"type", "properties", "required", "items", "enum", "const", "anyOf", "minimum", "maximum", "minItems", "maxItems", "minLength",
         "maxProperties", "additionalProperties", "pattern", "description", "default"}
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def is_type(value, name):
    if name in ("integer", "number"):
        return not isinstance(value, bool) and isinstance(value, int if name == "integer" else (int, float))
    return isinstance(value, TYPES[name])


def check(value, schema, where="$", closed=False):
    """Raises when value is not what the schema says. closed: a member that the schema does not list is wrong too."""
    s = resolve(schema)
    assert set(s) <= KNOWN, f"{where}: this checker does not know {set(s) - KNOWN}"
    if "anyOf" in s:
        faults = []
        for option in s["anyOf"]:
            try:
                return check(value, option, where, closed)
            except AssertionError as e:
                faults.append(str(e).splitlines()[0])
        raise AssertionError(f"{where}: {faults}")
    types = s["type"] if isinstance(s["type"], list) else [s["type"]]
    assert any(is_type(value, t) for t in types), f"{where}: {value!r} is not {types}"
    if value is None:
        return None
    assert "enum" not in s or value in s["enum"], f"{where}: {value!r}"
    assert "const" not in s or value == s["const"], f"{where}: {value!r}"
    assert value >= s.get("minimum", value) and value <= s.get("maximum", value) if is_type(value, "number") else True, f"{where}: {value}"
    if isinstance(value, str):
        assert len(value) >= s.get("minLength", 0) and re.search(s.get("pattern", ""), value), f"{where}: {value!r}"
    if isinstance(value, list):
        assert s.get("minItems", 0) <= len(value) <= s.get("maxItems", len(value)), f"{where}: {len(value)} items"
        for i, item in enumerate(value):
            check(item, s.get("items", {"type": []}), f"{where}[{i}]", closed)
    if isinstance(value, dict):
        assert set(s.get("required", [])) <= set(value), f"{where}: lacks {set(s.get('required', [])) - set(value)}"
        for key, item in value.items():
            if key in s.get("properties", {}):
                check(item, s["properties"][key], f"{where}.{key}", closed)
            elif "additionalProperties" in s:
                check(item, s["additionalProperties"], f"{where}.{key}", closed)
            else:
                assert not closed, f"{where}: {key} is not described"
    return None


# the table of fields

def table():
    """Rows of server/fields.def: kind, endpoint, name, further arguments."""
    text = re.sub(r"/\*.*?\*/", "", (ROOT / "server/fields.def").read_text(), flags=re.S)
    rows = []
    for line in filter(str.strip, text.splitlines()):
        kind, inside = re.fullmatch(r"([A-Z]+)\((.*)\)", line.strip()).groups()
        endpoints, name, *rest = map(str.strip, inside.split(",", 2 if kind == "ONLY" else -1))
        rows += [(kind, e, name, rest) for e in endpoints.replace(" ", "").split("|")]
    assert len(rows) > 60
    return rows


def number(text):
    if text in LIMITS:
        return LIMITS[text]
    if text == "INT64_MIN + 1":
        return -2 ** 63 + 1
    return float(text) if "." in text else int(text)


def test_the_same_fields():
    for endpoint, schema in ENDPOINTS.items():
        have = set(resolve(SPEC["components"]["schemas"][schema])["properties"])
        assert have == {name for _, e, name, _ in table() if e == endpoint}, schema


@pytest.mark.parametrize("kind, endpoint, name, rest", table(), ids=lambda v: v if isinstance(v, str) else "")
def test_field(kind, endpoint, name, rest):
    s = resolve(SPEC["components"]["schemas"][ENDPOINTS[endpoint]])["properties"][name]
    if kind in ("REAL", "INT"):
        default, low, high = map(number, rest)
        if (name, endpoint) == ("max_tokens", "C"):
            low = 1  # checked with the endpoint
        if (name, endpoint) == ("max_tokens", "T"):
            default = 16
        assert s["type"] == ["number" if kind == "REAL" else "integer", "null"]
        assert (s.get("default"), s["minimum"], s["maximum"]) == (default, low, high)
    elif kind == "BOOL":
        assert s["type"] == ["boolean", "null"] and s["default"] == (rest[0] == "true")
    elif kind == "TEXT":
        assert s["type"] == ["string", "null"] and "const" not in s and "enum" not in s
    elif kind == "ONLY":
        value = json.loads(json.loads(rest[0]))
        if value is None:
            assert s["type"] == "null"
        else:
            assert s["const"] == value and s["type"][1] == "null" and is_type(value, s["type"][0])
    else:
        assert kind == "OWN" and (name == "stream_options" or "type" in s or "anyOf" in s)


def test_the_same_routes():
    text = (ROOT / "server/route.c").read_text()
    routes = set(re.findall(r'\{"([A-Z]+)", "(/[^"]*)", PL_SCOPE', text))
    assert routes and routes == {(m.upper(), p) for p, methods in SPEC["paths"].items() for m in methods}
    unguarded = set(re.findall(r'"(/[^"]*)", PL_SCOPE_OPEN', text))
    assert unguarded == {p for p, methods in SPEC["paths"].items() for o in methods.values() if o.get("security") == [{}]}


def test_version():
    assert SPEC["info"]["version"] == re.search(r'PL_VERSION "(.*)"', (ROOT / "core/base/version.h").read_text()).group(1)


def every_schema(node):
    if isinstance(node, dict):
        if "$ref" in node:
            resolve(node)
        for value in node.values():
            every_schema(value)
    elif isinstance(node, list):
        for value in node:
            every_schema(value)


def test_references_lead_somewhere():
    every_schema(SPEC)


def contents():
    for path, methods in SPEC["paths"].items():
        for method, operation in methods.items():
            yield f"{method} {path} request", operation.get("requestBody", {}).get("content", {})
            for code, response in operation["responses"].items():
                if "$ref" in response:
                    response = resolve(response)
                yield f"{method} {path} {code}", response["content"]


def test_examples_fit_their_schemas():
    n = 0
    for where, content in contents():
        for kind, c in content.items():
            examples = [e["value"] for e in c.get("examples", {}).values()] + ([c["example"]] if "example" in c else [])
            for e in examples:
                check(e, c["schema"], where, closed=True)
                n += 1
    assert n > 20


# the daemon

@pytest.fixture(scope="module")
def api(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("openapi")
    for name in ("support-tone", "support-tone-2"):
        shutil.copytree(ROOT / "tests/oracle/fixtures/adapter/llama-all", folder / name)
    (folder / "data").mkdir()
    worker = ROOT / "tests/tools/fake_worker.py"
    d = Daemon(folder, "--data-dir", folder / "data", "--train-worker", worker, "--alias", "SmolLM2-135M-Instruct.Q4_1", "--adapter-dir", folder, "--adapter", f"support-tone={folder / 'support-tone'}",
               model=models("adapter-base", "--embd", 32, "--ff", 64)).wait_ready()
    d.stands_for = things(d, folder / "data/script")
    yield d
    until(d.idle)
    assert d.stop() == 0, d.log
    assert "Sanitizer" not in d.log, d.log


def form(fields):
    parts = [f'--b\r\nContent-Disposition: form-data; name="{k}"' + ('; filename="x"' if k == "file" else "") + f"\r\n\r\n{v}\r\n" for k, v in fields.items()]
    return ("".join(parts) + "--b--\r\n").encode(), {"Content-Type": "multipart/form-data; boundary=b"}


def things(d, script):
    """What the ids of the examples stand for: files, a job whose worker waits, and a model that another job has made."""
    chat = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"

    def file():
        return json.loads(d.request("POST", "/v1/files", *form({"purpose": "fine-tune", "file": chat * 10}))[2])["id"]

    def job(state):
        made = json.loads(d.post("/v1/fine_tuning/jobs", {"model": "SmolLM2-135M-Instruct.Q4_1", "training_file": file()})[2])["id"]
        return until(lambda: (j := json.loads(d.get(f"/v1/fine_tuning/jobs/{made}")[2]))["status"] == state and j)

    def upload(n):
        return json.loads(d.post("/v1/uploads", {"filename": "x", "purpose": "batch", "bytes": n, "mime_type": "text/plain"})[2])["id"]
    model, other = job("succeeded")["fine_tuned_model"], job("succeeded")["fine_tuned_model"] + ":ckpt-step-4"
    permission = json.loads(d.post(f"/v1/fine_tuning/checkpoints/{other}/permissions", {"project_ids": ["proj_c"]})[2])["data"][0]["id"]
    whole = upload(3)
    part = json.loads(d.request("POST", f"/v1/uploads/{whole}/parts", *form({"data": "abc"}))[2])["id"]
    script.write_text('{"hang_at": 2}')
    return {"file-0123456789abcdef01234567": file(), "file-fedcba9876543210fedcba98": file(), "ftjob-0123456789abcdef01234567": job("running")["id"],
            "ft:SmolLM2-135M-Instruct.Q4_1:parley:support:01234567": model, "ft:SmolLM2-135M-Instruct.Q4_1:parley:support:fedcba98:ckpt-step-4": other,
            "cp_0123456789abcdef01234567": permission, "upload_0123456789abcdef01234567": upload(1000), "upload_fedcba9876543210fedcba98": whole,
            "part_fedcba9876543210fedcba98": part}


def real(api, text):
    for example, thing in api.stands_for.items():
        text = text.replace(example, thing)
    return text


def operations():
    for path, methods in SPEC["paths"].items():
        for method, o in methods.items():
            content = o.get("requestBody", {}).get("content", {})
            examples = next(iter(content.values()), {}).get("examples", {"": {"value": None}})
            for name, e in examples.items():
                yield pytest.param(method, path, o, e["value"], id=f"{method} {path} {name}")


@pytest.mark.parametrize("method, path, operation, body", list(operations()))
def test_examples_are_answered_as_described(api, method, path, operation, body):
    for p in operation.get("parameters", []):
        path = path.replace("{%s}" % p["name"], p.get("example", ""))
    more = {}
    if "multipart/form-data" in operation.get("requestBody", {}).get("content", {}):
        body, more = form(body)
    elif body is not None:
        body = json.loads(real(api, json.dumps(body)))
    status, headers, answer = api.request(method.upper(), real(api, path), body, more)
    assert status == 200, answer
    content = operation["responses"]["200"]["content"]
    kind = headers["content-type"].split(";")[0]
    if kind == "text/event-stream":
        *events, done, end = answer.decode().split("\n\n")
        assert done == "data: [DONE]" and end == ""
        for e in events:
            check(json.loads(e.removeprefix("data: ")), content[kind]["schema"], closed=True)
    elif kind == "application/json":
        check(json.loads(answer), content[kind]["schema"], closed=True)
    else:
        assert kind in content


@pytest.mark.parametrize("method, path, operation, body", [p for p in operations() if "application/json" in p.values[2].get("requestBody", {}).get("content", {})])
def test_wrong_values_are_refused(api, method, path, operation, body):
    """Each field of each example, turned into something that the description does not allow, is a 400 that names it."""
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    body = json.loads(real(api, json.dumps(body)))
    for name in body:
        for value in (True, 3.5, "x\x01", [[[]]], {"a": {}}, -10 ** 12):
            bad = {**copy.deepcopy(body), name: value}
            try:
                check(bad, schema)
                continue
            except AssertionError:
                pass
            status, _, answer = api.request(method.upper(), path, bad)
            error = json.loads(answer)
            check(error, SPEC["components"]["schemas"]["Error"], closed=True)
            assert status == 400 and re.split(r"[.\[]", error["error"]["param"])[0] == name, (name, value, error)
