#!/usr/bin/env python3
# make_metric: writes the fixture that tests/unit/check_metric.c compares BLEU and ROUGE with: words, scores of single pairs and of
# whole corpora of ugly text, from sacrebleu 2.6.0 and rouge_score 0.1.2 (pip install sacrebleu==2.6.0 rouge_score==0.1.2).
#   make_metric.py            fixtures/metric/cases.json
#   make_metric.py --check    makes it anew and compares with what is committed
# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import random
import sys

import sacrebleu
from rouge_score import rouge_scorer, tokenize
from sacrebleu.metrics.bleu import BLEU

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "metric" / "cases.json"
TYPES = ["rouge1", "rouge2", "rougeL"]

# answer, reference
PAIRS = [
    ("The quick brown fox jumps over the lazy dog.", "The quick brown dog jumps on the log."),
    ("I am sorry your lamp has a scratch. Warm light, Mira at Northlight", "I am sorry your lamp arrived with a scratch. Warm light, Mira at Northlight"),
    ("exactly the same words, in the same order", "exactly the same words, in the same order"),
    ("", "nothing was said"),
    ("something was said", ""),
    ("", ""),
    ("   \t\n ", "\u00a0\u3000 "),
    ("a", "a"),
    ("one two", "one two three four five six seven"),
    ("the the the the the the the", "the cat is on the mat"),
    ("It costs $1,234.56 (or 3.5%), doesn't it? No: 7-8 days; e.g. 10.000,00.", "It costs $1,234.56, or 3.5 %, does it not? 7 - 8 days, e.g. 10,000.00"),
    (".5 is half, ,5 too. 5. and 5, end.", ".5 is a half, ,5 also. 5. 5,"),
    ("a..b ...c, ,.d 1.,2 3-4 -5 6- x-1", "a. .b ... c,,.d 1. ,2 3 -4 - 5 6 -x - 1"),
    ("R&amp;D &lt;b&gt; &quot;quoted&quot; &amp;lt; &apos; AT&T", "R&D <b> \"quoted\" < ' AT & T"),
    ("line-\nbreak and line - \nbreak\r\nnext\u2028sep\x0bv\x1cfs\x85nel", "linebreak and line -  break next sep v fs nel"),
    ("<skipped> text <skipped>is<skipped> gone", "text is gone"),
    ("{a}[b](c)<d>'e'\"f\"`g`|h|~i~^j^_k_\\l\\/m/*n*+o+=p=@q@#r#!s!?t?:u:;v;", "{ a } [ b ] ( c ) < d > ' e ' \" f \" ` g ` | h |"),
    ("Größe, naïve café — “quotes” ‘single’ … 3×4 ½ €5 №7", "Größe naive café - \"quotes\" 'single' ... 3x4 1/2 €5 No.7"),
    ("İstanbul'da 25 \u212a ve ΑΒΓ ſ ß", "istanbul da 25 k VE αβγ s ss"),
    ("emoji 😀👍🏽 flags 🇩🇪 zero\u200bwidth e\u0301 é", "emoji 😀 👍 flags 🇩🇪 zero width é é"),
    ("今天天气很好，我们去公园吧。", "今天的天气真好，我们去公园散步吧！"),
    ("我有3.14个苹果，价格是￥1,000.50（含税）。", "我有3.14个苹果,价格是¥1,000.50(含税)."),
    ("请用 Python 3.12 和 GPT-4 处理「数据」…", "请使用Python 3.12与GPT-4来处理“数据”……"),
    ("カタカナとひらがな、漢字。ﾊﾝｶｸ ㈱ ㍿ 한국어 조사", "カタカナ と 漢字 ハンカク (株) 株式会社 한국어 조사"),
    ("𠀀𠀁 rare 㐀 ideographs ⺀ ⿰ ㄅ ㆠ ㇀ ︐ ︰ ☀ ✂ ", "𠀀 𠀁 rare 㐀 ideographs ⺀⿰ㄅㆠ㇀︐︰☀✂"),
    ("→ – — ‘a’ “b” • ⩭ ⩮ \u2000x\u2001y\u202fz", "-> - -- 'a' \"b\" * ⩭⩮ x y z"),
    ("0123456789 10-12 1-a a-1 1.a a.1 1,a a,1 1.1 1,1", "0123456789 10 - 12 1 -a a-1 1 .a a .1 1 ,a a ,1 1.1 1,1"),
    ("NUL \u0000 and control \u0001\u001f inside a\u0000b", "NUL and control inside ab a\u0000b"),
    ("word " * 60, "word " * 40 + "other " * 40),
    ("A man, a plan, a canal: Panama! A man, a plan.", "A plan, a man, a canal. Panama; a man: a plan!"),
]


def random_pairs(n):
    rng = random.Random(3)
    words = ["lamp", "light", "Mira", "at", "Northlight,", "3.5", "a.", "(ok)", "can't", "灯", "光明", "x-y", "&amp;", "10,5", "“so”"]
    for _ in range(n):
        base = rng.choices(words, k=rng.randint(0, 25))
        other = [w for w in base if rng.random() < 0.8] + rng.choices(words, k=rng.randint(0, 4))
        yield " ".join(base), rng.choice([" ", "  ", "\n"]).join(other)


class Words:
    """A tokenizer of sacrebleu's for rouge_score."""

    def __init__(self, kind):
        self.split = BLEU(tokenize=kind).tokenizer

    def tokenize(self, text):
        return self.split(text.rstrip()).split()


def make():
    pairs = PAIRS + list(random_pairs(40))
    answers, references = [a for a, _ in pairs], [b for _, b in pairs]
    out = {"made_by": "tests/oracle/make_metric.py", "sacrebleu": sacrebleu.__version__, "pairs": pairs, "kinds": {}}
    out["rouge_words"] = [[tokenize.tokenize(t, None) for t in p] for p in pairs]
    for kind in ("13a", "zh", "char"):
        bleu = BLEU(tokenize=kind)
        scorer = rouge_scorer.RougeScorer(TYPES, tokenizer=None if kind == "13a" else Words(kind))
        each = [scorer.score(b, a) for a, b in pairs]
        corpora = {"all": range(len(pairs)), "first 20": range(20), "empty": [3, 4, 5], "last": range(len(pairs) - 40, len(pairs))}
        out["kinds"][kind] = {
            "words": [[Words(kind).tokenize(t) for t in p] for p in pairs],
            "bleu": [bleu.corpus_score([a], [[b]]).score for a, b in pairs],
            "rouge": [[list(s[t]) for t in TYPES] for s in each],
            "corpora": [{"name": name, "pairs": list(which), "bleu": bleu.corpus_score([answers[i] for i in which], [[references[i] for i in which]]).score,
                         "rouge": [sum(each[i][t].fmeasure for i in which) / len(which) for t in TYPES]} for name, which in corpora.items()],
        }
        assert any(0 < b < 100 for b in out["kinds"][kind]["bleu"])
    return json.dumps(out, ensure_ascii=True, separators=(",", ":")) + "\n"


def main():
    text = make()
    if "--check" in sys.argv:
        good = FIXTURE.read_text() == text
        print("metric is the same" if good else "metric DIFFERS")
        sys.exit(not good)
    FIXTURE.parent.mkdir(parents=True, exist_ok=True)
    FIXTURE.write_text(text)


if __name__ == "__main__":
    main()
