#!/usr/bin/env python3
"""Converts random small models of every family with `--method exact` and loads the results in stock transformers.

    python scripts/check_transformers.py                       # everything, about a minute
    python scripts/check_transformers.py gemma2 mixtral        # these families
    python scripts/check_transformers.py --seed 3 --keep DIR   # other weights; keep the folders

For each pair of family and target that the tool takes, the largest difference of a logit, in float32, on a sequence of
random tokens, whole and token by token over a cache. Pairs that the tool refuses are listed with the reason, and have to be
those listed here. Exit 1 when a pair differs by 1e-3 or more, or is refused or taken unexpectedly.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1e-3

SMALL = dict(
    hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
MQA, MHA = dict(num_key_value_heads=1), dict(num_key_value_heads=4)
ODD = dict(num_attention_heads=6, head_dim=10, hidden_size=42, num_key_value_heads=3)
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 500.0,
}
SHORT, LONG = [1.0, 1.1, 1.3, 2.0], [1.0, 1.5, 3.0, 8.0]
PHI = dict(
    hidden_size=48, num_attention_heads=4, head_dim=None, original_max_position_embeddings=16,
    partial_rotary_factor=0.67, max_position_embeddings=64,
    rope_scaling={"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
)
EXPERTS = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[])
DENSE = ("deepseek_v3", "deepseek_v2", "youtu", "minicpm3", "hf-remote")

# (family, what is special, config, targets that take it)
CASES = [
    ("llama", "tied, odd vocabulary", dict(vocab_size=97, tie_word_embeddings=True), DENSE),
    ("llama", "MQA, eps 1e-5", dict(vocab_size=64, rms_norm_eps=1e-5, **MQA), DENSE),
    ("llama", "H d != D", dict(vocab_size=101, **ODD), DENSE),
    ("llama", "llama3 RoPE, biases", dict(vocab_size=101, attention_bias=True, rope_parameters=LLAMA3), DENSE),
    ("llama", "biases in the MLP", dict(vocab_size=101, mlp_bias=True), ("hf-remote",)),
    ("llama", "GELU", dict(vocab_size=101, hidden_act="gelu"), ("hf-remote",)),
    ("mistral", "MHA", dict(vocab_size=99, sliding_window=None, **MHA), DENSE),
    ("mistral", "window", dict(vocab_size=99, sliding_window=7), ("hf-remote",)),
    ("qwen2", "biases, tied", dict(vocab_size=151, tie_word_embeddings=True), DENSE),
    ("qwen2", "MQA, untied", dict(vocab_size=151, **MQA), DENSE),
    ("qwen3", "head norms", dict(vocab_size=97, head_dim=16), ("hf-remote",)),
    ("qwen3", "MQA, tied", dict(vocab_size=97, head_dim=12, tie_word_embeddings=True, **MQA), ("hf-remote",)),
    ("gemma2", "GQA", dict(vocab_size=99, head_dim=16, query_pre_attn_scalar=20, sliding_window=9), ("hf-remote",)),
    ("gemma2", "MHA", dict(vocab_size=99, head_dim=8, attn_logit_softcapping=3.0, **MHA), ("hf-remote",)),
    ("phi3", "LongRoPE, part of a head", dict(vocab_size=103, **PHI), DENSE),
    ("phi3", "plain, MHA", dict(vocab_size=103, tie_word_embeddings=True, **MHA), DENSE),
    ("olmo2", "norms after, over all heads", dict(vocab_size=95), ("hf-remote",)),
    ("olmo2", "MHA", dict(vocab_size=95, tie_word_embeddings=True, **MHA), ("hf-remote",)),
    ("granite", "multipliers, tied", dict(
        vocab_size=105, tie_word_embeddings=True, embedding_multiplier=6.0, residual_multiplier=0.3,
        attention_multiplier=0.2, logits_scaling=4.0,
    ), DENSE),
    ("granite", "untied, biases", dict(
        vocab_size=105, attention_bias=True, embedding_multiplier=12.0, residual_multiplier=0.22,
        attention_multiplier=0.25, logits_scaling=8.0,
    ), DENSE),
    ("mixtral", "experts", dict(vocab_size=99, num_local_experts=4, num_experts_per_tok=2), ("hf-remote",)),
    ("mixtral", "all experts, MQA", dict(vocab_size=99, num_local_experts=3, num_experts_per_tok=3, **MQA),
     ("hf-remote", "deepseek_v2")),
    ("qwen2_moe", "gated shared expert", dict(vocab_size=99, shared_expert_intermediate_size=20, **EXPERTS),
     ("hf-remote",)),
    ("qwen2_moe", "a dense layer, sums to one", dict(
        vocab_size=99, shared_expert_intermediate_size=20, norm_topk_prob=True, **{**EXPERTS, "mlp_only_layers": [1]},
    ), ("hf-remote",)),
    ("qwen3_moe", "head norms and experts", dict(vocab_size=99, head_dim=16, norm_topk_prob=True, **EXPERTS),
     ("hf-remote",)),
]
# Taken on request though transformers routes otherwise: `check` says so.
NOT_IN_TRANSFORMERS = {("mixtral", "experts", "deepseek_v2")}
TARGETS = ("deepseek_v3", "deepseek_v2", "youtu", "minicpm3", "hf-remote")


@torch.no_grad()
def make(family: str, fields: dict, seed: int):
    torch.manual_seed(seed)
    fields = {**SMALL, **fields}
    if family == "phi3" and fields.get("head_dim", 0) is None:
        del fields["head_dim"]
    config = AutoConfig.for_model(family, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.add_(torch.randn_like(weight) * 0.2)
        else:
            scale = weight.shape[-1] ** -0.5 if "embed" not in name else 0.12
            scale *= 1.5 if any(p in name for p in ("q_proj", "k_proj", "qkv_proj")) else 1.0
            scale *= 3.0 if name.endswith("mlp.gate.weight") else 1.0
            weight.copy_(torch.randn_like(weight) * scale)
    return model


@torch.no_grad()
def difference(source, folder: Path) -> tuple[float, float]:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=True, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            raise SystemExit(f"{folder}: {problem}: {info[problem]}")
    model.eval()
    ids = torch.randint(3, source.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(7))
    expected = source(input_ids=ids, use_cache=False).logits
    whole = (model(input_ids=ids, use_cache=False).logits - expected).abs().max().item()
    past, cached = None, 0.0
    # A window of frequencies that changes with the length is a different function over a cache.
    if getattr(source.config, "original_max_position_embeddings", 10**9) >= ids.shape[1]:
        for t in range(0, ids.shape[1], 8):
            out = model(input_ids=ids[:, t : t + 8], past_key_values=past, use_cache=True)
            past = out.past_key_values
            cached = max(cached, (out.logits - expected[:, t : t + 8]).abs().max().item())
    return whole, cached


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/gqa2mla")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        root = args.keep or Path(scratch)
        for number, (family, what, fields, takes) in enumerate(CASES):
            if args.families and family not in args.families:
                continue
            model = make(family, fields, args.seed + number)
            source = root / f"{number}-{family}"
            model.save_pretrained(source)
            for target in TARGETS:
                out = root / f"{number}-{family}-{target}"
                run = subprocess.run(
                    [args.binary, "convert", source, "-o", out, "--method", "exact", "--target", target,
                     "--dtype", "f32", "--overwrite", "--json", "-q"],
                    capture_output=True, text=True,
                )
                label = f"{family:10} {what:30} {target:12}"
                if run.returncode != 0:
                    reason = run.stderr.strip().splitlines()[0] if run.stderr.strip() else f"exit {run.returncode}"
                    bad = target in takes
                    print(f"{label} {'UNEXPECTEDLY ' if bad else ''}refused: {reason}")
                elif (family, what, target) in NOT_IN_TRANSFORMERS:
                    bad = False
                    print(f"{label} written for other engines")
                else:
                    whole, cached = difference(model, out)
                    bad = target not in takes or not max(whole, cached) < LIMIT
                    print(f"{label} {'BAD ' if bad else ''}{whole:.2e} whole, {cached:.2e} cached")
                    # What `check` says of transformers has to be what it did.
                if run.returncode == 0:
                    verdict = subprocess.run(
                        [args.binary, "check", out, "--engine", "transformers", "-q"], capture_output=True
                    ).returncode
                    if verdict != int((family, what, target) in NOT_IN_TRANSFORMERS):
                        print(f"{label} BAD verdict of check: exit {verdict}")
                        bad = True
                failures += bad
    print(f"{failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
