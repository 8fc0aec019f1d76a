#!/usr/bin/env python3
"""Turns the latents of small MLA models with `gqa2mla rotate` and loads both in stock transformers.

    python scripts/check_rotation.py                 # about a minute
    python scripts/check_rotation.py --keep DIR      # keep the folders

Native models are random ones of every stock MLA class (biases, query latents, experts, half and interleaved pairs), with
gains of the latent norm that are not 1; converted ones are made from the trained fixture for every target. For each, and
for each transform, the largest difference of a logit between the model and its rotation, in float32. Exit 1 when one
differs by 1e-3 or more, or when `gqa2mla verify` says otherwise.
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
    hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    vocab_size=97, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0, qk_nope_head_dim=10,
    qk_rope_head_dim=8, v_head_dim=12,
)
DENSE = dict(
    first_k_dense_replace=9, n_routed_experts=2, num_experts_per_tok=1, n_shared_experts=1, moe_intermediate_size=16,
    n_group=1, topk_group=1,
)
MOE = {**DENSE, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
NATIVE = [
    ("deepseek_v3", "direct queries", dict(kv_lora_rank=24, q_lora_rank=None, **DENSE)),
    ("deepseek_v3", "query latent, biases", dict(kv_lora_rank=20, q_lora_rank=28, attention_bias=True, **DENSE)),
    ("deepseek_v3", "experts, odd latent", dict(kv_lora_rank=18, q_lora_rank=None, **MOE)),
    ("deepseek_v2", "query latent", dict(kv_lora_rank=32, q_lora_rank=20, topk_method="greedy", **DENSE)),
    ("youtu", "biases", dict(kv_lora_rank=40, q_lora_rank=None, attention_bias=True, rope_interleave=True)),
    ("minicpm3", "half pairs", dict(kv_lora_rank=12, q_lora_rank=24)),
]
TARGETS = ("deepseek_v3", "deepseek_v2", "youtu", "minicpm3", "hf-remote")


@torch.no_grad()
def make(model_type: str, fields: dict, seed: int, folder: Path) -> None:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**SMALL, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.add_(torch.randn_like(weight) * 0.3)
        else:
            weight.copy_(torch.randn_like(weight) * (0.12 if "embed" in name else 1.5 * weight.shape[-1] ** -0.5))
    model.save_pretrained(folder)


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=True, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            raise SystemExit(f"{folder}: {problem}: {info[problem]}")
    vocab = model.config.vocab_size
    ids = torch.randint(3, vocab, (2, 40), generator=torch.Generator().manual_seed(7))
    return model.eval()(input_ids=ids, use_cache=False).logits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/gqa2mla")
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    failures = 0

    def tool(*words) -> None:
        subprocess.run([args.binary, *map(str, words), "-q"], check=True, capture_output=True)

    with tempfile.TemporaryDirectory() as scratch:
        root = args.keep or Path(scratch)
        models = []
        for number, (model_type, what, fields) in enumerate(NATIVE):
            folder = root / f"native-{number}"
            make(model_type, fields, number, folder)
            models.append((f"{model_type}: {what}", folder, ("hadamard",)))
        for target in TARGETS:
            folder = root / f"converted-{target}"
            tool("convert", ROOT / "fixtures/pico-trained", "-o", folder, "--target", target, "--kv-budget", "50%",
                 "--calib-samples", 48, "--calib-seq-len", 128, "--overwrite")
            models.append((f"converted to {target}", folder, ("hadamard", "pca")))
        for label, folder, transforms in models:
            expected = logits(folder)
            for transform in transforms:
                out = folder.with_name(f"{folder.name}-{transform}")
                tool("rotate", folder, "-o", out, "--transform", transform, "--slices", 2, "--calib-seq-len", 128,
                     "--overwrite")
                apart = (logits(out) - expected).abs().max().item()
                bad = not apart < LIMIT
                if transform == "pca":
                    # Those with a tokenizer: the tool's own verdict, with the thresholds of a rotation.
                    verdict = subprocess.run([args.binary, "verify", folder, out, "--seq-len", "128", "-q"],
                                             capture_output=True, text=True)
                    bad |= verdict.returncode != 0 or "those of a rotation" not in verdict.stdout
                rms = expected.square().mean().sqrt().item()
                print(f"{label:42} {transform:9} {'BAD ' if bad else ''}{apart:.2e} of {rms:.2f}")
                failures += bad
    print(f"{failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
