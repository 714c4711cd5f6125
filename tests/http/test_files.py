"""The Files API with the unmodified OpenAI client: uploads of every kind, lists, content, deletion, expiry, quota, full disks, bad files.
SPDX-License-Identifier: Apache-2.0
"""
import contextlib
import hashlib
import http.client
import json
import os
import re
import resource
import sqlite3
import subprocess
import time

import openai
import pytest

from conftest import CHAT, GOOD, client_of, data_dir, until, upload

def test_an_upload_and_back(client, daemon):
    f = upload(client)
    raw = json.loads(daemon.get(f"/v1/files/{f.id}")[2])
    assert re.fullmatch(r"file-[0-9a-f]{24}", f.id) and f.object == "file" and f.filename == "data.jsonl" and f.purpose == "fine-tune"
    assert f.bytes == len(GOOD) and f.status == "processed" and abs(f.created_at - time.time()) < 60 and f.expires_at is None
    assert raw["sha256"] == hashlib.sha256(GOOD.encode()).hexdigest()
    assert client.files.retrieve(f.id) == f and client.files.wait_for_processing(f.id) == f
    assert client.files.content(f.id).read() == GOOD.encode()
    deleted = client.files.delete(f.id)
    assert deleted.id == f.id and deleted.deleted and deleted.object == "file"
    for call in client.files.retrieve, client.files.content, client.files.delete:
        with pytest.raises(openai.NotFoundError) as e:
            call(f.id)
        assert "No such File object" in e.value.message and e.value.body["param"] == "id"


def test_lists(client):
    ids = [upload(client, name=f"{i}.jsonl").id for i in range(5)]
    other = upload(client, b"\0binary", purpose="user_data", name="x.bin").id
    assert [f.id for f in client.files.list()] == [other, *reversed(ids)]
    assert [f.id for f in client.files.list(purpose="fine-tune", order="asc")] == ids
    page = client.files.list(limit=2, order="asc")
    assert [f.id for f in page.data] == ids[:2] and page.has_more
    assert [f.id for f in client.files.list(limit=2, order="asc")] == [*ids, other]  # the client pages on by itself
    assert [f.id for f in client.files.list(after=ids[1], order="asc", limit=2).data] == ids[2:4]
    for bad in ({"limit": 0}, {"limit": 10001}, {"order": "up"}, {"after": "file-none"}):
        with pytest.raises(openai.BadRequestError) as e:
            client.files.list(**bad)
        assert e.value.body["param"] == next(iter(bad))


def test_empty_lists(client):
    page = client.files.list()
    assert page.data == [] and not page.has_more


def test_content_is_byte_for_byte(client):
    data = bytes(range(256)) * 9000 + b"\r\n--"
    f = upload(client, data, purpose="assistants", name='odd "name" ü.bin')
    assert client.files.content(f.id).read() == data and f.filename == 'odd "name" ü.bin' and f.bytes == len(data)


def form(parts, boundary="xYz", end="--"):
    out = b""
    for name, filename, data in parts:
        more = f'; filename="{filename}"' if filename is not None else ""
        out += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + data + b"\r\n"
    return out + f"--{boundary}{end}\r\n".encode(), {"Content-Type": f"multipart/form-data; boundary={boundary}"}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_either_order_of_parts(daemon, order):
    parts = [("purpose", None, b"fine-tune"), ("file", "a.jsonl", GOOD.encode())]
    body, headers = form([parts[i] for i in order])
    status, _, answer = daemon.request("POST", "/v1/files", body, headers)
    assert status == 200, answer
    daemon.request("DELETE", f"/v1/files/{json.loads(answer)['id']}")


def test_chunked_byte_by_byte(daemon):
    body, headers = form([("purpose", None, b"batch"), ("file", "a", b"\r\n--xY\r\n--x\r\n" * 20)])
    c = daemon.connect()
    c.request("POST", "/v1/files", (body[i:i + 1] for i in range(len(body))), headers, encode_chunked=True)
    r = c.getresponse()
    answer = json.loads(r.read())
    assert r.status == 200 and answer["bytes"] == 20 * 13
    assert daemon.get(f"/v1/files/{answer['id']}/content")[2] == b"\r\n--xY\r\n--x\r\n" * 20
    c.close()
    daemon.request("DELETE", f"/v1/files/{answer['id']}")


def test_expiry(client, daemon):
    f = upload(client, expires_after={"anchor": "created_at", "seconds": 3600})
    assert f.expires_at == f.created_at + 3600
    for seconds in 3599, 2592001:
        with pytest.raises(openai.BadRequestError) as e:
            upload(client, expires_after={"anchor": "created_at", "seconds": seconds})
        assert e.value.body["param"] == "expires_after[seconds]"
    with pytest.raises(openai.BadRequestError) as e:
        upload(client, expires_after={"anchor": "last_active_at", "seconds": 3600})
    assert e.value.body["param"] == "expires_after[anchor]"


def test_expired_files_go(start, tmp_path, tiny):
    d = start("--data-dir", tmp_path / "data", model=tiny)
    f = upload(client_of(d), expires_after={"anchor": "created_at", "seconds": 3600})
    keep = upload(client_of(d))
    assert d.stop() == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "data/parley.db")) as db, db:
        db.execute("UPDATE files SET expires_at=1 WHERE id=?", (f.id,))
    d = start("--data-dir", tmp_path / "data", model=tiny)
    until(lambda: [x.id for x in client_of(d).files.list()] == [keep.id])
    until(lambda: not (tmp_path / "data/files" / f.id).exists())  # the row goes first
    assert (tmp_path / "data/files" / keep.id).exists()


BAD_FORMS = [
    ([("file", "a", b"x")], "purpose", "'purpose' is required"),
    ([("purpose", None, b"fine-tune")], "file", "'file' is required"),
    ([("purpose", None, b"training"), ("file", "a", b"x")], "purpose", "must be one of fine-tune"),
    ([("purpose", None, b"batch"), ("purpose", None, b"batch"), ("file", "a", b"x")], "purpose", "comes twice"),
    ([("purpose", None, b"batch"), ("file", None, b"x")], "file", "a file with a name"),
    ([("purpose", None, b"batch"), ("file", "", b"x")], "file", "a file with a name"),
    ([("purpose", None, b"batch"), ("files", "a", b"x")], "files", "is not a field of this form"),
    ([("purpose", None, b"x" * 300), ("file", "a", b"x")], "purpose", "at most 256 bytes"),
    ([("purpose", None, b"ba\0tch"), ("file", "a", b"x")], "purpose", "has a NUL byte"),
    ([("purpose", None, b"batch"), ("file", "a\x01", b"x")], "file", "control characters"),
    ([("purpose", None, b"batch"), ("file", "a" * 256, b"x")], "file", "at most 255 bytes"),
]


@pytest.mark.parametrize("parts, param, message", BAD_FORMS)
def test_bad_forms(daemon, parts, param, message):
    body, headers = form(parts)
    status, _, answer = daemon.request("POST", "/v1/files", body, headers)
    error = json.loads(answer)["error"]
    assert status == 400 and error["param"] == param and message in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("end", ["", "-", "x"])
def test_a_broken_form(daemon, end):
    body, headers = form([("purpose", None, b"batch"), ("file", "a", b"x")], end=end)
    status, _, answer = daemon.request("POST", "/v1/files", body, headers)
    assert status == 400, answer


def test_not_a_form(daemon):
    assert daemon.post("/v1/files", {"file": "x"})[0] == 415
    assert daemon.request("POST", "/v1/files", b"x", {"Content-Type": "multipart/form-data"})[0] == 415
    assert daemon.request("POST", "/v1/files", b"x", {"Content-Type": "multipart/form-data; boundary="})[0] == 400


BAD_FILES = [
    ("hello\n", "Expected file to have JSONL format, where every line is a JSON dictionary. Line 1 is not a dictionary (HINT: line starts with: \"hello", 1, None),
    (CHAT + "\n[1]\n", "Line 2 is not a dictionary", 2, None),
    (CHAT + "\n{\"messages\":[\n" + CHAT, "not valid JSON", 2, None),
    (CHAT + '\n{"messages":[{"role":"user","content":"a"},{"content":"b"}]}\n', "Invalid file format. Example 2, message 2 Discriminator 'role' is missing in value", 2, 2),
    ('{"question":"a","answer":"b"}\n', "expected either prompt/completion pairs or chat messages", 1, None),
    ("", "The file has no examples", None, None),
    (CHAT + '\n{"messages":[{"role":"user","content":"a"},{"role":"robot","content":"b"}]}\n', "Example 2, message 2", 2, 2),
    (CHAT + '\n{"messages":[{"role":"assistant","content":"a"},{"role":"user","content":"b"}]}\n', "Example 2", 2, 2),
    (CHAT + '\n{"messages":[]}\n', "Example 2", 2, None),
    (CHAT + '\n{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":2}]}\n', "weight", 2, 2),
    (CHAT + '\n{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":0}]}\n', "Example 2", 2, None),
    (CHAT + '\n{"prompt":"a","completion":"b"}\n', "it is in the fine-tune-completion format", 2, None),
    (CHAT + "\n{\"messages\":\"\xff\"}\n".replace("\xff", "\udcff"), "the line is not UTF-8", 2, None),
    (CHAT + "\n{\"a\":\0}\n", "NUL byte", 2, None),
]


@pytest.mark.parametrize("text, message, line, at", BAD_FILES)
def test_bad_files(client, daemon, text, message, line, at):
    with pytest.raises(openai.BadRequestError) as e:
        upload(client, text)
    assert message in e.value.message and e.value.body["param"] == "file" and e.value.body["code"] == "invalid_file"
    if line:
        assert e.value.body["lines"][0]["line"] == line and e.value.body["lines"][0]["message"] == at and e.value.body["n_bad_lines"] == 1
    until(lambda: not os.listdir(data_dir(daemon) / "files") and not os.listdir(data_dir(daemon) / "uploads"))


def test_all_bad_lines_are_named(client):
    text = "".join(CHAT + "\n" if i % 2 else '{"messages":[{"role":"user","content":"a"}]}\n' for i in range(200))
    with pytest.raises(openai.BadRequestError) as e:
        upload(client, text)
    assert [x["line"] for x in e.value.body["lines"]] == list(range(1, 201, 2)) and e.value.body["n_bad_lines"] == 100
    assert "more bad line(s)" in e.value.message


def test_too_large(client, daemon):
    with pytest.raises(openai.APIStatusError) as e:
        upload(client, b"x" * ((4 << 20) + 1), purpose="batch")
    assert e.value.status_code == 413 and e.value.body["code"] == "request_too_large" and e.value.body["param"] == "file"
    assert "larger than the 4 MiB that this server accepts (max-file-mb)" in e.value.message
    f = upload(client, b"x" * (4 << 20), purpose="batch")
    assert f.bytes == 4 << 20
    c = daemon.connect()
    c.putrequest("POST", "/v1/files")
    c.putheader("Content-Type", "multipart/form-data; boundary=x")
    c.putheader("Content-Length", str(6 << 20))
    c.endheaders()
    r = c.getresponse()
    assert r.status == 413 and "max-file-mb" in json.loads(r.read())["error"]["message"]  # told at once, before the body
    c.close()


def test_quota(client):
    for _ in range(4):
        upload(client, b"x" * (4 << 20), purpose="batch")
    with pytest.raises(openai.BadRequestError) as e:
        upload(client, b"x", purpose="batch")
    assert e.value.body["code"] == "file_quota_exceeded" and e.value.body["param"] == "file" and "files-quota-mb" in e.value.message
    client.files.delete(client.files.list().data[0].id)
    upload(client, b"x", purpose="batch")


def test_a_client_that_leaves(client, daemon):
    body, headers = form([("purpose", None, b"batch"), ("file", "a", b"x" * (1 << 20))])
    s = daemon.socket()
    head = "".join(f"{k}: {v}\r\n" for k, v in {**headers, "Content-Length": len(body), "Host": "localhost"}.items())
    s.sendall(f"POST /v1/files HTTP/1.1\r\n{head}\r\n".encode() + body[:500000])
    until(lambda: os.listdir(data_dir(daemon) / "uploads"))
    s.close()
    until(lambda: not os.listdir(data_dir(daemon) / "uploads"))
    assert client.files.list().data == []


def limit_file_size(n):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))


def test_a_full_disk(tmp_path, tiny, start):
    """A limit on the size of files stands for a full disk: both fail the write."""
    d = start("--data-dir", tmp_path / "data", model=tiny)
    resource.prlimit(d.process.pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    c = client_of(d)
    with pytest.raises(openai.InternalServerError) as e:
        upload(c, b"x" * (2 << 20), purpose="batch")
    assert e.value.status_code == 507 and e.value.body["code"] == "disk_full" and e.value.response.headers["x-should-retry"] == "false"
    assert c.files.list().data == [] and until(lambda: not os.listdir(tmp_path / "data/uploads") + os.listdir(tmp_path / "data/files"))
    assert upload(c).bytes == len(GOOD)
    assert d.get("/health")[0] == 200


def test_a_really_full_disk(tmp_path, tiny, start):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        d = start("--data-dir", disk / "data", model=tiny)
        c = client_of(d)
        with pytest.raises(openai.InternalServerError) as e:
            upload(c, b"x" * (3 << 20), purpose="batch")
        assert e.value.body["code"] == "disk_full"
        assert upload(c).bytes == len(GOOD)
        assert d.stop() == 0
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_files_survive_a_kill(tmp_path, tiny, start):
    d = start("--data-dir", tmp_path / "data", model=tiny)
    f = upload(client_of(d))
    (tmp_path / "data/uploads" / ("upload-" + "0" * 24)).write_text("half")
    (tmp_path / "data/files" / ("file-" + "a" * 24)).write_text("no row")
    d.process.kill()
    d.process.wait()
    d2 = start("--data-dir", tmp_path / "data", model=tiny)
    assert client_of(d2).files.content(f.id).read() == GOOD.encode()
    until(lambda: os.listdir(tmp_path / "data/files") == [f.id] and not os.listdir(tmp_path / "data/uploads"))
    d.process.returncode = 0  # it was killed on purpose


def test_the_database_is_private(tmp_path, tiny, start):
    data = tmp_path / "data"
    data.mkdir(mode=0o755)
    for left in None, "parley.db", "parley.db-wal":
        if left:  # of a daemon that did not look after it
            (data / left).touch()
            (data / left).chmod(0o644)
        d = start("--data-dir", data, model=tiny)
        upload(client_of(d))
        assert {p.name: p.stat().st_mode & 0o777 for p in data.glob("parley.db*")} == dict.fromkeys(["parley.db", "parley.db-wal", "parley.db-shm"], 0o600)
        d.stop()


def test_what_is_not_ours_stays(tmp_path, tiny, start):
    """A data directory that had folders of these names before, and names that only look like ours."""
    theirs = [tmp_path / "data" / name for name in ("files/notes.txt", "files/file-of-mine", "uploads/photo.jpg", "jobs/ftjob-mine/model.gguf",
                                                    "jobs/work/a.txt", "files/file-" + "A" * 24)]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    for _ in range(2):
        d = start("--data-dir", tmp_path / "data", model=tiny)
        assert d.get("/v1/files")[0] == 200
        d.stop()
    assert all(path.read_text() == "mine" for path in theirs)


@pytest.mark.parametrize("left", ["files/file-" + "0" * 24, "jobs/ftjob-" + "0" * 24 + "/model.gguf"])
def test_a_lost_database(tmp_path, tiny, start, left):
    """Files and models without their database are not swept, not at the second start either."""
    path = tmp_path / "data" / left
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    for _ in range(2):
        d = start("--data-dir", tmp_path / "data", model=tiny)
        status, _, body = d.get("/v1/files")
        assert status == 503 and "put the database back" in json.loads(body)["error"]["message"]
        d.stop()
    assert path.read_text() == "precious"


def test_scope_is_the_administrators(start, tiny):
    d = start("--api-key", "user-key-1", "--admin-key", "admin-key-1", model=tiny)
    for method, path in ("GET", "/v1/files"), ("GET", "/v1/files/x"), ("DELETE", "/v1/files/x"), ("GET", "/v1/files/x/content"), ("POST", "/v1/files"):
        assert d.request(method, path)[0] == 401
        assert d.request(method, path, headers={"Authorization": "Bearer user-key-1"})[0] == 403
    assert upload(client_of(d, "admin-key-1")).bytes == len(GOOD)


def test_two_daemons_do_not_share_a_folder(start, tmp_path, tiny):
    start("--data-dir", tmp_path / "data", model=tiny)
    other = start("--data-dir", tmp_path / "data", model=tiny)
    status, headers, body = other.get("/v1/files")
    assert status == 503 and "another parleyd uses the data directory" in json.loads(body)["error"]["message"] and headers["x-should-retry"] == "false"
    assert other.get("/v1/models")[0] == 200


def test_no_place_for_files(start, tiny):
    d = start("--data-dir", "/proc/nowhere", model=tiny)
    body, headers = form([("purpose", None, b"batch"), ("file", "a", b"x")])
    status, _, answer = d.request("POST", "/v1/files", body, headers)
    assert status == 503 and json.loads(answer)["error"]["code"] == "no_data_dir" and "--data-dir" in json.loads(answer)["error"]["message"]
    assert d.get("/v1/fine_tuning/jobs")[0] == 503
