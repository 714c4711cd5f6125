"""Uploads in parts, and permissions of checkpoints, with the unmodified OpenAI client: in order, out of order, what is refused, what expires and
what survives which kill.
SPDX-License-Identifier: Apache-2.0
"""
import contextlib
import hashlib
import io
import json
import os
import re
import sqlite3
import time

import openai
import pytest

from conftest import CHAT, GOOD, ROOT, Daemon, client_of, data_dir, until, upload

LIFE = 3600


def create(c, n, purpose="user_data", **more):
    return c.uploads.create(bytes=n, filename="big.bin", mime_type="application/octet-stream", purpose=purpose, **more)


def part(c, upload, data):
    return c.uploads.parts.create(upload, data=io.BytesIO(data))


def test_parts_in_the_order_of_completion(client, daemon):
    data = os.urandom(3 << 20)
    u = create(client, len(data))
    assert re.fullmatch(r"upload_[0-9a-f]{24}", u.id) and u.object == "upload" and u.status == "pending" and u.bytes == len(data)
    assert u.filename == "big.bin" and u.purpose == "user_data" and u.expires_at == u.created_at + LIFE and u.file is None
    pieces = [data[:1000], data[1000:2 << 20], data[2 << 20:]]
    ids = {}
    for i in 2, 0, 1:
        p = part(client, u.id, pieces[i])
        assert re.fullmatch(r"part_[0-9a-f]{24}", p.id) and p.object == "upload.part" and p.upload_id == u.id and abs(p.created_at - time.time()) < 60
        ids[i] = p.id
    done = client.uploads.complete(u.id, part_ids=[ids[i] for i in range(3)], md5=hashlib.md5(data).hexdigest())
    assert done.status == "completed" and done.file.bytes == len(data) and done.file.filename == "big.bin" and done.file.purpose == "user_data"
    assert client.files.content(done.file.id).read() == data
    assert json.loads(daemon.get(f"/v1/files/{done.file.id}")[2])["sha256"] == hashlib.sha256(data).hexdigest()
    for call in (lambda: client.uploads.complete(u.id, part_ids=list(ids.values())), lambda: client.uploads.cancel(u.id), lambda: part(client, u.id, b"x")):
        with pytest.raises(openai.BadRequestError, match="is completed"):
            call()


def test_the_client_in_chunks(client, tmp_path):
    """The client's own helper cuts the file, uploads the parts and completes."""
    path = tmp_path / "train.jsonl"
    path.write_text(GOOD)
    u = client.uploads.upload_file_chunked(file=path, mime_type="application/jsonl", purpose="fine-tune", part_size=100)
    assert u.status == "completed" and client.files.content(u.file.id).read() == GOOD.encode()


def test_expiry_of_the_file(client):
    u = create(client, 1, expires_after={"anchor": "created_at", "seconds": 3600})
    f = client.uploads.complete(u.id, part_ids=[part(client, u.id, b"x").id]).file
    assert f.expires_at == f.created_at + 3600


def test_bad_lines_leave_the_upload_pending(client):
    text = (CHAT + "\n[1]\n").encode()
    u = create(client, len(text), purpose="fine-tune")
    ids = [part(client, u.id, text).id]
    with pytest.raises(openai.BadRequestError) as e:
        client.uploads.complete(u.id, part_ids=ids)
    assert e.value.body["code"] == "invalid_file" and e.value.body["param"] == "part_ids" and e.value.body["lines"][0]["line"] == 2
    cancelled = client.uploads.cancel(u.id)
    assert cancelled.status == "cancelled" and cancelled.file is None and client.files.list().data == []


BAD_UPLOADS = [
    ({"bytes": None}, "bytes", "is required"),
    ({"bytes": 0}, "bytes", "from 1 to"),
    ({"bytes": "9"}, "bytes", "must be an integer"),
    ({"bytes": (4 << 20) + 1}, "bytes", "max-file-mb"),
    ({"filename": None}, "filename", "is required"),
    ({"filename": ""}, "filename", "1 to 255"),
    ({"filename": "a/b"}, "filename", "without folders"),
    ({"filename": "a\nb"}, "filename", "control characters"),
    ({"purpose": "training"}, "purpose", "must be one of"),
    ({"mime_type": None}, "mime_type", "is required"),
    ({"mime_type": 3}, "mime_type", "must be a string"),
    ({"parts": 3}, "parts", "Unrecognized"),
    ({"expires_after": {"anchor": "created_at", "seconds": 5}}, "expires_after.seconds", "from 3600"),
    ({"expires_after": {"seconds": 3600}}, "expires_after.anchor", "must be"),
    ({"expires_after": {"anchor": "created_at"}}, "expires_after.seconds", "from 3600"),
    ({"expires_after": {"anchor": "created_at", "seconds": "3600"}}, "expires_after.seconds", "from 3600"),
    ({"expires_after": {"anchor": "created_at", "seconds": 3600, "hours": 1}}, "expires_after.hours", "is not a member"),
    ({"expires_after": 3600}, "expires_after", "must be an object"),
]


@pytest.mark.parametrize("change, param, message", BAD_UPLOADS)
def test_bad_uploads(daemon, change, param, message):
    body = {"bytes": 10, "filename": "a", "mime_type": "text/plain", "purpose": "batch", **change}
    status, _, answer = daemon.post("/v1/uploads", {k: v for k, v in body.items() if v is not None})
    error = json.loads(answer)["error"]
    assert status == 400 and error["param"] == param and message in error["message"] and error["type"] == "invalid_request_error", error


def test_bad_completions(client):
    u, other = create(client, 10), create(client, 10)
    a, b, theirs = part(client, u.id, b"12345"), part(client, u.id, b"67890"), part(client, other.id, b"x")
    for ids, md5, param, message in [
        ([], None, "part_ids", "1 to"), ([a.id], None, "part_ids", "5 bytes together, but the upload was announced with 10"),
        ([a.id, a.id], None, "part_ids", "twice"), ([a.id, theirs.id], None, "part_ids", "'part_ids[1]' is not a part of this upload"),
        ([a.id, b.id], "0" * 32, "md5", "the file's MD5 is"), ([a.id, b.id], "00", "md5", "32 hexadecimal"), ([a.id, 5], None, "part_ids", "'part_ids[1]' must be a string"),
    ]:
        with pytest.raises(openai.BadRequestError) as e:
            client.uploads.complete(u.id, part_ids=ids, **({"md5": md5} if md5 else {}))
        assert e.value.body["param"] == param and message in e.value.message
    with pytest.raises(openai.BadRequestError) as e:
        part(client, u.id, b"x")
    assert e.value.body["param"] == "data" and "has 11 bytes" in e.value.message
    with pytest.raises(openai.BadRequestError, match="is empty"):
        part(client, other.id, b"")
    assert client.uploads.complete(u.id, part_ids=[b.id, a.id]).file.bytes == 10
    client.uploads.cancel(other.id)
    for call in (lambda: client.uploads.cancel("upload_no"), lambda: client.uploads.complete("upload_no", part_ids=["x"]), lambda: part(client, "upload_no", b"x")):
        with pytest.raises(openai.NotFoundError) as e:
            call()
        assert e.value.body["param"] == "upload_id"


def test_parts_count_in_the_quota(client):
    uploads = [create(client, 4 << 20) for _ in range(4)]
    for u in uploads:
        part(client, u.id, b"x" * (4 << 20))
    for call, param in (lambda: client.files.create(file=("x", io.BytesIO(b"x")), purpose="batch"), "file"), (lambda: part(client, create(client, 1).id, b"x"), "data"):
        with pytest.raises(openai.BadRequestError) as e:
            call()
        assert e.value.body["code"] == "file_quota_exceeded" and e.value.body["param"] == param and f"'{param}' does not fit" in e.value.message
    for u in uploads:
        client.uploads.cancel(u.id)
    client.files.create(file=("x", io.BytesIO(b"x")), purpose="batch")


def test_the_file_beside_its_parts_counts_in_the_quota(client):
    """While the parts are put together both are on the disk."""
    full = [upload(client, b"x" * (4 << 20), purpose="batch").id for _ in range(3)]
    u = create(client, 3 << 20)
    p = part(client, u.id, b"y" * (3 << 20))
    with pytest.raises(openai.BadRequestError) as e:
        client.uploads.complete(u.id, part_ids=[p.id])
    assert e.value.body["code"] == "file_quota_exceeded" and e.value.body["param"] == "part_ids"
    assert "3145728 bytes stand beside its parts" in e.value.message and "files-quota-mb" in e.value.message
    client.files.delete(full[0])
    assert client.uploads.complete(u.id, part_ids=[p.id]).file.bytes == 3 << 20
    for _ in range(2):  # and what was taken was given back: 8 + 3 MiB are there
        client.files.delete(upload(client, b"x" * (4 << 20), purpose="batch").id)


def test_parts_that_are_too_large(client, start, tiny):
    """The limit that is named is the one that was passed."""
    with pytest.raises(openai.APIStatusError) as e:
        part(client, create(client, 1).id, b"x" * ((4 << 20) + 1))
    assert e.value.status_code == 413 and e.value.body["param"] == "data" and "4 MiB that this server accepts (max-file-mb)" in e.value.message
    c = client_of(start(model=tiny))
    with pytest.raises(openai.APIStatusError) as e:
        part(c, create(c, 1).id, b"x" * ((64 << 20) + 1))
    assert e.value.status_code == 413 and e.value.body["param"] == "data" and "64 MiB that a part may have: send it in smaller ones" in e.value.message


def test_ended_uploads_are_forgotten(start, tmp_path, tiny):
    """A day after its hour nobody asks for an upload; the file that it became stays."""
    d = start("--data-dir", tmp_path / "data", model=tiny)
    c = client_of(d)
    ids = [create(c, 1).id for _ in range(4)]
    done = c.uploads.complete(ids[0], part_ids=[part(c, ids[0], b"x").id])
    c.uploads.cancel(ids[1])
    with contextlib.closing(sqlite3.connect(tmp_path / "data/parley.db", timeout=10)) as db:
        with db:
            db.execute("UPDATE uploads SET expires_at=? WHERE id!=?", [int(time.time()) - 90100, ids[3]])
        until(lambda: db.execute("SELECT id, status FROM uploads").fetchall() == [(ids[3], "pending")])
    with pytest.raises(openai.NotFoundError) as e:
        c.uploads.cancel(ids[0])
    assert e.value.body["param"] == "upload_id" and c.files.content(done.file.id).read() == b"x"


def test_kills_and_expiry(start, tmp_path, tiny):
    """What was promised is there after a kill; what was not is swept; an hour after its birth an upload ends."""
    data = tmp_path / "data"
    d = start("--data-dir", data, model=tiny)
    c = client_of(d)
    u, late = create(c, 10), create(c, 10)
    first, lost = part(c, u.id, b"12345"), part(c, late.id, b"12345")
    (data / "uploads" / ("part_" + "0" * 24)).write_text("no row")
    d.process.kill()
    d.process.wait()
    d.process.returncode = 0  # on purpose
    with contextlib.closing(sqlite3.connect(data / "parley.db")) as db, db:
        db.execute("UPDATE uploads SET expires_at=? WHERE id=?", [int(time.time()) - 1, late.id])
    d = start("--data-dir", data, model=tiny)
    c = client_of(d)
    with pytest.raises(openai.BadRequestError, match="is expired"):
        part(c, late.id, b"12345")
    until(lambda: os.listdir(data / "uploads") == [first.id])
    with pytest.raises(openai.BadRequestError, match="is expired"):
        c.uploads.complete(late.id, part_ids=[lost.id])
    done = c.uploads.complete(u.id, part_ids=[first.id, part(c, u.id, b"67890").id])
    assert c.files.content(done.file.id).read() == b"1234567890" and os.listdir(data / "uploads") == []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny):
    d = Daemon(tmp_path_factory.mktemp("permissions"), "--train-worker", ROOT / "tests/tools/fake_worker.py", "--train-nice", 1, model=tiny).wait_ready()
    c = client_of(d)
    f = c.files.create(file=("x", io.BytesIO(GOOD.encode())), purpose="fine-tune")
    job = c.fine_tuning.jobs.create(model="tiny", training_file=f.id)
    until(lambda: c.fine_tuning.jobs.retrieve(job.id).status == "succeeded", 60)
    d.name = c.fine_tuning.jobs.checkpoints.list(job.id).data[0].fine_tuned_model_checkpoint
    yield d
    assert d.stop() == 0, d.log


def test_permissions(checkpoint):
    c, name = client_of(checkpoint), checkpoint.name
    calls = c.fine_tuning.checkpoints.permissions
    made = calls.create(name, project_ids=["proj_a", "proj_b"]).data
    assert [p.project_id for p in made] == ["proj_a", "proj_b"] and all(re.fullmatch("cp_[0-9a-f]{24}", p.id) and p.object == "checkpoint.permission" for p in made)
    assert [p.id for p in calls.create(name, project_ids=["proj_b", "proj_c"]).data][0] == made[1].id  # it has one already
    every = json.loads(checkpoint.get(f"/v1/fine_tuning/checkpoints/{name}/permissions")[2])
    assert [p["project_id"] for p in every["data"]] == ["proj_c", "proj_b", "proj_a"] and every["last_id"] == made[0].id and not every["has_more"]
    page = json.loads(checkpoint.get(f"/v1/fine_tuning/checkpoints/{name}/permissions?limit=1&order=ascending")[2])
    assert [p["project_id"] for p in page["data"]] == ["proj_a"] and page["has_more"]
    only = json.loads(checkpoint.get(f"/v1/fine_tuning/checkpoints/{name}/permissions?project_id=proj_b")[2])
    assert [p["id"] for p in only["data"]] == [made[1].id]
    gone = calls.delete(made[0].id, fine_tuned_model_checkpoint=name)
    assert gone.id == made[0].id and gone.deleted and gone.object == "checkpoint.permission"
    for call in (lambda: calls.delete(made[0].id, fine_tuned_model_checkpoint=name), lambda: calls.create(name + "0", project_ids=["x"]),
                 lambda: calls.delete(made[1].id, fine_tuned_model_checkpoint=name + "0")):
        with pytest.raises(openai.NotFoundError):
            call()


def test_permissions_go_with_the_checkpoint(checkpoint):
    c = client_of(checkpoint)
    calls = c.fine_tuning.checkpoints.permissions
    name = c.fine_tuning.jobs.checkpoints.list(c.fine_tuning.jobs.list().data[0].id).data[1].fine_tuned_model_checkpoint
    projects = [f"proj_{i}" for i in range(100)]
    made = calls.create(name, project_ids=projects).data
    assert [p.project_id for p in made] == projects and len({p.id for p in made}) == 100
    c.models.delete(name)
    with contextlib.closing(sqlite3.connect(data_dir(checkpoint) / "parley.db", timeout=10)) as db:
        assert db.execute("SELECT COUNT(*) FROM permissions WHERE checkpoint=?", [name]).fetchone() == (0,)


@pytest.mark.parametrize("body, param", [({}, "project_ids"), ({"project_ids": []}, "project_ids"), ({"project_ids": [""]}, "project_ids"), ({"project_ids": "x"}, "project_ids"),
                                         ({"project_ids": ["x"], "role": "y"}, "role"), ({"project_ids": ["x" * 65]}, "project_ids")])
def test_bad_permissions(checkpoint, body, param):
    status, _, answer = checkpoint.post(f"/v1/fine_tuning/checkpoints/{checkpoint.name}/permissions", body)
    assert status == 400 and json.loads(answer)["error"]["param"] == param


@pytest.mark.parametrize("method, path", [("DELETE", "/v1/fine_tuning/checkpoints/x/permissions/"), ("DELETE", "/v1/fine_tuning/checkpoints/x/permission/y"),
                                          ("DELETE", "/v1/fine_tuning/checkpoints//permissions/y"), ("GET", "/v1/fine_tuning/checkpoints/x"),
                                          ("DELETE", "/v1/fine_tuning/checkpoints/permissions/y"), ("GET", "/v1/fine_tuning/checkpoints/permissions")])
def test_paths_that_are_not(checkpoint, method, path):
    status, _, answer = checkpoint.request(method, path)
    assert status == 404 and "checkpoint" not in json.loads(answer)["error"]["message"].split("/")[0], answer
