"""The engine alone: prefill, decode by number of streams, decode by context, in turn with the peers.
SPDX-License-Identifier: Apache-2.0
"""
import re
import subprocess

from peers import ROOT, Parley, Peer, quantize, say

PROMPTS, STREAMS, CONTEXT = (128, 512), (1, 2, 4, 8, 16, 32, 64), 16
LENGTHS, LAST_GEN = (512, 2048, 4096), 32  # and the model's whole context less LAST_GEN tokens


def subjects(args):
    """All that is compared: parley with its best kernels and with those of lesser processors, each peer with the same file and with Q4_0."""
    best = quantize(args.llamacpp, args.model, "Q4_0")
    out = [Parley("parley", args.parley, args.model, args.threads)]
    out += [Parley(f"parley {isa}", args.parley, args.model, args.threads, isa) for isa in ("avxvnni", "avx2")]
    for name, folder in {"llama.cpp": args.llamacpp, **args.peer}.items():
        out += [Peer(name, folder, args.model, args.threads), Peer(f"{name} Q4_0", folder, best, args.threads, repack=True)]
    return out


def in_turn(args, index, measure):
    """{subject: {test: tok/s}}; the order alternates from round to round."""
    found = {}
    for s in subjects(args)[::-1 if index % 2 else 1]:
        speed = measure(s)
        if speed:
            found[s.name] = speed
        if s.name == "parley":
            args.facts.update(s.facts)
    return found


def prompts(args, index):
    return in_turn(args, index, lambda s: s.prefill_and_one(PROMPTS, 32 if args.quick else 64))


def streams(args, index):
    counts = [n for n in STREAMS if n in (1, 16, 64) or not args.quick]
    return in_turn(args, index, lambda s: {f"streams {k.split()[1]}": v for k, v in s.streams(counts, CONTEXT, 16 if args.quick else 32).items()})


def contexts(args, index):
    lengths = [CONTEXT, *LENGTHS, args.context - LAST_GEN]
    return in_turn(args, index, lambda s: s.contexts(lengths, LAST_GEN) if s.name == "parley" else None)


def cases(args):
    """Name -> case. A case is short, so that the machine is the same before and after it."""
    return {"prompts": prompts, "streams": streams, **({} if args.quick else {"contexts": contexts})}


def one_round(args, case, index):
    found = case(args, index)
    for test in ("prefill 512", "decode 1", "streams 16", "context 4096"):
        if test in found["parley"]:
            say(f"{test}: " + ", ".join(f"{name} {v[test]:.0f}" for name, v in found.items()))
    return found


def divergence(model):
    """Mean KL divergence against a float32 reference, of parley and llama.cpp, as the unit tests find it; None without them."""
    unit = ROOT / "build/release/unit"
    if not unit.exists():
        return None
    out = subprocess.run([unit], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, timeout=200,
                         env={"CK_RUN_SUITE": "model", "PARLEY_TEST_MODEL": str(model)}).stdout
    found = re.search(r"mean KL ([\d.]+) \(llama\.cpp ([\d.]+)\) over (\d+) positions", out)
    return {"parley": float(found[1]), "llama.cpp": float(found[2]), "positions": int(found[3])} if found else None
