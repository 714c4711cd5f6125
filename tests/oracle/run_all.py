#!/usr/bin/env python3
"""Makes the heavy fixtures anew, with the packages of requirements.txt, and says whether they are what is committed (make oracle).
The committed files are left as they are. Environment: PARLEY_TEST_MODEL, the default model's file."""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
FIXTURES = HERE / "fixtures" / "logits"
BIN = HERE.parents[1] / "build" / "release"
MODEL = os.environ.get("PARLEY_TEST_MODEL") or pathlib.Path.home() / ".cache/parley/SmolLM2-135M-Instruct.Q4_1.gguf"


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) else []


def same(old, new):
    """Equal, or JSON whose cases' numbers differ by rounding only (another processor, another torch); what was measured of a peer is left out."""
    if old == new:
        return True
    try:
        a, b = numbers(json.loads(old)["cases"]), numbers(json.loads(new)["cases"])
    except ValueError:
        return False
    return len(a) == len(b) and all(abs(x - y) <= 1e-3 * (1 + abs(x)) for x, y in zip(a, b))


def main():
    with tempfile.TemporaryDirectory() as folder:
        kept = pathlib.Path(folder) / "logits"
        shutil.copytree(FIXTURES, kept)
        try:
            for what in (["tiny"], ["real", "--model", str(MODEL)]):
                subprocess.run([sys.executable, str(HERE / "make_logits.py"), *what, "--bin", str(BIN)], check=True)
            results = {p.name: same((kept / p.name).read_bytes(), p.read_bytes()) for p in sorted(FIXTURES.iterdir()) if (kept / p.name).exists()}
        finally:
            shutil.rmtree(FIXTURES)
            shutil.copytree(kept, FIXTURES)
    for name, ok in results.items():
        print(name, "is the same" if ok else "DIFFERS")
    for what in (["make_dtype.py"], ["make_metric.py"], ["make_tokenizer.py", "--model", str(MODEL)]):
        results[what[0]] = subprocess.run([sys.executable, str(HERE / what[0]), "--check", *what[1:]]).returncode == 0
    train = [sys.executable, str(HERE / "make_train.py"), "--bin", str(BIN), "--check"]
    results["make_train.py"] = subprocess.run(train).returncode == 0
    scratch = [sys.executable, str(HERE / "make_scratch.py"), "--bin", str(BIN), "--check"]
    results["make_scratch.py"] = subprocess.run(scratch).returncode == 0
    adapters = [sys.executable, str(HERE / "make_adapter.py"), "real", "--bin", str(BIN), "--model", str(MODEL)]
    results["make_adapter.py"] = subprocess.run(adapters).returncode == 0
    export = [sys.executable, str(HERE / "check_export.py"), "--bin", str(BIN), "--check", "--model", str(MODEL)]
    results["check_export.py"] = subprocess.run(export).returncode == 0
    training = [sys.executable, str(HERE / "check_training.py"), "--bin", str(BIN), "--model", str(MODEL)]
    results["check_training.py"] = subprocess.run(training).returncode == 0
    failed = sum(not ok for ok in results.values())
    print(f"oracle: {len(results) - failed} passed, {failed} failed")
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
