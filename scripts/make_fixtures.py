#!/usr/bin/env python3
"""Makes the random-weight pico models of `fixtures/`, and golden logits for these and for the trained one.

    python scripts/make_fixtures.py                  # writes every folder
    python scripts/make_fixtures.py pico-llama       # only this one
    python scripts/make_fixtures.py --check          # compares with what is committed, writes nothing; exit 1 if they differ

Weights come from seeded numpy generators, one per tensor, so adding a tensor or a model never changes the others. The
golden logits come from stock transformers loading the folder just as a user would, in float32 with eager attention.

Scales are chosen so that mistakes show: attention logits spread over several units (uniform attention would hide an
error in queries, keys or positions), norm weights and biases are visibly off one and zero, and inputs of the norms are
small enough for the epsilon to matter.
"""

import argparse
import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
SEED = 8128
LENGTHS = (37, 24)
# Between two machines or two releases of the same maths in float32, relative to the largest value of the tensor.
TOLERANCE = 2e-5
QUERY_KEY_SCALE = 1.6
EMBED_STD = 0.12
BIAS_STD = 0.3
# Routers have to tell experts apart, or the choice hangs on rounding.
ROUTER_SCALE = 3.0


class Weights:
    """The tensors of one model, each drawn from a generator seeded by the model's and the tensor's name."""

    def __init__(self, model: str, dtype: torch.dtype):
        self.model, self.dtype, self.tensors = model, dtype, {}

    def normal(self, name: str, shape, std: float, mean: float = 0.0, row_scale=None) -> None:
        rng = np.random.default_rng([SEED, zlib.crc32(self.model.encode()), zlib.crc32(name.encode())])
        value = rng.standard_normal(shape) * std + mean
        if row_scale is not None:
            value *= np.asarray(row_scale).reshape(-1, *[1] * (value.ndim - 1))
        self.tensors[name] = torch.from_numpy(value.astype(np.float32)).to(self.dtype)

    def linear(self, name: str, out: int, inp: int, gain: float = 1.0, bias: bool = False, row_scale=None) -> None:
        self.normal(f"{name}.weight", (out, inp), gain * inp**-0.5, row_scale=row_scale)
        if bias:
            self.normal(f"{name}.bias", (out,), BIAS_STD, row_scale=row_scale)

    def norm(self, name: str, size: int, mean: float = 1.0) -> None:
        self.normal(f"{name}.weight", (size,), 0.2, mean=mean)


def common(w: Weights, c: dict, norms=("input_layernorm", "post_attention_layernorm"), mlp=None, mean=1.0) -> None:
    """Embedding, norms, MLPs, final norm and head; `mlp(w, c, i)` writes what is no plain gated MLP."""
    hidden = c["hidden_size"]
    w.normal("model.embed_tokens.weight", (c["vocab_size"], hidden), EMBED_STD)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for norm in norms:
            w.norm(f"{layer}.{norm}", hidden, mean)
        (mlp or plain_mlp)(w, c, i)
    w.norm("model.norm", hidden, mean)
    if not c["tie_word_embeddings"]:
        w.linear("lm_head", c["vocab_size"], hidden)


def gated_mlp(w: Weights, stem: str, hidden: int, inner: int, names=("gate_proj", "up_proj", "down_proj")) -> None:
    w.linear(f"{stem}.{names[0]}", inner, hidden)
    w.linear(f"{stem}.{names[1]}", inner, hidden)
    w.linear(f"{stem}.{names[2]}", hidden, inner, 0.7)


def plain_mlp(w: Weights, c: dict, i: int) -> None:
    gated_mlp(w, f"model.layers.{i}.mlp", c["hidden_size"], c["intermediate_size"])


def mixtral_mlp(w: Weights, c: dict, i: int) -> None:
    stem, hidden = f"model.layers.{i}.block_sparse_moe", c["hidden_size"]
    w.linear(f"{stem}.gate", c["num_local_experts"], hidden, ROUTER_SCALE)
    for e in range(c["num_local_experts"]):
        gated_mlp(w, f"{stem}.experts.{e}", hidden, c["intermediate_size"], ("w1", "w3", "w2"))


def expert_mlp(w: Weights, c: dict, i: int) -> None:
    """Qwen and DeepSeek layouts."""
    if i in c.get("mlp_only_layers", ()) or i < c.get("first_k_dense_replace", 0):
        return plain_mlp(w, c, i)
    stem, hidden, inner = f"model.layers.{i}.mlp", c["hidden_size"], c["moe_intermediate_size"]
    experts = c.get("num_experts") or c["n_routed_experts"]
    w.linear(f"{stem}.gate", experts, hidden, ROUTER_SCALE)
    if c.get("topk_method") == "noaux_tc":
        # As large as the differences between scores, so that leaving it out, or weighting by it, shows.
        w.normal(f"{stem}.gate.e_score_correction_bias", (experts,), 0.2)
        w.tensors[f"{stem}.gate.e_score_correction_bias"] = w.tensors[f"{stem}.gate.e_score_correction_bias"].float()
    for e in range(experts):
        gated_mlp(w, f"{stem}.experts.{e}", hidden, inner)
    if "shared_expert_intermediate_size" in c:
        gated_mlp(w, f"{stem}.shared_expert", hidden, c["shared_expert_intermediate_size"])
        w.linear(f"{stem}.shared_expert_gate", 1, hidden, ROUTER_SCALE)
    if c.get("n_shared_experts"):
        gated_mlp(w, f"{stem}.shared_experts", hidden, inner * c["n_shared_experts"])


def head_norms(w: Weights, c: dict, wide: int, narrow: int) -> None:
    for i in range(c["num_hidden_layers"]):
        w.norm(f"model.layers.{i}.self_attn.q_norm", wide)
        w.norm(f"model.layers.{i}.self_attn.k_norm", narrow)


def phi3(w: Weights, c: dict) -> None:
    hidden, heads, groups = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    d, inner = hidden // heads, c["intermediate_size"]
    rows = np.concatenate([np.full((heads + groups) * d, QUERY_KEY_SCALE), np.ones(groups * d)])
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        w.linear(f"{layer}.self_attn.qkv_proj", (heads + 2 * groups) * d, hidden, row_scale=rows)
        w.linear(f"{layer}.self_attn.o_proj", hidden, heads * d)


def phi3_mlp(w: Weights, c: dict, i: int) -> None:
    stem, hidden, inner = f"model.layers.{i}.mlp", c["hidden_size"], c["intermediate_size"]
    w.linear(f"{stem}.gate_up_proj", 2 * inner, hidden)
    w.linear(f"{stem}.down_proj", hidden, inner, 0.7)


def grouped(w: Weights, c: dict, qkv_bias: bool = False, o_bias: bool = False) -> None:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    groups = c.get("num_key_value_heads", heads)
    d = c.get("head_dim", hidden // heads)
    for i in range(c["num_hidden_layers"]):
        attn = f"model.layers.{i}.self_attn"
        w.linear(f"{attn}.q_proj", heads * d, hidden, QUERY_KEY_SCALE, qkv_bias)
        w.linear(f"{attn}.k_proj", groups * d, hidden, QUERY_KEY_SCALE, qkv_bias)
        w.linear(f"{attn}.v_proj", groups * d, hidden, 1.0, qkv_bias)
        w.linear(f"{attn}.o_proj", hidden, heads * d, 1.0, o_bias)


def plain_relu2_mlp(w: Weights, c: dict, i: int) -> None:
    stem, hidden, inner = f"model.layers.{i}.mlp", c["hidden_size"], c["intermediate_size"]
    w.linear(f"{stem}.up_proj", inner, hidden)
    w.linear(f"{stem}.down_proj", hidden, inner, 0.7)


def mtp_layer(w: Weights, c: dict) -> None:
    """Some tensors of the layer that predicts a further token, which nobody runs here: they have to be read past."""
    layer, hidden = f"model.layers.{c['num_hidden_layers']}", c["hidden_size"]
    for norm in ("enorm", "hnorm", "input_layernorm", "shared_head.norm"):
        w.norm(f"{layer}.{norm}", hidden)
    w.linear(f"{layer}.eh_proj", hidden, 2 * hidden)


def latent(w: Weights, c: dict) -> None:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    nope, rope, v, r = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"], c["kv_lora_rank"]
    bias = c["attention_bias"]
    # The latents are small before their norms, where the class uses an epsilon of 1e-6 whatever `rms_norm_eps` says: a
    # reader who passes the configured epsilon to these norms is off by half a per cent.
    down = np.concatenate([np.full(r, 0.03), np.full(rope, QUERY_KEY_SCALE)])
    # Of each head's rows in kv_b, the first `nope` make keys and the others values.
    up = np.tile(np.concatenate([np.full(nope, QUERY_KEY_SCALE), np.ones(v)]), heads)
    for i in range(c["num_hidden_layers"]):
        attn = f"model.layers.{i}.self_attn"
        if c["q_lora_rank"] is None:
            w.linear(f"{attn}.q_proj", heads * (nope + rope), hidden, QUERY_KEY_SCALE)
        else:
            w.linear(f"{attn}.q_a_proj", c["q_lora_rank"], hidden, 1.0, bias, np.full(c["q_lora_rank"], 0.03))
            w.norm(f"{attn}.q_a_layernorm", c["q_lora_rank"])
            w.linear(f"{attn}.q_b_proj", heads * (nope + rope), c["q_lora_rank"], QUERY_KEY_SCALE)
        w.linear(f"{attn}.kv_a_proj_with_mqa", r + rope, hidden, 1.0, bias, down)
        w.norm(f"{attn}.kv_a_layernorm", r)
        w.linear(f"{attn}.kv_b_proj", heads * (nope + v), r, 1.0, False, up)
        w.linear(f"{attn}.o_proj", hidden, heads * v, 1.0, bias)


def config(architecture: str, model_type: str, dtype_key: str, dtype: str, **fields) -> dict:
    """`dtype_key` is `torch_dtype` in checkpoints saved before transformers 5 and `dtype` in newer ones."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        dtype_key: dtype,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
        **fields,
    }


def deepseek(dtype: str, **fields) -> dict:
    """Every layer dense: the experts are described, as the class wants, and none is ever built."""
    layers = fields["num_hidden_layers"]
    return config(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        "torch_dtype",
        dtype,
        first_k_dense_replace=layers,
        moe_layer_freq=1,
        moe_intermediate_size=16,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        num_nextn_predict_layers=0,
        pretraining_tp=1,
        rope_interleave=True,
        **fields,
    )


LONGROPE = [1.0, 1.7, 0.6, 3.2]

FOUR_NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
)
SHORT, LONG = [1.0, 1.2, 1.5, 2.0, 2.5, 3.1], [1.0, 1.4, 2.5, 4.0, 7.0, 9.5]

# name -> (config, attention tensors, number of shards[, what `common` takes])
MODELS = {
    # Heads times head_dim (48) differs from the hidden size, which transformers still wants to be a multiple of the heads.
    # The config keys are those of most checkpoints on the hub.
    "pico-llama": (
        config(
            "LlamaForCausalLM", "llama", "torch_dtype", "float32",
            vocab_size=131, hidden_size=42, intermediate_size=72, num_hidden_layers=2,
            num_attention_heads=6, num_key_value_heads=2, head_dim=8,
            max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True,
            attention_bias=False, mlp_bias=False, pretraining_tp=1,
            rope_theta=10000.0, rope_scaling=None,
        ),
        lambda w, c: grouped(w, c),
        1,
    ),
    # llama3 scaling whose three bands all hold some of the eight frequencies, and biases on all four projections.
    "pico-llama3": (
        config(
            "LlamaForCausalLM", "llama", "torch_dtype", "bfloat16",
            vocab_size=128, hidden_size=56, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=False,
            attention_bias=True, mlp_bias=False, pretraining_tp=1,
            rope_theta=500.0,
            rope_scaling={
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
        lambda w, c: grouped(w, c, qkv_bias=True, o_bias=True),
        2,
    ),
    # Multi-query attention, config in the form that transformers 5 writes.
    "pico-mistral": (
        config(
            "MistralForCausalLM", "mistral", "dtype", "float32",
            vocab_size=120, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=1, head_dim=16,
            max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False,
            sliding_window=None,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
        lambda w, c: grouped(w, c),
        1,
    ),
    # Biases on queries, keys and values but not on the output, and no `head_dim`, as the family has it.
    "pico-qwen2": (
        config(
            "Qwen2ForCausalLM", "qwen2", "torch_dtype", "bfloat16",
            vocab_size=151, hidden_size=56, intermediate_size=88, num_hidden_layers=3,
            num_attention_heads=7, num_key_value_heads=1,
            max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=True,
            use_sliding_window=False, sliding_window=128, max_window_layers=3,
            rope_theta=1000000.0,
        ),
        lambda w, c: grouped(w, c, qkv_bias=True),
        1,
    ),
    # As many key/value heads as query heads, said by leaving the key out; the oldest spelling of YaRN (`type`).
    "pico-mha": (
        config(
            "LlamaForCausalLM", "llama", "torch_dtype", "float32",
            vocab_size=101, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=False,
            rope_theta=10000.0,
            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        lambda w, c: grouped(w, c),
        1,
    ),
    # Stock MLA, nothing special: full-rank queries, no bias, plain frequencies.
    "pico-deepseek-v3": (
        deepseek(
            "float32",
            vocab_size=113, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4,
            q_lora_rank=None, kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10,
            max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False, attention_bias=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        latent,
        1,
    ),
    # Everything the class offers a converter: low-rank queries, biases, and one frequency per rotary pair of its own
    # through LongRoPE factors that change nothing else.
    "pico-deepseek-v3-bias": (
        deepseek(
            "float32",
            vocab_size=113, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4,
            q_lora_rank=28, kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12,
            max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True, attention_bias=True,
            rope_theta=10000.0,
            rope_scaling={
                "rope_type": "longrope", "short_factor": LONGROPE, "long_factor": LONGROPE,
                "attention_factor": 1.0, "factor": 1.0, "original_max_position_embeddings": 128,
            },
        ),
        latent,
        1,
    ),
}


MODELS |= {
    # A norm on every query and key head; heads that do not make up the hidden size.
    "pico-qwen3": (
        config(
            "Qwen3ForCausalLM", "qwen3", "torch_dtype", "float32",
            vocab_size=97, hidden_size=40, intermediate_size=56, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=True,
            attention_bias=False, use_sliding_window=False, sliding_window=None, max_window_layers=2,
            rope_theta=1000000.0, rope_scaling=None,
        ),
        lambda w, c: (grouped(w, c), head_norms(w, c, 16, 16)),
        1,
    ),
    # Two experts of four, their weights made to sum to one.
    "pico-mixtral": (
        config(
            "MixtralForCausalLM", "mixtral", "torch_dtype", "bfloat16",
            vocab_size=101, hidden_size=48, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=6, num_key_value_heads=2,
            max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False,
            sliding_window=None, rope_theta=1000000.0,
            num_local_experts=4, num_experts_per_tok=2, output_router_logits=False, router_aux_loss_coef=0.02,
        ),
        lambda w, c: grouped(w, c),
        2,
        {"mlp": mixtral_mlp},
    ),
    # One dense layer, then experts beside one that sees every token behind a gate; weights left as the softmax has them.
    "pico-qwen2-moe": (
        config(
            "Qwen2MoeForCausalLM", "qwen2_moe", "torch_dtype", "bfloat16",
            vocab_size=96, hidden_size=48, intermediate_size=56, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=False,
            use_sliding_window=False, sliding_window=64, max_window_layers=2, rope_theta=1000000.0,
            num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=32,
            decoder_sparse_step=1, mlp_only_layers=[0], norm_topk_prob=False,
        ),
        lambda w, c: grouped(w, c, qkv_bias=True),
        1,
        {"mlp": expert_mlp},
    ),
    "pico-qwen3-moe": (
        config(
            "Qwen3MoeForCausalLM", "qwen3_moe", "torch_dtype", "bfloat16",
            vocab_size=96, hidden_size=40, intermediate_size=56, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=1, head_dim=16,
            max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=False,
            attention_bias=False, use_sliding_window=False, sliding_window=None, rope_theta=1000000.0,
            num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24,
            decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True,
        ),
        lambda w, c: (grouped(w, c), head_norms(w, c, 16, 16)),
        1,
        {"mlp": expert_mlp},
    ),
    # Caps low enough to bend what they cap, and a window shorter than the longer sequence.
    "pico-gemma2": (
        config(
            "Gemma2ForCausalLM", "gemma2", "torch_dtype", "float32",
            vocab_size=99, hidden_size=40, intermediate_size=56, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=12,
            max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=True,
            attention_bias=False, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=24,
            sliding_window=9, attn_logit_softcapping=4.0, final_logit_softcapping=3.0, rope_theta=10000.0,
        ),
        lambda w, c: grouped(w, c),
        1,
        {"norms": FOUR_NORMS, "mean": 0.0},
    ),
    # Fused projections, three quarters of a head rotated, and the first of two lists of frequencies.
    "pico-phi3": (
        config(
            "Phi3ForCausalLM", "phi3", "torch_dtype", "float32",
            vocab_size=103, hidden_size=64, intermediate_size=56, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=256, original_max_position_embeddings=64, rms_norm_eps=1e-5,
            tie_word_embeddings=True, pad_token_id=0, partial_rotary_factor=0.75, sliding_window=None, rope_theta=10000.0,
            rope_scaling={"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
        ),
        phi3,
        1,
        {"mlp": phi3_mlp},
    ),
    # The second list: both sequences are longer than the original context.
    "pico-phi3-long": (
        config(
            "Phi3ForCausalLM", "phi3", "torch_dtype", "bfloat16",
            vocab_size=103, hidden_size=64, intermediate_size=56, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=128, original_max_position_embeddings=16, rms_norm_eps=1e-5,
            tie_word_embeddings=False, pad_token_id=0, partial_rotary_factor=0.75, sliding_window=None, rope_theta=10000.0,
            rope_scaling={"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
        ),
        phi3,
        1,
        {"mlp": phi3_mlp},
    ),
    # Norms behind attention and MLP, none before, and one over all queries and one over all keys.
    "pico-olmo2": (
        config(
            "Olmo2ForCausalLM", "olmo2", "torch_dtype", "float32",
            vocab_size=95, hidden_size=48, intermediate_size=56, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=False,
            attention_bias=False, rope_theta=500000.0, rope_scaling=None,
        ),
        lambda w, c: (grouped(w, c), head_norms(w, c, 48, 24)),
        1,
        {"norms": ("post_attention_layernorm", "post_feedforward_layernorm")},
    ),
    "pico-granite": (
        config(
            "GraniteForCausalLM", "granite", "torch_dtype", "bfloat16",
            vocab_size=105, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=6, num_key_value_heads=2,
            max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True,
            attention_bias=True, mlp_bias=False, rope_theta=10000.0, rope_scaling=None,
            embedding_multiplier=6.0, residual_multiplier=0.3, attention_multiplier=0.25, logits_scaling=4.0,
        ),
        lambda w, c: grouped(w, c, qkv_bias=True, o_bias=True),
        1,
    ),
}

MODELS |= {
    # The other stock classes that hold MLA: experts by softmax with one for every token, split pairs with multipliers, and
    # a dense class of its own.
    "pico-deepseek-v2": (
        {
            **deepseek(
                "float32",
                vocab_size=93, hidden_size=40, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=4,
                q_lora_rank=None, kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
                max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=False, attention_bias=False,
                rope_theta=10000.0, rope_scaling=None,
            ),
            "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "first_k_dense_replace": 1,
            "n_routed_experts": 5, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False,
        },
        latent,
        1,
        {"mlp": expert_mlp},
    ),
    "pico-minicpm3": (
        config(
            "MiniCPM3ForCausalLM", "minicpm3", "torch_dtype", "float32",
            vocab_size=91, hidden_size=40, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, pad_token_id=0,
            q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
            max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False, attention_bias=True,
            scale_emb=3, scale_depth=0.9, dim_model_base=10, rope_theta=10000.0, rope_scaling=None,
        ),
        latent,
        1,
    ),
    "pico-youtu": (
        config(
            "YoutuForCausalLM", "youtu", "torch_dtype", "float32",
            vocab_size=89, hidden_size=40, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4,
            q_lora_rank=None, kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12,
            max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=True, attention_bias=True,
            rope_interleave=True, rope_theta=10000.0, rope_scaling=None,
        ),
        latent,
        1,
    ),
}

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

MODELS |= {
    # Experts of the two best of four groups by their best expert, YaRN whose softmax factor is on and whose amplitude is
    # one, as DeepSeek-V2 is published.
    "pico-deepseek-v2-groups": (
        {
            **deepseek(
                "bfloat16",
                vocab_size=87, hidden_size=40, intermediate_size=48, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=4,
                q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=12, v_head_dim=8,
                max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=False, attention_bias=False,
                rope_theta=100.0,
                rope_scaling={
                    "type": "yarn", "factor": 4.0, "mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 4,
                    "beta_slow": 1, "original_max_position_embeddings": 32,
                },
            ),
            "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "first_k_dense_replace": 1,
            "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
            "topk_method": "group_limited_greedy", "scoring_func": "softmax", "norm_topk_prob": False,
            "routed_scaling_factor": 1.6,
        },
        latent,
        1,
        {"mlp": expert_mlp},
    ),
    # Everything of DeepSeek-V3's router (sigmoid, a bias for the choice, groups by their two best experts, weights made to
    # sum to one and scaled), YaRN with an amplitude and a softmax factor of its own, and a layer behind the last.
    "pico-deepseek-v3-moe": (
        {
            **deepseek(
                "bfloat16",
                vocab_size=85, hidden_size=40, intermediate_size=48, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=4,
                q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=12, v_head_dim=10,
                max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=False, attention_bias=False,
                rope_theta=100.0,
                rope_scaling={
                    "type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 4,
                    "beta_slow": 1, "original_max_position_embeddings": 32,
                },
            ),
            "first_k_dense_replace": 1, "moe_intermediate_size": 12, "n_routed_experts": 12, "num_experts_per_tok": 3,
            "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1,
        },
        lambda w, c: (latent(w, c), mtp_layer(w, c)),
        1,
        {"mlp": expert_mlp},
    ),
    # Weights in blocks of FP8, some of them cut off at an edge; one group, as Kimi-K2 routes.
    "pico-deepseek-v3-fp8": (
        {
            **deepseek(
                "bfloat16",
                vocab_size=53, hidden_size=136, intermediate_size=132, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=4,
                q_lora_rank=40, kv_lora_rank=32, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=16,
                max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=False, attention_bias=False,
                rope_theta=10000.0, rope_scaling=None,
            ),
            "first_k_dense_replace": 1, "n_routed_experts": 6, "routed_scaling_factor": 2.827,
            "quantization_config": FP8,
        },
        latent,
        1,
        {"mlp": expert_mlp},
    ),
    # MiniCPM3 as it is published: LongRoPE, here past the original context.
    "pico-minicpm3-long": (
        config(
            "MiniCPM3ForCausalLM", "minicpm3", "torch_dtype", "bfloat16",
            vocab_size=79, hidden_size=40, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, pad_token_id=0,
            q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=12, v_head_dim=8,
            max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True, attention_bias=False,
            scale_emb=12, scale_depth=1.4, dim_model_base=16, rope_theta=10000.0,
            rope_scaling={
                "type": "longrope", "short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 16,
            },
        ),
        latent,
        1,
    ),
    # DeepSeek's attention and a squared ReLU without a gate. No class of transformers: golden logits are a formula's.
    "pico-plm": (
        config(
            "PLMForCausalLM", "plm", "torch_dtype", "float32",
            vocab_size=83, hidden_size=40, intermediate_size=56, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4,
            q_lora_rank=None, kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12,
            max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=True, attention_bias=False,
            rope_theta=10000.0, rope_scaling=None,
        )
        | {"hidden_act": "relu2"},
        latent,
        1,
        {"mlp": plain_relu2_mlp},
    ),
}


TRAINED = "pico-trained"


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def save(tensors: dict, path: Path, metadata: dict | None = None) -> None:
    save_file(tensors, path, metadata=metadata)
    path.chmod(0o644)  # the library makes files that only their owner can read


def write_weights(folder: Path, tensors: dict, shards: int) -> None:
    metadata = {"format": "pt"}
    if shards == 1:
        save(tensors, folder / "model.safetensors", metadata)
        return
    # Cut where the bytes pass each share; names stay in reading order, so a layer may lie across the cut.
    size = lambda t: t.numel() * t.element_size()
    total, running = sum(map(size, tensors.values())), 0
    parts, weight_map = [{} for _ in range(shards)], {}
    for name, tensor in tensors.items():
        shard = min(running * shards // total, shards - 1)
        parts[shard][name] = tensor
        weight_map[name] = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        running += size(tensor)
    for i, part in enumerate(parts):
        save(part, folder / f"model-{i + 1:05d}-of-{shards:05d}.safetensors", metadata)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def quantised(tensors: dict) -> tuple[dict, dict]:
    """Weights of attention, MLPs and experts as DeepSeek-V3 stores them, and the same dequantised, everything in float32."""
    stored, plain, largest = {}, {}, torch.finfo(torch.float8_e4m3fn).max
    for name, tensor in tensors.items():
        stored[name], plain[name] = tensor, tensor.float()
        if ".layers." not in name or not name.endswith("_proj.weight") and "_proj_with_mqa" not in name:
            continue
        rows, columns = tensor.shape
        scales = torch.empty((-(-rows // 128), -(-columns // 128)))
        values = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                at = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
                scales[i, j] = plain[name][at].abs().max() / largest
                values[at] = (plain[name][at] / scales[i, j]).to(torch.float8_e4m3fn)
                plain[name][at] = values[at].float() * scales[i, j]
        stored[name], stored[f"{name}_scale_inv"] = values, scales
    return stored, plain


def plm_logits(c: dict, tensors: dict, tokens: np.ndarray) -> np.ndarray:
    """PLM (arXiv 2503.12167) written out in float64: latent attention without a query latent, y = down(relu(up x)^2)."""
    t = {name: value.double().numpy() for name, value in tensors.items()}
    heads, nope, rope, v = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    rank, n = c["kv_lora_rank"], len(tokens)
    norm = lambda x, gain, eps: x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain
    # Neighbours 2j and 2j + 1 turn by position * theta^(-2j / d_R).
    turn = np.exp(1j * np.outer(np.arange(n), c["rope_theta"] ** (-np.arange(0, rope, 2) / rope)))
    x = t["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        w = lambda name: t[f"model.layers.{i}.{name}.weight"]
        y = norm(x, w("input_layernorm"), c["rms_norm_eps"])
        down = y @ w("self_attn.kv_a_proj_with_mqa").T
        latents = norm(down[:, :rank], w("self_attn.kv_a_layernorm"), 1e-6)
        shared = (down[:, rank::2] + 1j * down[:, rank + 1 :: 2]) * turn
        outputs = []
        for h in range(heads):
            q = y @ w("self_attn.q_proj")[h * (nope + rope) : (h + 1) * (nope + rope)].T
            up = w("self_attn.kv_b_proj")[h * (nope + v) : (h + 1) * (nope + v)]
            turned = (q[:, nope::2] + 1j * q[:, nope + 1 :: 2]) * turn
            scores = q[:, :nope] @ (latents @ up[:nope].T).T + (turned @ shared.conj().T).real
            scores = scores / np.sqrt(nope + rope) + np.triu(np.full((n, n), -np.inf), 1)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            outputs.append(p / p.sum(-1, keepdims=True) @ (latents @ up[nope:].T))
        x = x + np.concatenate(outputs, -1) @ w("self_attn.o_proj").T
        y = norm(x, w("post_attention_layernorm"), c["rms_norm_eps"])
        x = x + np.maximum(y @ w("mlp.up_proj").T, 0) ** 2 @ w("mlp.down_proj").T
    return norm(x, t["model.norm.weight"], c["rms_norm_eps"]) @ t["model.embed_tokens.weight"].T


def plm_in_deepseek(folder: Path, c: dict, tensors: dict) -> None:
    """The same model as a stock class holds it: relu(u)^2 = relu(u) u, a ReLU gate that is `up` again."""
    held = {**deepseek("float32", num_hidden_layers=c["num_hidden_layers"]), **c}
    held |= {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_act": "relu"}
    gates = {name.replace("up_proj", "gate_proj"): t.clone() for name, t in tensors.items() if "up_proj" in name}
    folder.mkdir(parents=True)
    write_json(folder / "config.json", held)
    write_weights(folder, tensors | gates, 1)


@torch.no_grad()
def golden(folder: Path, name: str, sequences: list[np.ndarray]) -> tuple[dict, dict]:
    """What stock transformers makes of the folder and these token sequences: tensors and facts."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    # Layers that predict further tokens are stored behind the others, and the class leaves them out.
    behind = tuple(f"model.layers.{model.config.num_hidden_layers + i}." for i in range(4))
    info["unexpected_keys"] = [k for k in info["unexpected_keys"] if not k.startswith(behind)]
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            raise SystemExit(f"{name}: {problem}: {info[problem]}")
    model.eval()
    tensors = {}
    for i, sequence in enumerate(sequences):
        ids = torch.from_numpy(sequence)
        tensors[f"tokens.{i}"] = ids
        tensors[f"logits.{i}"] = model(input_ids=ids[None], use_cache=False).logits[0].contiguous()
    rotary = model.model.rotary_emb
    tensors["rope.inv_freq"] = rotary.inv_freq.float().clone()
    facts = {
        "class": type(model).__name__,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "attention": "eager",
        "computed_in": "float32",
        "rope_attention_scaling": float(rotary.attention_scaling),
        "softmax_scale": float(model.model.layers[0].self_attn.scaling),
        "lengths": [len(s) for s in sequences],
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return tensors, facts


def make(name: str, folder: Path) -> None:
    cfg, attention, shards, *more = MODELS[name]
    dtype = getattr(torch, cfg.get("torch_dtype") or cfg["dtype"])
    weights = Weights(name, dtype)
    common(weights, cfg, **dict(*more))
    attention(weights, cfg)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", cfg)
    draw = lambda i, n: np.random.default_rng([SEED, zlib.crc32(name.encode()), i]).integers(0, cfg["vocab_size"], n)
    sequences = [draw(i, n) for i, n in enumerate(LENGTHS)]
    if "quantization_config" not in cfg and cfg["model_type"] != "plm":
        write_weights(folder, weights.tensors, shards)
        return write_golden(folder, *golden(folder, name, sequences))
    with tempfile.TemporaryDirectory() as scratch:
        # What transformers reads is the same model in another form.
        other = Path(scratch) / name
        if cfg["model_type"] == "plm":
            write_weights(folder, weights.tensors, shards)
            plm_in_deepseek(other, cfg, weights.tensors)
        else:
            stored, plain = quantised(weights.tensors)
            write_weights(folder, stored, shards)
            other.mkdir()
            write_json(other / "config.json", {k: v for k, v in cfg.items() if k != "quantization_config"})
            write_weights(other, plain, 1)
        tensors, facts = golden(other, name, sequences)
    if cfg["model_type"] == "plm":
        for i, sequence in enumerate(sequences):
            formula = torch.from_numpy(plm_logits(cfg, weights.tensors, sequence)).float()
            worst = (formula - tensors[f"logits.{i}"]).abs().max() / formula.abs().max()
            if not worst <= TOLERANCE:
                raise SystemExit(f"{name}: the formula and the stock class differ by {worst:.3g}")
            tensors[f"logits.{i}"] = formula
        facts |= {"class": "formula of arXiv 2503.12167", "computed_in": "float64"}
    else:
        facts["class"] += ", dequantised"
    write_golden(folder, tensors, facts)


def write_golden(folder: Path, tensors: dict, facts: dict) -> None:
    save(tensors, folder / "golden.safetensors")
    write_json(folder / "golden.json", facts)


def add_golden_to_trained(kept: Path, folder: Path) -> None:
    """The trained model comes from `train_pico.py`; only its golden files are made here, from held-out bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    text = np.frombuffer((ROOT / "data" / "heldout.txt").read_bytes(), dtype=np.uint8).astype(np.int64)
    write_golden(folder, *golden(kept, TRAINED, [text[start : start + n] for start, n in ((0, 64), (2000, 24))]))


def differences(made: Path, kept: Path) -> list[str]:
    """Everything but the golden values must be equal byte for byte; those within the tolerance."""
    found = []
    names = {p.name for p in made.iterdir()}
    if kept.is_dir() and kept.name != TRAINED:
        names |= {p.name for p in kept.iterdir()}
    for name in sorted(names):
        a, b = made / name, kept / name
        if not a.exists() or not b.exists():
            found.append(f"{b}: {'missing' if a.exists() else 'not made by this script'}")
        elif name == "golden.safetensors":
            x, y = load_file(a), load_file(b)
            if x.keys() != y.keys():
                found.append(f"{b}: tensors {sorted(y)}, expected {sorted(x)}")
                continue
            for key in x:
                if x[key].shape != y[key].shape or x[key].dtype != y[key].dtype:
                    found.append(f"{b}: {key} has another shape or dtype")
                    continue
                worst = (x[key].double() - y[key].double()).abs().max().item()
                allowed = TOLERANCE * x[key].abs().max().item() if x[key].is_floating_point() else 0
                if not worst <= allowed:
                    found.append(f"{b}: {key} differs by {worst:.3g}")
        elif name == "golden.json":
            x, y = json.loads(a.read_text()), json.loads(b.read_text())
            for facts in (x, y):
                facts.pop("torch"), facts.pop("transformers")
            if x != y:
                found.append(f"{b}: differs")
        elif a.read_bytes() != b.read_bytes():
            found.append(f"{b}: differs")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"one of {', '.join([*MODELS, TRAINED])}; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "fixtures")
    parser.add_argument("--check", action="store_true", help="compare with the committed folders instead of writing")
    args = parser.parse_args()
    if unknown := set(args.models) - {*MODELS, TRAINED}:
        parser.error(f"unknown model {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    problems = []
    for name in args.models or [*MODELS, TRAINED]:
        produce = make if name != TRAINED else lambda _, folder: add_golden_to_trained(args.out / TRAINED, folder)
        if args.check:
            with tempfile.TemporaryDirectory() as scratch:
                produce(name, Path(scratch) / name)
                found = differences(Path(scratch) / name, args.out / name)
            print(f"{name}: {'ok' if not found else 'DIFFERS'}")
            problems += found
        else:
            produce(name, args.out / name)
            size = sum(p.stat().st_size for p in (args.out / name).iterdir())
            print(f"{name}: {size / 1000:.0f} kB")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
