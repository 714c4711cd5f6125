#!/usr/bin/env python3
"""Writes fixtures/tokenizer/, which tests/unit/check_tok.c reads: small vocabularies trained here, and the ids that Hugging
Face tokenizers and sentencepiece give for the texts of tokenizer_texts.py. With --model also those of the default model's
vocabulary (smollm2.json). Needs tokenizers, sentencepiece, gguf.

    make_tokenizer.py [--check] [--model FILE.gguf]      --check: compares anew with the committed files, writes nothing
"""
import argparse
import io
import json
import pathlib
import sys

import gguf
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

import tokenizer_texts as texts

FOLDER = pathlib.Path(__file__).parent / "fixtures" / "tokenizer"
NORMAL, UNKNOWN, CONTROL, USER, _, BYTE = range(1, 7)
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USERS = ["<tool>", "</tool>"]
UNREACHABLE = ["zyxw", "\u0120qqqq", "\u0120wordword"]  # tokens that no merge makes: only a tokenizer that takes whole words finds them

# As the models' tokenizer.json files have them.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])


PRE = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(False),
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
    "llama-bpe": lambda: split(LLAMA3),
    "qwen2": lambda: split(QWEN2),
}


class Bpe:
    """A byte-level BPE of Hugging Face's, in three forms: with control tokens, with user-defined ones only, with neither."""

    def __init__(self, tokens, types, merges, pre):
        vocab = {}
        for i, t in enumerate(tokens):
            vocab.setdefault(t, i)

        def build(kinds):
            tok = Tokenizer(models.BPE(vocab, [tuple(m.split(" ")) for m in merges], ignore_merges=pre == "llama-bpe"))
            tok.pre_tokenizer = PRE[pre]()
            added = [AddedToken(t, special=k == CONTROL, normalized=False) for t, k in zip(tokens, types) if k in kinds]
            (tok.add_special_tokens if CONTROL in kinds else tok.add_tokens)(added)
            return tok

        self.special, self.plain = build((CONTROL, USER)), build((USER,))
        self.controls = [(t, i) for i, (t, k) in enumerate(zip(tokens, types)) if k == CONTROL]

    def encode(self, text, special):
        return (self.special if special else self.plain).encode(text, add_special_tokens=False).ids

    def pieces(self, pieces):
        """By the definition: control tokens wholly inside a run of trusted text cut the joined text; what lies between is plain."""
        joined = "".join(p for p, _ in pieces)
        trusted = [t for p, t in pieces for _ in p]
        ids, start, at = [], 0, 0
        while at < len(joined):
            found = [(len(t), i) for t, i in self.controls if joined.startswith(t, at) and all(trusted[at:at + len(t)])]
            if found:
                n, i = max(found)
                ids += self.encode(joined[start:at], False) + [i]
                at = start = at + n
            else:
                at += 1
        return ids + self.encode(joined[start:], False)


def trained_bpe():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    trainer = trainers.BpeTrainer(vocab_size=1500, min_frequency=1, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tok.train_from_iterator(texts.TRAINING, trainer)
    model = json.loads(tok.to_str())["model"]
    tokens = [t for t, _ in sorted(model["vocab"].items(), key=lambda kv: kv[1])]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {
        "model": "gpt2",
        "tokens": CONTROLS + tokens + UNREACHABLE + USERS,
        "types": [CONTROL] * len(CONTROLS) + [NORMAL] * (len(tokens) + len(UNREACHABLE)) + [USER] * len(USERS),
        "merges": merges,
    }


def probe_bpe():
    """Merges of any two bytes that the probe texts have."""
    alphabet = pre_tokenizers.ByteLevel(False)
    used = sorted({c for p in texts.PROBES for word, _ in alphabet.pre_tokenize_str(p) for c in word})
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a in used for b in used]
    return {"model": "gpt2", "tokens": tokens, "types": [NORMAL] * len(tokens), "merges": [f"{a} {b}" for a in used for b in used]}


def bpe_cases(bpe, all_texts):
    return {
        "special": [bpe.encode(t, True) for t in all_texts],
        # only where it differs: [index of the text, ids]
        "plain": [[i, bpe.encode(t, False)] for i, t in enumerate(all_texts) if bpe.encode(t, False) != bpe.encode(t, True)],
        "pieces": [bpe.pieces(p) for p in texts.PIECES],
    }


def trained_spm(**options):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([t for t in texts.TRAINING for _ in range(3)]), model_writer=out, vocab_size=900, model_type="bpe", character_coverage=0.98,
        normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=USERS, minloglevel=2, **options)
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def spm_case(options, prefix, all_texts):
    sp = trained_spm(**options)
    n = sp.get_piece_size()
    # user-defined pieces are no kind of their own in the Python interface
    kind = [UNKNOWN if sp.is_unknown(i) else CONTROL if sp.is_control(i) else BYTE if sp.is_byte(i) else USER if sp.id_to_piece(i) in USERS else NORMAL for i in range(n)]
    ids = {i: sp.encode(t) for i, t in enumerate(all_texts) if "\0" not in t}  # sentencepiece ends a text at NUL
    vocab = {"model": "llama", "tokens": [sp.id_to_piece(i) for i in range(n)], "types": kind, "scores": [sp.get_score(i) for i in range(n)],
             "prefix": prefix, "unknown": sp.unk_id(), "bos": sp.bos_id(), "eos": sp.eos_id()}
    cases = {"plain": [[i, v] for i, v in ids.items()]}
    if BYTE in kind:
        for i, v in ids.items():
            assert sp.decode(v) == all_texts[i].replace("\u2581", " "), all_texts[i]
        cases["decodes"] = True
    return {"vocab": vocab, **cases}


def model_case(path, all_texts):
    fields = gguf.GGUFReader(path).fields
    get = {k: fields["tokenizer.ggml." + k].contents() for k in ("tokens", "token_type", "merges", "pre")}
    return bpe_cases(Bpe(get["tokens"], get["token_type"], get["merges"], get["pre"]), all_texts)


RUNS = ["aaaaaaa aaa aaaa bababab abab aab aabb " * 3, "x" * 1000 + " " + "xy" * 300, "==== ======= = == -- --- ----", "\u5b57" * 50, "one one two"]


def learned(every, folder):
    """What BpeTrainer learns, merge for merge: texts of texts.json from 0 on, texts of its own, or a file as one text."""
    cases = []
    for name, source, special, size, least in (
            ("ugly", {"first": len(every)}, 0, 1000, 0), ("ugly, twice at least", {"first": len(every)}, 3, 4000, 2),
            ("runs", {"texts": RUNS}, 1, 10000, 0), ("too little", {"texts": ["hello hello", "", "a"]}, 1, 300, 2),
            ("lamps", {"file": "data/northlight-train.jsonl"}, 1, 1500, 2)):
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(False)
        controls = CONTROLS[:special]
        trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=least, special_tokens=controls, max_token_length=257, show_progress=False,
                                      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
        texts_ = every[:source["first"]] if "first" in source else source.get("texts") or [(folder / source["file"]).read_text()]
        tok.train_from_iterator(texts_, trainer)
        model = json.loads(tok.to_str())["model"]
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        tokens = [t for t, _ in sorted(model["vocab"].items(), key=lambda kv: kv[1])]
        assert tokens == controls + sorted(pre_tokenizers.ByteLevel.alphabet()) + [m.replace(" ", "") for m in merges], name
        cases.append({"name": name, **source, "special": special, "size": size, "least": least, "merges": merges})
    return {"cases": cases}


def make(model):
    small = texts.BASE + texts.mixtures(150)
    files = {"texts.json": {"texts": small, "pieces": texts.PIECES}}
    vocab = trained_bpe()
    files["bpe.json"] = {"vocab": vocab, "pre": {pre: bpe_cases(Bpe(vocab["tokens"], vocab["types"], vocab["merges"], pre), small) for pre in PRE}}
    vocab, probes = probe_bpe(), texts.probes(200)
    files["probe.json"] = {"vocab": vocab, "texts": probes, "pre": {}}
    for pre in PRE:
        bpe = Bpe(vocab["tokens"], vocab["types"], vocab["merges"], pre)
        files["probe.json"]["pre"][pre] = [bpe.encode(t, False) for t in probes]
    files["spm.json"] = spm_case({"byte_fallback": True}, True, small)
    files["spm-unknown.json"] = spm_case({"byte_fallback": False}, True, small)
    files["spm-no-prefix.json"] = spm_case({"byte_fallback": True, "add_dummy_prefix": False}, False, small)
    files["learned.json"] = learned(small, FOLDER.parents[3])
    if model:
        files["smollm2.json"] = model_case(model, small)
    return {name: (json.dumps(v, ensure_ascii=False, separators=(",", ":")) + "\n").encode() for name, v in files.items()}


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--check", action="store_true")
    args.add_argument("--model")
    args = args.parse_args()
    files = make(args.model)
    if args.check:
        failed = [name for name, data in files.items() if (FOLDER / name).read_bytes() != data]
        print(f"tokenizer fixtures: {len(files) - len(failed)} equal", *(f"{name} DIFFERS" for name in failed))
        sys.exit(len(failed) != 0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (FOLDER / name).write_bytes(data)


if __name__ == "__main__":
    main()
