#!/usr/bin/env python3
"""The speed of transformers on a made-up Llama with random weights, for comparison with `parley bench`: a prompt's tokens per second, and
those of a batch of sequences that generate. PyTorch's scaled_dot_product_attention, or FlashAttention where the package is there,
whichever is faster. Prints a JSON object; run by tests/gpu/run.
SPDX-License-Identifier: Apache-2.0
"""
import argparse
import importlib.util
import json
import statistics
import sys
import time

try:
    import torch
    import transformers
except ImportError:
    sys.exit(3)

# as core/model/dummy.h has them: layers, width, query heads, key/value heads, head width, feed-forward width, vocabulary
SHAPES = {"tiny": (2, 256, 4, 2, 64, 512, 512), "8B": (32, 4096, 32, 8, 128, 14336, 128256)}


def make(shape, attention, device):
    layers, width, heads, kv_heads, head, forward, vocabulary = SHAPES[shape]
    config = transformers.LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head, intermediate_size=forward,
        vocab_size=vocabulary, max_position_embeddings=8192, tie_word_embeddings=False, attn_implementation=attention)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def seconds(device, what, *args):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.monotonic()
    what(*args)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - start


@torch.inference_mode()
def measure(args, attention, device):
    model = make(args.shape, attention, device)
    vocabulary = model.config.vocab_size

    def tokens(rows, n):
        return torch.randint(0, vocabulary, (rows, n), device=device)

    prompt = tokens(1, args.prompt)

    def filled():
        cache = transformers.DynamicCache(config=model.config)
        for _ in range(0, args.context, 128):
            model(tokens(args.batch, 128), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def decode(cache):
        ids = tokens(args.batch, 1)
        for _ in range(args.gen):
            ids = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)

    rounds = range(args.repeat + 1)  # the first is not counted
    prefill = [seconds(device, lambda: model(prompt, use_cache=True, logits_to_keep=1)) for _ in rounds]
    decoding = [seconds(device, decode, filled()) for _ in rounds]
    return {"attention": attention, "prefill_tok_s": args.prompt / statistics.median(prefill[1:]),
            "decode_tok_s": args.batch * args.gen / statistics.median(decoding[1:])}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    for name, value in (("prompt", 2048), ("batch", 64), ("context", 512), ("gen", 32), ("repeat", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = ["sdpa"] + (["flash_attention_2"] if device == "cuda" and importlib.util.find_spec("flash_attn") else [])
    runs = [measure(args, kind, device) for kind in kinds]
    best = {key: max(r[key] for r in runs) for key in ("prefill_tok_s", "decode_tok_s")}
    print(json.dumps({"device": device, "torch": torch.__version__, "transformers": transformers.__version__, **best, "runs": runs}))


main()
