"""What parley is held to, each goal a ratio of figures of one run.
SPDX-License-Identifier: Apache-2.0
"""
import statistics

from report import BEST, SAME_FILE, number, value_of


SHORT = 16  # tokens of context that a speed at a longer one is set beside


def against(test, other, at_least, what):
    """parley's speed over a peer's."""
    return what, at_least, lambda s: first(s.ratio("engine", None, test, "parley", other))


def first(r):
    return r and r[0]


def best_of(test, peer):
    """parley over the better of a peer's two files, round by round."""
    def value(s):
        ratios = []
        for r in s.rounds("engine", None, test):
            speeds = [v for x in (peer, f"{peer} Q4_0") if (v := value_of(r, x, test))]
            if speeds:
                ratios.append(r["parley"][test] / max(speeds))
        return statistics.median(ratios) if ratios else None
    return value


def never_falls(s):
    """The least step from one number of streams to the next: 1 = none is slower than the one before."""
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if s.median("engine", None, "parley", f"streams {n}")]
    steps = [first(s.ratio("engine", None, f"streams {b}", "parley", "parley", f"streams {a}")) for a, b in zip(counts, counts[1:])]
    return min(steps) if steps else None


def context(s, length):
    return first(s.ratio("engine", None, f"context {length}", "parley", "parley", f"context {SHORT}"))


def longest_context(s):
    found = [int(t.split()[1]) for r in s.rounds("engine") for t in r.get("parley", ()) if t.startswith("context")]
    return context(s, max(found)) if found else None


def http(case, test, other, invert=False):
    def value(s):
        r = first(s.ratio("http", case, test, "parleyd", other))
        return 1 / r if invert and r else r
    return value


def goals(peers):
    """(what, at least, value); at least None = printed only."""
    out = [against("prefill 512", SAME_FILE, 6, "prefill of 512: llama.cpp, same file"), against("prefill 512", BEST, 2, "prefill of 512: llama.cpp, Q4_0"),
           against("decode 1", SAME_FILE, 2, "decode, one stream: llama.cpp, same file"),
           against("decode 1", BEST, 1.3, "decode, one stream: llama.cpp, Q4_0"),
           against("streams 16", SAME_FILE, 7, "decode, 16 streams: llama.cpp, same file"),
           ("decode, 16 streams: llama.cpp, its best", 4, best_of("streams 16", SAME_FILE))]
    for peer in peers:
        out += [(f"prefill of 512: {peer}, its best", 1.5, best_of("prefill 512", peer)),
                (f"decode, one stream: {peer}, its best", 1.5, best_of("decode 1", peer)),
                (f"decode, 16 streams: {peer}, its best", 5, best_of("streams 16", peer))]
    return out + [
        ("decode never falls from 1 to 64 streams (least step)", 0.99, never_falls),
        ("one stream at context 4,096 keeps", 0.70, lambda s: context(s, 4096)),
        ("one stream at the whole context keeps", None, longest_context),
        ("AVX2 over AVX-512, least of prefill 512, one and 16 streams", 0.55,
         lambda s: min((r for t in ("prefill 512", "decode 1", "streams 16") if (r := first(s.ratio("engine", None, t, "parley avx2", "parley")))),
                       default=None)),
        ("HTTP, 16 clients, output: llama-server, same file", 6, http("short 16", "tok_s", "llama-server")),
        ("HTTP, 16 clients, output: llama-server, Q4_0", 3, http("short 16", "tok_s", "llama-server Q4_0")),
        ("HTTP, 16 clients, first text p50: llama-server's over parleyd's", 2, http("short 16", "first_ms.p50", "llama-server", True)),
        ("HTTP, 16 clients, first text p50: llama-server Q4_0's over parleyd's", 2, http("short 16", "first_ms.p50", "llama-server Q4_0", True)),
        ("HTTP, 16 clients, between texts p99: llama-server's over parleyd's", 2, http("short 16", "gap_ms.p99", "llama-server", True)),
        ("HTTP, 16 clients, between texts p99: llama-server Q4_0's over parleyd's", 2, http("short 16", "gap_ms.p99", "llama-server Q4_0", True)),
        ("shared 1,500-token prefix: first text of 20 tokens over that of the prefix (1.5 times as long at most)", 1 / 1.5,
         lambda s: first(s.ratio("http", "prefix", "short_first_ms", "parleyd", "parleyd", "warm_first_ms"))),
        ("2,000 streams at once: share that finished", 1, lambda s: (n := s.median("http", "many streams", "parleyd", "finished")) and n / 2000),
        ("beside one busy process: speed kept", 0.40, lambda s: s.median("http", "busy", "parleyd", "kept")),
        ("GET /v1/models: llama-server", 2, http("small requests", "/v1/models", "llama-server")),
        ("GET /health: llama-server", 2, http("small requests", "/health", "llama-server")),
        ("engine overhead at one stream: 3 % over what it is", 1, lambda s: overhead(s)),
    ]


def overhead(s):
    found = [r["engine"]["overhead"] for r in s.rounds("ops")]
    return 0.03 / max(statistics.median(found), 1e-6) if found else None


def lines(s):
    peers = dict.fromkeys(x.removesuffix(" Q4_0") for x in s.subjects("engine") if not x.startswith(("parley", SAME_FILE)))
    out = []
    for what, at_least, value in goals(peers):
        v = value(s)
        if v is None:
            out.append(f"not measured  {what}")
        elif at_least is None:
            out.append(f"              {what}: {number(v)}")
        else:
            out.append(f"{'PASS        ' if v >= at_least else 'FALLS SHORT '}  {what}: {number(v)} (goal {number(at_least)})")
    return out
