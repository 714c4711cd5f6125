"""parley eval: its figures against those of training, answers that are known, and what it says of bad input.
SPDX-License-Identifier: Apache-2.0"""
import json
import math
import subprocess

import pytest

from conftest import SLOW
from test_train import PARLEY, TOOLS, base, lines, make_job, run  # noqa: F401 (base is a fixture)


def evaluate(*args, check=0):
    done = subprocess.run([PARLEY, "eval", *map(str, args)], capture_output=True, text=True, timeout=120 * SLOW)
    assert done.returncode == check, (done.returncode, done.stderr)
    return done


def figures(*args):
    return json.loads(evaluate(*args, "--json").stdout)


@pytest.fixture(scope="module")
def taught(tmp_path_factory, base):
    """A job that has learned one answer by heart."""
    folder = make_job(tmp_path_factory.mktemp("taught") / "job", base, epochs=16, more={
        "peft": {"dropout": 0}, "hyperparameters": {"learning_rate": 0.02}, "compute": {"precision": "f32"}})
    for name in ("train", "valid"):
        rows = [json.loads(x) for x in (folder / f"{name}.jsonl").read_text().splitlines()]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({**r, "completion": " so it ended: quietly, at 7.30"}) + "\n" for r in rows))
    run(folder)
    return folder


def test_it_measures_what_training_measures(taught, base):
    last = lines(taught, "metrics")[-1]
    got = figures("--model", base, "--adapter", taught / "result", "--data", taught / "valid.jsonl", "--precision", "f32")
    assert got["loss"] == pytest.approx(last["full_valid_loss"], rel=1e-5)
    assert got["mean_token_accuracy"] == pytest.approx(last["full_valid_mean_token_accuracy"], rel=1e-6)
    assert got["perplexity"] == pytest.approx(math.exp(got["loss"]), rel=1e-6)
    assert got["examples"] == 10 and 0 < got["loss_tokens"] < got["tokens"]
    plain = figures("--model", base, "--data", taught / "valid.jsonl", "--precision", "f32")
    assert plain["loss"] > 10 * got["loss"] and plain["general_loss"] != got["general_loss"] and plain["tokens"] == got["tokens"]


def test_answers_learned_by_heart(taught, base, tmp_path):
    args = "--model", base, "--data", taught / "valid.jsonl", "--answers", 8, "--max-tokens", 40
    got = figures(*args, "--adapter", taught / "result", "--show", tmp_path / "said.jsonl")
    assert got["answers"] == 8 and got["bleu"] == pytest.approx(100) and got["rouge1"] == got["rouge2"] == got["rougeL"] == 1
    assert got["bleu_signature"] == "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp"
    said = [json.loads(x) for x in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [x["line"] for x in said] == list(range(1, 9))
    assert {x["answer"] for x in said} == {x["reference"] for x in said} == {" so it ended: quietly, at 7.30"}
    assert figures(*args)["bleu"] < 20
    zh = figures(*args, "--adapter", taught / "result", "--words", "zh")
    assert zh["bleu_zh"] == pytest.approx(100) and zh["rougeL_zh"] == 1 and "bleu" not in zh


def test_the_table(taught, base):
    rows = [x.split(None, 1) for x in evaluate("--model", base, "--data", taught / "valid.jsonl", "--answers", 2, "--max-tokens", 4).stdout.splitlines()]
    assert [x[0] for x in rows] == ["examples", "tokens", "loss", "perplexity", "token", "general", "answers", "BLEU", "ROUGE-1", "ROUGE-2", "ROUGE-L"]


def test_texts_and_a_general_text_of_ones_own(base, tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "the cat sat on a mat " * 80}) + "\n")
    (tmp_path / "general.txt").write_text("the cat sat on a mat " * 80)
    got = figures("--model", base, "--data", tmp_path / "texts.jsonl", "--general", tmp_path / "general.txt", "--precision", "f32")
    assert got["loss"] == pytest.approx(got["general_loss"], rel=1e-5) and got["tokens"] - got["loss_tokens"] == got["examples"]
    short = figures("--model", base, "--data", tmp_path / "texts.jsonl", "--max-length", 16)
    assert short["examples"] > got["examples"]


def test_a_model_alone(base):
    assert set(figures("--model", base)) == {"model", "general_loss"}


BAD = [
    ([], 2, "--model FILE"),
    (["--model", "BASE", "--answers", "3"], 2, "--data FILE"),
    (["--model", "BASE", "--data", "GOOD", "--show", "x"], 2, "--answers N"),
    (["--model", "BASE", "--words", "13b"], 2, "--words must be 13a, zh or char, not 13b"),
    (["--model", "BASE", "--threads", "many"], 2, "--threads must be a whole number from 0 to 256, not many"),
    (["--model", "BASE", "--max-tokens", "0"], 2, "--max-tokens must be a whole number from 1"),
    (["--model", "BASE", "--train-on", "user"], 2, "--train-on must be"),
    (["--model", "BASE", "--colour"], 2, "--colour"),
    (["--model", "nowhere.gguf"], 1, "nowhere.gguf"),
    (["--model", "GOOD"], 1, "GGUF"),
    (["--model", "BASE", "--adapter", "nowhere"], 1, "nowhere"),
    (["--model", "BASE", "--data", "nowhere.jsonl"], 1, "nowhere.jsonl"),
    (["--model", "BASE", "--data", "BROKEN"], 1, "Example 2"),
    (["--model", "BASE", "--data", "EMPTY"], 1, "0 example(s)"),
    (["--model", "BASE", "--data", "PAIRS"], 1, "preference pairs"),
    (["--model", "BASE", "--data", "TEXT", "--answers", "1"], 1, "texts, which ask nothing"),
    (["--model", "BASE", "--data", "GOOD", "--max-length", "100000"], 1, "the model takes"),
    (["--model", "BASE", "--general", "nowhere.txt"], 1, "nowhere.txt"),
    (["--model", "BASE", "--general", "BINARY"], 1, "is not UTF-8"),
    (["--model", "BASE", "--data", "GOOD", "--answers", "1", "--show", "/nowhere/x"], 1, "/nowhere/x"),
    (["--model", "BASE", "--data", "GOOD", "--chat-template", "/nowhere/x"], 1, "/nowhere/x"),
]


@pytest.mark.parametrize("args, code, says", BAD, ids=range(len(BAD)))
def test_bad_input(base, tmp_path, args, code, says):
    turn = [{"role": "assistant", "content": "a"}]
    files = {"BASE": None, "GOOD": '{"prompt":"a","completion":"b c"}\n', "BROKEN": '{"prompt":"a","completion":"b c"}\n{"prompt":"a"}\n', "EMPTY": "\n",
             "PAIRS": json.dumps({"input": {"messages": [{"role": "user", "content": "x"}]}, "preferred_output": turn, "non_preferred_output": turn}) + "\n",
             "TEXT": '{"text":"a b c"}\n', "BINARY": "\udcff\udcfe"}
    for name, text in files.items():
        if text is not None:
            (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    done = evaluate(*(base if a == "BASE" else tmp_path / a if a in files else a for a in args), check=code)
    assert says in done.stderr and not done.stdout, done.stderr


def test_dialogues_longer_than_the_context(taught, base, tmp_path):
    """Whatever stands before the last question, it is answered; what was left out is counted."""
    turns = [{"role": r, "content": "tell me of the sea and the rain " * 40} for r in ("user", "assistant")] * 6
    system, ask = {"role": "system", "content": "a b"}, [{"role": "user", "content": "so?"}, {"role": "assistant", "content": "so it ended"}]
    rows = [[system, *ask], [system, *turns, *ask], [system, {"role": "user", "content": "x " * 3000}, ask[1]]]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in rows))
    args = "--model", base, "--data", tmp_path / "long.jsonl", "--answers", 3, "--max-tokens", 8, "--train-on", "all", "--show", tmp_path / "said.jsonl"
    got = figures(*args)
    assert got["answers"] == 3 and got["answers_cut"] == 2
    said = [json.loads(x) for x in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert ["prompt_tokens_cut" in x for x in said] == [False, True, True] and {x["reference"] for x in said} == {"so it ended"}
    assert said[1]["answer"] == said[0]["answer"] != ""  # all turns but the last were left out
    assert "2 to prompts of which the begin was left out" in evaluate(*args).stdout
