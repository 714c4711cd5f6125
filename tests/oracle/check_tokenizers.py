#!/usr/bin/env python3
"""Compares parley's tokenizers, token for token, with Hugging Face tokenizers (byte-level BPE) and sentencepiece, on ugly
text in a dozen scripts. The default model's vocabulary is the real one; for other pre-tokenizer patterns and for
SentencePiece small vocabularies are trained here, which takes a second.

    check_tokenizers.py --encode build/release/encode [--model FILE.gguf]
"""
import argparse
import io
import pathlib
import random
import struct
import subprocess
import sys
import tempfile
import unicodedata

import gguf
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BASE = [
    "Hello, world! It's 2024's best: I'll we've they're I'd I'm you'LL\n\n  tabs\t\tand   spaces  \r\n x",
    "Привет мир, как дела? Ελληνικά κείμενο العربية نص عربي עברית טקסט हिन्दी पाठ ไทยข้อความ 中文字符，标点。 日本語テスト カタカナ 한국어 텍스트 ქართული ტექსტი አማርኛ ጽሑፍ",
    "👩‍👩‍👧‍👦🇩🇪🏳️‍🌈 e\u0301o\u0308 \u200f\u200e\u0000\u0001\u007f \ufffd \ue000 \u00a0\u3000\u2028\u2029\u0085\u180e\u200b\ufeff",
    "def f(x):\n\treturn x**2 # ok\n\n\nclass A:\n    pass\n", " 1234567890 ½ ² Ⅷ ٣٤٥ 3.14e-10 0x1F 1,000,000", "<|im_start|>user\nx<|im_end|>\n <|endoftext|> <|im_start <|im_end|",
    "https://a.b/c?d=e&f=%20#g 'S 'T 'LL don\u2019t naïve façade Straße", "a" * 3000, " " * 500 + "x", "\n" * 300, "", " ", "\n", "▁x ▁▁ y", "<s> </s> <unk> <0x0A>",
]


def corpus():
    rng = random.Random(7)
    random_chars = (chr(rng.choice([rng.randrange(32, 0x2FFF), rng.randrange(0x3000, 0xD7FF), rng.randrange(0xE000, 0xFFFF),
                                    rng.randrange(0x10000, 0x1FFFF)])) for _ in range(6000))
    # letters and digits that are newer than the Unicode tables of either library are classified differently by design
    pool = "".join(BASE) + "".join(c for c in random_chars if unicodedata.category(c) != "Cn")
    texts = list(BASE)
    texts += ["".join(rng.choice(pool) for _ in range(rng.randrange(1, 60))) for _ in range(2500)]
    for _ in range(1500):
        parts = []
        for _ in range(8):
            k = rng.randrange(0, 30)
            parts.append(rng.choice(BASE)[k:k + rng.randrange(1, 9)])
        texts.append("".join(parts))
    return texts


def ours(encode, path, texts, *flags):
    data = b"".join(struct.pack("<I", len(t.encode())) + t.encode() for t in texts)
    out = subprocess.run([encode, str(path), *flags], input=data, stdout=subprocess.PIPE, check=True).stdout.decode().split("\n")[:-1]
    return [([int(i) for i in line.split("|")[0].split()], bytes.fromhex(line.split("|")[1])) for line in out]


def write_gguf(path, model, tokens, types, merges=None, pre=None, scores=None):
    w = gguf.GGUFWriter(path, "llama")
    w.add_tokenizer_model(model)
    if pre:
        w.add_tokenizer_pre(pre)
    w.add_token_list(tokens)
    w.add_token_types(types)
    if merges is not None:
        w.add_token_merges(merges)
    if scores is not None:
        w.add_token_scores(scores)
        w.add_unk_token_id(0)
        w.add_bos_token_id(1)
        w.add_eos_token_id(2)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def splitter(pre):
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(False)
    pattern = LLAMA3 % ("{1,3}" if pre == "llama-bpe" else "")
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])


def trained_bpe(pre, folder):
    import json
    tok = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tok.pre_tokenizer = splitter(pre)
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special, show_progress=False)
    tok.train_from_iterator(BASE * 3 + [pathlib.Path(__file__).read_text()], trainer)
    state = json.loads(tok.to_str())["model"]
    tokens = [t for t, _ in sorted(state["vocab"].items(), key=lambda kv: kv[1])]
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["merges"]]
    path = folder / f"{pre}.gguf"
    write_gguf(path, "gpt2", tokens, [3 if t in special else 1 for t in tokens], merges, pre)
    return tok, path


def model_bpe(path):
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    tok = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tok.pre_tokenizer = splitter(fields["tokenizer.ggml.pre"].contents())
    types = fields["tokenizer.ggml.token_type"].contents()
    tok.add_special_tokens([AddedToken(t, special=True) for t, k in zip(tokens, types) if k == 3])
    return tok


def trained_spm(folder):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter((BASE + pathlib.Path(__file__).read_text().split("\n")) * 2), model_writer=model, vocab_size=900,
                                             model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
                                             character_coverage=0.98, minloglevel=2, max_sentence_length=100000)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    n = sp.get_piece_size()
    types = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in range(n)]
    path = folder / "spm.gguf"
    write_gguf(path, "llama", [sp.id_to_piece(i) for i in range(n)], types, scores=[sp.get_score(i) for i in range(n)])
    return sp, path


def compare(name, texts, want, got, decoded):
    bad = 0
    for text, w, (g, back) in zip(texts, want, got):
        ok = w == g and (not decoded or back == text.encode())
        bad += not ok
        if not ok and bad <= 3:
            print(f"{name}: {text[:80]!r}\n  reference {w[:24]}\n  parley    {g[:24]}")
    print(f"tokenizer {name}: {len(texts) - bad} of {len(texts)} texts equal")
    return bad


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--encode", required=True)
    args.add_argument("--model")
    args = args.parse_args()
    texts, failed, total = corpus(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        cases = [(pre, *trained_bpe(pre, folder)) for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2")]
        if args.model:
            cases.append(("of the default model", model_bpe(args.model), args.model))
        for name, tok, path in cases:
            want = [tok.encode(t, add_special_tokens=False).ids for t in texts]
            failed += compare(name, texts, want, ours(args.encode, path, texts), True)
            total += len(texts)
        sp, path = trained_spm(folder)
        plain = [t for t in texts if t and "\0" not in t]  # where sentencepiece's own API ends a text
        failed += compare("SentencePiece", plain, [sp.encode(t) for t in plain], ours(args.encode, path, plain, "--plain"), False)
        total += len(plain)
    print(f"tokenizers: {total - failed} passed, {failed} failed")
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
