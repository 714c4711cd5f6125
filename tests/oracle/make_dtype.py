#!/usr/bin/env python3
"""Writes fixtures/dtype/blocks.bin, which tests/unit/check_dtype.c reads: random blocks of every tensor type with the
values that the gguf package's own dequantization gives, and sample values with that package's quantization error.

    make_dtype.py [--check]     --check: compares anew with the committed file and writes nothing

The file, little-endian: u32 records; each record: u32 type, u32 elements, u32 bytes, the blocks, f32 values; then
u32 samples, f32 samples, u32 errors; each error: u32 type, f32 root mean square error. Needs numpy and gguf."""
import argparse
import pathlib
import struct
import sys

import gguf
import numpy as np
from gguf import quants

FILE = pathlib.Path(__file__).parent / "fixtures" / "dtype" / "blocks.bin"
TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
SAMPLES = 2048


def blocks(rng, name, n):
    """n blocks of random bits; the scales are ordinary numbers, the first block's zero."""
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    data = rng.integers(0, 256, (n, size), dtype=np.uint8)
    for at in HALVES.get(name, []):
        scale = rng.normal(0, 0.1, n).astype(np.float16)
        scale[0] = 0
        data[:, at:at + 2] = scale.view(np.uint8).reshape(n, 2)
    if name == "F32":
        data = rng.normal(0, 1, n).astype(np.float32).view(np.uint8).reshape(n, 4)
    if name == "F16":  # subnormals and the largest too, but no infinities: their values are tested in C
        data = (rng.integers(0, 0x7C00, n, dtype=np.uint16) | rng.integers(0, 2, n, dtype=np.uint16) << 15).view(np.uint8).reshape(n, 2)
    if name == "BF16":
        data = (rng.integers(0, 0x7F80, n, dtype=np.uint16) | rng.integers(0, 2, n, dtype=np.uint16) << 15).view(np.uint8).reshape(n, 2)
    return data


def make():
    rng = np.random.default_rng(20261124)
    out = struct.pack("<I", len(TYPES))
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        per, _ = gguf.GGML_QUANT_SIZES[kind]
        data = blocks(rng, name, 3 if per == 256 else 8 if per == 32 else 64)
        values = quants.dequantize(data.reshape(-1), kind).astype("<f4").reshape(-1)
        out += struct.pack("<III", int(kind), values.size, data.size) + data.tobytes() + values.tobytes()
    samples = (rng.normal(0, 1, SAMPLES) * np.repeat(rng.uniform(0.01, 2, SAMPLES // 32), 32)).astype("<f4")
    errors = b""
    count = 0
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        try:
            back = quants.dequantize(quants.quantize(samples, kind), kind).reshape(-1)
        except NotImplementedError:
            continue  # the package cannot write K-quants
        errors += struct.pack("<If", int(kind), np.sqrt(np.mean((back.astype(np.float64) - samples) ** 2)))
        count += 1
    return out + struct.pack("<I", SAMPLES) + samples.tobytes() + struct.pack("<I", count) + errors


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--check", action="store_true")
    data = make()
    if args.parse_args().check:
        same = FILE.read_bytes() == data
        print("dtype fixtures:", "equal" if same else "DIFFERENT")
        sys.exit(not same)
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_bytes(data)


if __name__ == "__main__":
    main()
