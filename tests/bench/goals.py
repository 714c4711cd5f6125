"""What parley is held to, each goal a ratio of figures of one run.
SPDX-License-Identifier: Apache-2.0
"""
import statistics

from report import BEST, SAME_FILE, value_of


AT_LEAST, AT_MOST = "at least", "at most"
SHORT = 16  # tokens of context that a speed at a longer one is set beside


def against(test, other, at_least, what):
    """parley's speed over a peer's."""
    return what, AT_LEAST, at_least, lambda s: first(s.ratio("engine", None, test, "parley", other))


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


def http(case, test, other):
    return lambda s: first(s.ratio("http", case, test, "parleyd", other))


def over_http(other):
    """parleyd's figures over another server's, 16 clients with short prompts."""
    more = 6 if other == "llama-server" else 3
    return [(f"HTTP, 16 clients, output over that of {other}", AT_LEAST, more, http("short 16", "tok_s", other)),
            (f"HTTP, 16 clients, time to the first text (p50) over that of {other}", AT_MOST, 0.5, http("short 16", "first_ms.p50", other)),
            (f"HTTP, 16 clients, time between texts (p99) over that of {other}", AT_MOST, 0.5, http("short 16", "gap_ms.p99", other))]


def slowest_without_avx512(isa):
    def value(s):
        found = [first(s.ratio("engine", None, t, f"parley {isa}", "parley")) for t in ("prefill 512", "decode 1", "streams 16")]
        return min((v for v in found if v is not None), default=None)
    return value


def overhead(s):
    found = [r["engine"]["overhead"] for r in s.rounds("ops")]
    return statistics.median(found) if found else None


def finished(s):
    n = s.median("http", "many streams", "parleyd", "finished")
    return None if n is None else n / 2000


def goals(peers):
    """(what, AT_LEAST or AT_MOST, bound, value); without a bound it is only printed."""
    out = [against("prefill 512", SAME_FILE, 6, "prefill of 512 over llama.cpp, same file"),
           against("prefill 512", BEST, 2, "prefill of 512 over llama.cpp, Q4_0"),
           against("decode 1", SAME_FILE, 2, "decode, one stream, over llama.cpp, same file"),
           against("decode 1", BEST, 1.3, "decode, one stream, over llama.cpp, Q4_0"),
           against("streams 16", SAME_FILE, 7, "decode, 16 streams, over llama.cpp, same file"),
           ("decode, 16 streams, over llama.cpp, its best", AT_LEAST, 4, best_of("streams 16", SAME_FILE))]
    for peer in peers:
        out += [(f"prefill of 512 over {peer}, its best", AT_LEAST, 1.5, best_of("prefill 512", peer)),
                against("decode 1", peer, 1.5, f"decode, one stream, over {peer}, same file"),
                (f"decode, one stream, over {peer}, its best", AT_LEAST, None, best_of("decode 1", peer)),
                against("streams 16", peer, 5, f"decode, 16 streams, over {peer}, same file"),
                (f"decode, 16 streams, over {peer}, its best", AT_LEAST, None, best_of("streams 16", peer))]
    return out + [
        ("decode from 1 to 64 streams, the least step to the next number of streams", AT_LEAST, 0.99, never_falls),
        ("one stream at context 4,096 over a short one", AT_LEAST, 0.70, lambda s: context(s, 4096)),
        ("one stream at the whole context over a short one", AT_LEAST, None, longest_context),
        ("without AVX-512 (AVX-VNNI) over AVX-512, least of prefill 512, one and 16 streams", AT_LEAST, 0.55, slowest_without_avx512("avxvnni")),
        ("AVX2 alone over AVX-512, least of the same", AT_LEAST, None, slowest_without_avx512("avx2")),
        *over_http("llama-server"), *over_http("llama-server Q4_0"),
        ("shared 1,500-token prefix, time to the first text over that of a 20-token prompt", AT_MOST, 1.5,
         lambda s: first(s.ratio("http", "prefix", "warm_first_ms", "parleyd", "parleyd", "short_first_ms"))),
        ("2,000 streams at once, share that finished", AT_LEAST, 1, finished),
        ("beside one busy process, share of the speed", AT_LEAST, 0.40, lambda s: s.median("http", "busy", "parleyd", "kept")),
        ("GET /v1/models, requests/s over llama-server", AT_LEAST, 2, http("small requests", "/v1/models", "llama-server")),
        ("GET /health, requests/s over llama-server", AT_LEAST, 2, http("small requests", "/health", "llama-server")),
        ("engine, one stream, share of the time that is in no operation", AT_MOST, 0.03, overhead),
    ]


def lines(s):
    peers = dict.fromkeys(x.removesuffix(" Q4_0") for x in s.subjects("engine") if not x.startswith(("parley", SAME_FILE)))
    out = []
    for what, sense, bound, value in goals(peers):
        v = value(s)
        if v is None:
            out.append(f"not measured  {what}")
        elif bound is None:
            out.append(f"              {what}: {v:.2f}")
        else:
            good = v >= bound if sense == AT_LEAST else v <= bound
            digits = 3 if bound < 0.1 else 2
            out.append(f"{'PASS        ' if good else 'FALLS SHORT '}  {what}: {v:.{digits}f} ({sense} {bound:.{digits}f})")
    return out
