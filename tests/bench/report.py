"""Tables and plots of what compare has measured. Standard library only.
SPDX-License-Identifier: Apache-2.0
"""
import html
import math
import re
import statistics

MOVED = 0.10     # int8 products further than this from their median: the round is left out
SWITCHED = 0.20  # reading before and after a round further apart than this: the bandwidth was another
PROCESSOR = ("int8_avx512", "int8_avxvnni", "int8_avx2")  # the first that this machine has
READING = re.compile(r"decode 1|streams [12]|context \d+")  # figures that follow the bandwidth
MARK = "<!-- figures -->"
SAME_FILE, BEST = "llama.cpp", "llama.cpp Q4_0"


class Summary:
    """The rounds that were undisturbed, and the questions that tables and goals ask of them."""

    def __init__(self, results):
        self.results = results
        rounds = results["rounds"]
        every = [c for r in rounds for c in r["calibrator"]]
        self.machine = {k: statistics.median_low(c[k] for c in every) for k in every[0]} if every else {}
        self.processor = next(([k] for k in PROCESSOR if self.machine.get(k)), [])
        self.kept = [r for r in rounds if self.undisturbed(r)]
        self.quick = any(r["quick"] for r in rounds)

    def undisturbed(self, r):
        """Nobody else had the processors."""
        return all(abs(c[k] / self.machine[k] - 1) <= MOVED for c in r["calibrator"] for k in self.processor)

    @staticmethod
    def reads_steadily(r):
        """A virtual machine's bandwidth may have several states, and flickers in each; it must not have changed state."""
        before, after = (c["read_gbs"] for c in r["calibrator"])
        return max(before, after) <= (1 + SWITCHED) * min(before, after)

    def rounds(self, section, case=None, test=""):
        """Results of the undisturbed rounds; with a test that follows the bandwidth, of those in which that was steady too."""
        reading = section == "engine" and READING.fullmatch(test)
        return [r["results"] for r in self.kept if r["section"] == section and case in (None, r["case"])
                and (not reading or self.reads_steadily(r))]

    def counts(self, section):
        kept = len(self.rounds(section))
        return kept, sum(r["section"] == section for r in self.results["rounds"])

    def values(self, section, case, subject, test):
        """test: a key, or keys with a dot between."""
        found = [value_of(r, subject, test) for r in self.rounds(section, case, test)]
        return [v for v in found if v is not None]

    def median(self, *which):
        v = self.values(*which)
        return statistics.median(v) if v else None

    def ratio(self, section, case, test, one, other, other_test=None):
        """Median, minimum, maximum over the rounds that have both; None when none has."""
        pairs = [(value_of(r, one, test), value_of(r, other, other_test or test)) for r in self.rounds(section, case, test)]
        ratios = [a / b for a, b in pairs if a is not None and b]
        return (statistics.median(ratios), min(ratios), max(ratios)) if ratios else None

    def subjects(self, section, case=None):
        """In the order of the first round that began with parley."""
        names = {}
        for r in self.rounds(section, case):
            names.update(dict.fromkeys(sorted(r, key=lambda n: (not n.startswith("parley"), not n.startswith("llama"), n))))
        return list(names)


def value_of(results, subject, test):
    v = results.get(subject)
    for key in test.split("."):
        v = v.get(key) if isinstance(v, dict) else None
    return v


def number(v, digits=None):
    if v is None:
        return "–"
    if digits is None:
        digits = 0 if v >= 100 else 1 if v >= 10 else 2
    return f"{v:,.{digits}f}"


def span(r):
    return "–" if r is None else f"{r[0]:.2f} ({r[1]:.2f} to {r[2]:.2f})"


def table(head, rows):
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)] + ["| " + " | ".join(r) + " |" for r in rows] + [""]


def order(test):
    kind, n = test.rsplit(" ", 1)
    return ("prefill", "decode", "streams", "context").index(kind), int(n)


def engine_tables(s):
    kept, of = s.counts("engine")
    if not kept:
        return []
    subjects = s.subjects("engine")
    tests = sorted({t for r in s.rounds("engine") for t in r.get("parley", ())}, key=order)
    title = {"prefill": "prefill of {}", "decode": "decode, one stream ({})", "streams": "decode, {} streams", "context": "decode, one stream at context {}"}
    rows = []
    for t in tests:
        kind, n = t.rsplit(" ", 1)
        rows.append([title[kind].format("short context" if kind == "decode" else n)] + [number(s.median("engine", None, x, t)) for x in subjects]
                    + [span(s.ratio("engine", None, t, "parley", x)) for x in (SAME_FILE, BEST)])
    lines = [f"### Engine, tok/s ({kept} of {of} rounds kept)", ""]
    lines += table(["work", *subjects, f"ratio to {SAME_FILE}", f"to {BEST}"], rows)
    return lines + shares(s, tests) + accuracy(s)


def shares(s, tests):
    """Of what the machine can do: two operations for each parameter and token, all weights read once for each step."""
    facts = s.results["facts"]
    if not facts:
        return []
    rows = []
    for t in tests:
        kind, n = t.rsplit(" ", 1)
        for subject, peak in (("parley", "int8_avx512"), ("parley avxvnni", "int8_avxvnni"), ("parley avx2", "int8_avx2")):
            v = s.median("engine", None, subject, t)
            if v is None or not s.machine.get(peak):
                continue
            used = facts["params"] - (facts["head_params"] if kind == "prefill" else 0)
            steps = v / (int(n) if kind in ("streams", "prefill") else 1)
            rows.append([t, subject, f"{2e-9 * used * v / s.machine[peak]:.0%}", f"{1e-9 * facts['weight_bytes'] * steps / s.machine['read_gbs']:.0%}"])
    lines = [f"Shares of the machine: int8 products {number(s.machine['int8_avx512'])} GOP/s (AVX-512 VNNI), "
             f"{number(s.machine.get('int8_avxvnni'))} (AVX-VNNI), {number(s.machine['int8_avx2'])} (AVX2); reading {number(s.machine['read_gbs'])} GB/s. Prefill counts no head: only the last row has one.", ""]
    return lines + table(["work", "kernels", "of the int8 peak", "of the read bandwidth"], rows)


def accuracy(s):
    kl = s.results.get("divergence")
    if not kl:
        return []
    return [f"Accuracy of this build on the default file, against a float32 reference: mean KL divergence {kl['parley']:.6f} (llama.cpp "
            f"{kl['llama.cpp']:.6f}) over {kl['positions']} positions.", ""]


def http_tables(s):
    kept, of = s.counts("http")
    if not kept:
        return []
    lines = [f"### HTTP ({kept} of {of} rounds kept)", ""]
    rows = []
    for kind in ("short", "long"):
        for n in (1, 4, 8, 16, 64):
            for x in s.subjects("http", f"{kind} {n}"):
                m = lambda t: s.median("http", f"{kind} {n}", x, t)
                rows.append([f"{kind}, {n}", x, number(m("tok_s")), number(m("first_ms.p50")), number(m("first_ms.p99")), number(m("gap_ms.p50")),
                             number(m("gap_ms.p99")), number(m("finished"), 0), number(m("failed"), 0), number(m("unfinished"), 0),
                             number(m("peak_mb"))])
    lines += table(["prompts, clients", "server", "output tok/s", "first text p50, ms", "p99", "between texts p50, ms", "p99", "finished", "failed",
                    "cut off", "peak MB"], rows)
    rows = []
    for case, test, what in (("prefix", "short_first_ms", "first text of a 20-token prompt, ms"),
                             ("prefix", "warm_first_ms", "first text of a 1,510-token prompt of which 1,500 are cached, ms"),
                             ("busy", "alone_tok_s", "four clients, output tok/s"), ("busy", "beside_tok_s", "the same beside one busy process"),
                             ("small requests", "/health", "GET /health, requests/s"), ("small requests", "/v1/models", "GET /v1/models, requests/s"),
                             ("many streams", "finished", "2,000 streams at once: finished"),
                             ("many streams", "peak_open", "… most of them unanswered at once"), ("many streams", "seconds", "… seconds"),
                             ("ready", "ready_ms", "start to ready, ms")):
        names = ("parleyd", "llama-server", "llama-server Q4_0")
        values = [s.median("http", case, x, test) for x in names]
        if values[0] is not None:
            rows.append([what, *map(number, values)])
    return lines + table(["what", "parleyd", "llama-server", "llama-server Q4_0"], rows)


def ops_tables(s):
    lines = []
    rounds = s.rounds("ops")
    if not rounds:
        return lines
    last = rounds[-1]
    for batch in last["batches"]:
        rows = [[o["op"], o["shape"], str(o["calls"]), number(o["us"], 1), f"{o['share']:.1%}", number(o["gops"]), f"{o['of_peak']:.0%}", number(o["gbs"]),
                 f"{o['of_read']:.0%}"] for o in batch["ops"]]
        lines += [f"### Operations, {batch['name']} ({number(batch['us'], 0)} µs a pass)", ""]
        lines += table(["operation", "shape", "calls", "µs", "share", "GOP/s", "of peak", "GB/s", "of reading"], rows)
    e = last["engine"]
    return lines + [f"Engine overhead at one stream: {e['overhead']:.1%} of {number(e['us'])} µs a token is not in an operation.", ""]


def markdown(s):
    host = s.results["host"]
    lines = [f"{host.get('processor', '')}, {host.get('threads', '')} threads; {host.get('model', '')}; parley {host.get('commit', '')}; {host.get('date', '')}"
             + ("; a quick run" if s.quick else ""), ""]
    lines += [f"Rejected: {r['section']} {r['case']}: {r['why']}\n" for r in s.results.get("rejected", [])]
    return "\n".join(lines + engine_tables(s) + http_tables(s) + ops_tables(s)).rstrip()


# ---- plots ------------------------------------------------------------------------------------------------------------------

COLOURS = ("#2f7ed8", "#e07b00", "#3c9f40", "#b04fc0", "#c43c3c", "#7a7a7a", "#008b8b")
STYLE = """<style>text{font:13px sans-serif;fill:#222}.a{stroke:#888;fill:none}.g{stroke:#ddd;fill:none}
@media(prefers-color-scheme:dark){text{fill:#ddd}.g{stroke:#444}}</style>"""
WIDTH, HEIGHT, LEFT, TOP, PLOT_W, PLOT_H = 760, 420, 70, 40, 480, 310


def even_ticks(top):
    """From 0 past top."""
    step = 10 ** math.floor(math.log10(top / 4)) if top > 0 else 1
    step *= next(k for k in (1, 2, 2.5, 5, 10) if step * k * 5 >= top)
    return [i * step for i in range(math.ceil(top / step) + 1)]


def log_ticks(values):
    """1, 2, 5, 10, … from below the least to above the greatest."""
    steps = [k * 10 ** e for e in range(-3, 7) for k in (1, 2, 5)]
    low = max(t for t in steps if t <= max(min(values), steps[0]))
    return [t for t in steps if t >= low and (t == low or steps[steps.index(t) - 1] < max(values))]


def plot(title, x_label, y_label, lines, log_y=False):
    """lines: {name: [(x, y)]}. The x axis doubles from tick to tick; the second line of a pair "name, p99" is dashed."""
    xs = sorted({x for points in lines.values() for x, _ in points})
    ys = [y for points in lines.values() for _, y in points]
    ticks = log_ticks(ys) if log_y else even_ticks(max(ys))
    at = (lambda y: math.log(max(y, ticks[0]) / ticks[0]) / (math.log(ticks[-1] / ticks[0]) or 1)) if log_y else (lambda y: y / ticks[-1])
    px = {x: LEFT + PLOT_W * (math.log2(x / xs[0]) / (math.log2(xs[-1] / xs[0]) or 1)) for x in xs}
    py = lambda y: TOP + PLOT_H * (1 - at(y))
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">', f"<title>{html.escape(title)}</title>", STYLE,
           f'<text x="{LEFT}" y="22" font-weight="bold">{html.escape(title)}</text>']
    for t in ticks:
        out.append(f'<path class="g" d="M{LEFT} {py(t):.1f}h{PLOT_W}"/><text x="{LEFT - 8}" y="{py(t) + 4:.1f}" text-anchor="end">{t:,.6g}</text>')
    for x in xs:
        out.append(f'<path class="a" d="M{px[x]:.1f} {TOP + PLOT_H}v5"/><text x="{px[x]:.1f}" y="{TOP + PLOT_H + 20}" text-anchor="middle">{x}</text>')
    out.append(f'<path class="a" d="M{LEFT} {TOP}v{PLOT_H}h{PLOT_W}"/>')
    out.append(f'<text x="{LEFT + PLOT_W / 2}" y="{HEIGHT - 18}" text-anchor="middle">{html.escape(x_label)}</text>')
    out.append(f'<text transform="translate(16 {TOP + PLOT_H / 2}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>')
    owners = list(dict.fromkeys(name.split(", p")[0] for name in lines))
    for i, (name, points) in enumerate(lines.items()):
        colour = COLOURS[owners.index(name.split(", p")[0]) % len(COLOURS)]
        dash = ' stroke-dasharray="5 4"' if name.endswith("p99") else ""
        path = "".join(f"{'L' if k else 'M'}{px[x]:.1f} {py(y):.1f}" for k, (x, y) in enumerate(points))
        out.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        out += [f'<circle cx="{px[x]:.1f}" cy="{py(y):.1f}" r="3" fill="{colour}"/>' for x, y in points]
        y = TOP + 10 + 20 * i
        out.append(f'<path d="M{LEFT + PLOT_W + 16} {y}h22" stroke="{colour}" stroke-width="3"{dash}/>'
                   f'<text x="{LEFT + PLOT_W + 44}" y="{y + 4}">{html.escape(name)}</text>')
    return "\n".join(out + ["</svg>", ""])


def series(s, section, subjects, case, test):
    """{subject: points} over the counts for which there are figures; case and test may hold {}."""
    lines = {}
    for x in subjects:
        points = [(n, s.median(section, case and case.format(n), x, test.format(n))) for n in (1, 2, 4, 8, 16, 32, 64)]
        points = [p for p in points if p[1] is not None]
        if len(points) > 1:
            lines[x] = points
    return lines


def write_below(path, text):
    """The whole file, or what is below its mark."""
    before, mark, _ = path.read_text().partition(MARK) if path.exists() else ("", "", "")
    path.write_text(f"{before}{mark}\n\n{text}" if mark else text)


def plots(s, beside):
    """Writes NAME-….svg next to NAME.md; [(file name, title)]."""
    servers = ("parleyd", "llama-server", "llama-server Q4_0")
    wanted = [("engine", "Decode: all streams together", "streams", "tok/s", series(s, "engine", s.subjects("engine"), None, "streams {}"))]
    for kind, length in (("short", 20), ("long", "1,000")):
        name = f"prompts of {length} tokens"
        case = kind + " {}"
        wanted.append((f"http-{kind}", f"Output over HTTP, {name}", "clients", "tok/s", series(s, "http", servers, case, "tok_s")))
        latency = {}
        for p in ("p50", "p99"):
            latency.update({f"{k}, {p}": v for k, v in series(s, "http", servers, case, f"first_ms.{p}").items()})
        wanted.append((f"first-{kind}", f"Time to the first text, {name}", "clients", "ms", latency))
        gaps = {}
        for p in ("p50", "p99"):
            gaps.update({f"{k}, {p}": v for k, v in series(s, "http", servers, case, f"gap_ms.{p}").items()})
        wanted.append((f"gap-{kind}", f"Time between texts, {name}", "clients", "ms", gaps))
    written = []
    for name, title, x, y, lines in wanted:
        if lines:
            file = beside.with_name(f"{beside.stem}-{name}.svg")
            file.write_text(plot(title, x, y, lines, log_y=y == "ms"))
            written.append((file.name, title))
    return written
