"""What deploy/ and the pages say about the programs is true of the programs: flags, variables, verbs; and what make does for those who install.

SPDX-License-Identifier: Apache-2.0
"""
import re
import shutil
import subprocess

import pytest
import yaml

from conftest import PARLEYD, ROOT

HELP = subprocess.run([PARLEYD, "--help"], capture_output=True, text=True, check=True).stdout
KEYS = set(re.findall(r"^    --([a-z-]+)", HELP, re.M)) | {"version", "help"}
CLI = subprocess.run([PARLEYD.parent / "parley", "help"], capture_output=True, text=True, check=True).stdout
FILES = [p for p in [*(ROOT / "deploy").rglob("*"), ROOT / "README.md", *(ROOT / "docs").glob("*.md")] if p.is_file()]
POD = next(yaml.safe_load_all((ROOT / "deploy/gpu/kubernetes.yaml").read_text()))["spec"]["template"]["spec"]


def commands(text, program):
    """What follows a program's name to the end of its command."""
    joined = re.sub(r"\\\n#?", " ", text)
    return [m.split(" # ")[0] for m in re.findall(rf"(?:^|[ /\"]){program}\"?,? ([^\n`|;]*)", joined, re.M)]


def flags(command):
    return re.findall(r"(?:^|[ \"\[])--([a-z][a-z-]*)", command)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_flags_and_variables(path):
    text = path.read_text()
    images = commands(text, "parley-cuda") + commands(text, "parley(?= --model)") if path.name == "Containerfile" else []
    used = {f for c in commands(text, "parleyd") + images for f in flags(c)}
    assert not used - KEYS, used - KEYS
    variables = {v.lower().replace("_", "-") for v in re.findall(r"\bPARLEY_([A-Z_]+)\b", text)} - {"key", "config", "tools"}
    variables = {v for v in variables if not v.startswith("test-")}
    assert not variables - KEYS, variables - KEYS
    settings = {s for s in re.findall(r"^#     ([a-z-]+) = ", text, re.M)}
    assert not settings - KEYS, settings - KEYS
    for verb in ("chat", "bench", "export", "eval", "tokenize", "train"):
        mine = set(re.findall(r"--([a-z-]+)", subprocess.run([PARLEYD.parent / "parley", verb, "--help"], capture_output=True, text=True, check=True).stdout))
        used = {f for c in commands(text, f"parley {verb}") for f in flags(c)}
        assert not used - mine, (verb, used - mine)


def test_every_verb_has_its_help():
    verbs = set(re.findall(r"^    parley ([a-z]+)", CLI, re.M)) - {"version"}
    assert verbs == {"chat", "bench", "export", "eval", "tokenize", "train"}
    for verb in verbs:
        out = subprocess.run([PARLEYD.parent / "parley", verb, "--help"], capture_output=True, text=True)
        assert out.returncode == 0 and out.stdout.startswith(f"    parley {verb} ") and out.stdout in CLI.replace("    parley version\n", "")
        assert not re.search(rf"^    parley (?!{verb} )", out.stdout, re.M)


def test_kubernetes():
    """A service called parley would put PARLEY_PORT=tcp://… into every pod, which is the variable of a setting."""
    assert POD["enableServiceLinks"] is False
    (container,) = POD["containers"]
    assert not set(flags(" ".join(container["args"]))) - KEYS
    assert POD["terminationGracePeriodSeconds"] > 30  # drain-timeout


def test_proxy_lets_uploads_through():
    assert int(re.search(r"client_max_body_size (\d+)m", (ROOT / "deploy/proxy/nginx.conf").read_text()).group(1)) > 512  # max-file-mb and its form


def test_make_knows_when_all_is_done():
    """deploy/run builds, and installs compilers for it, only where that says no."""
    if PARLEYD.resolve().parent != ROOT / "build/release":
        pytest.skip("another build")
    assert subprocess.run(["make", "-s", "-q", "all"], cwd=ROOT).returncode == 0


def test_make_sees_flags_and_other_builds(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "x.c").write_text("int x;\n")

    def make(*args):
        return subprocess.run(["make", "-s", *args], cwd=tmp_path, capture_output=True).returncode

    assert make("clean", "build/release/x.o") == 0
    assert make("-q", "build/release/x.o") == 0
    assert make("-q", "EXTRA_CFLAGS=-DX", "build/release/x.o") == 1
    for build in ("release", "debug"):
        (tmp_path / "build" / build).mkdir(exist_ok=True)
        for name in ("libparley.a", "parleyd"):
            (tmp_path / "build" / build / name).touch()
    link = tmp_path / "build/parleyd"
    link.symlink_to("debug/parleyd")
    assert make("-q", "build/parleyd") == 1 and make("build/parleyd") == 0
    assert str(link.readlink()) == "release/parleyd" and make("-q", "build/parleyd") == 0


def test_install_keeps_settings(tmp_path):
    if PARLEYD.resolve().parent != ROOT / "build/release":
        pytest.skip("another build")
    install = ["make", "-s", "install", f"DESTDIR={tmp_path}"]
    subprocess.run(install, cwd=ROOT, check=True)
    conf = tmp_path / "etc/parley/parley.conf"
    assert conf.read_text() == (ROOT / "deploy/parley.conf").read_text()
    conf.write_text("port = 9000\n")
    subprocess.run(install, cwd=ROOT, check=True)
    assert conf.read_text() == "port = 9000\n"
    assert (tmp_path / "usr/local/bin/parleyd").is_file()
