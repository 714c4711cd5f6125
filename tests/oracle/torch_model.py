# torch_model: a GGUF model as a float32 model of the transformers library, from tensors that the gguf package de-quantizes.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


class File:
    """Keys and float32 tensors of a GGUF file; a tensor is taken out once, so that what is left over shows."""

    def __init__(self, path):
        self.reader = GGUFReader(path)
        self.left = {t.name: t for t in self.reader.tensors}

    def key(self, name, default=None):
        field = self.reader.fields.get(name)
        return default if field is None else field.contents()

    def take(self, name):
        t = self.left.pop(name, None)
        if t is None:
            return None
        return torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), dtype=np.float32))


def halves_from_pairs(w, n_heads):
    """GGUF's llama files hold the rows of q and k so that rotation pairs are neighbours; transformers wants them half a
    head apart. Works for weights [rows, cols] and biases [rows]."""
    head = w.shape[0] // n_heads
    return w.reshape(n_heads, head // 2, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape).contiguous()


def fill(model, values):
    """Loads values strictly, but for a tied head, which has no values of its own."""
    missing, extra = model.load_state_dict({k: v for k, v in values.items() if v is not None}, strict=False)
    assert not extra, extra
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(missing) <= tied, missing


def llama(f):
    L = f.key("llama.block_count")
    heads, kv = f.key("llama.attention.head_count"), f.key("llama.attention.head_count_kv")
    embed, head = f.take("token_embd.weight"), f.take("output.weight")
    factors = f.take("rope_freqs.weight")
    layers, biased = {}, "blk.0.attn_q.bias" in f.left
    for i in range(L):
        src, dst = f"blk.{i}.", f"model.layers.{i}."
        layers[dst + "input_layernorm.weight"] = f.take(src + "attn_norm.weight")
        layers[dst + "post_attention_layernorm.weight"] = f.take(src + "ffn_norm.weight")
        for kind in ("weight", "bias") if biased else ("weight",):
            layers[dst + "self_attn.q_proj." + kind] = halves_from_pairs(f.take(src + "attn_q." + kind), heads)
            layers[dst + "self_attn.k_proj." + kind] = halves_from_pairs(f.take(src + "attn_k." + kind), kv)
            for a, b in (("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"), ("ffn_gate", "mlp.gate_proj"),
                         ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")):
                layers[f"{dst}{b}.{kind}"] = f.take(f"{src}{a}.{kind}")
    scaling = f.key("llama.rope.scaling.type")
    rope = {"rope_type": "default", "rope_theta": f.key("llama.rope.freq_base", 10000.0)}
    if scaling == "linear":
        rope = {"rope_type": "linear", "rope_theta": rope["rope_theta"], "factor": f.key("llama.rope.scaling.factor")}
    config = LlamaConfig(
        vocab_size=embed.shape[0], hidden_size=embed.shape[1], num_hidden_layers=L, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=f.key("llama.attention.key_length", embed.shape[1] // heads),
        intermediate_size=f.key("llama.feed_forward_length"), max_position_embeddings=f.key("llama.context_length"),
        rms_norm_eps=f.key("llama.attention.layer_norm_rms_epsilon"), rope_parameters=rope, attention_bias=biased,
        mlp_bias=biased, tie_word_embeddings=head is None, attn_implementation="eager", bos_token_id=None, eos_token_id=None)
    model = LlamaForCausalLM(config).float().eval()
    fill(model, {"model.embed_tokens.weight": embed, "lm_head.weight": head, **layers,
                 "model.norm.weight": f.take("output_norm.weight")})
    if factors is not None:  # the file carries them per pair, as transformers would have computed them from its own keys
        model.model.rotary_emb.inv_freq /= factors
    return model


def gpt2(f):
    L = f.key("gpt2.block_count")
    embed, position, head = f.take("token_embd.weight"), f.take("position_embd.weight"), f.take("output.weight")
    values = {"transformer.wte.weight": embed, "transformer.wpe.weight": position, "lm_head.weight": head}
    for kind in ("weight", "bias"):
        values["transformer.ln_f." + kind] = f.take("output_norm." + kind)
    for i in range(L):
        src, dst = f"blk.{i}.", f"transformer.h.{i}."
        for a, b, transposed in (("attn_norm", "ln_1", False), ("attn_qkv", "attn.c_attn", True), ("ffn_norm", "ln_2", False),
                                 ("attn_output", "attn.c_proj", True), ("ffn_up", "mlp.c_fc", True), ("ffn_down", "mlp.c_proj", True)):
            w = f.take(f"{src}{a}.weight")
            values[f"{dst}{b}.weight"] = w.T.contiguous() if transposed else w
            values[f"{dst}{b}.bias"] = f.take(f"{src}{a}.bias")
    config = GPT2Config(
        vocab_size=embed.shape[0], n_positions=position.shape[0], n_embd=embed.shape[1], n_layer=L,
        n_head=f.key("gpt2.attention.head_count"), n_inner=f.key("gpt2.feed_forward_length"),
        layer_norm_epsilon=f.key("gpt2.attention.layer_norm_epsilon"), activation_function="gelu_new",
        tie_word_embeddings=head is None, attn_implementation="eager", bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config).float().eval()
    fill(model, values)
    return model


def load(path):
    f = File(path)
    model = {"llama": llama, "gpt2": gpt2}[f.key("general.architecture")](f)
    assert not f.left, f"tensors not used: {sorted(f.left)}"
    return model
