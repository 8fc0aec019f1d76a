"""Ranks by energy as X-EcoMLA's published rule gives them, for `fixtures/x-ecomla-ranks.json`.

Independent of the tool: numpy, the repeated and stacked matrices of the paper, float64.

    python scripts/x_ecomla_ranks.py fixtures/pico-trained > fixtures/x-ecomla-ranks.json
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open


def rank(weight, energy, divisor):
    squares = np.linalg.svd(weight, compute_uv=False) ** 2
    within = int((np.cumsum(squares) / squares.sum() <= energy).sum())
    within = max(within, 1)
    return min(-(-within // divisor) * divisor, len(squares))


def main():
    folder = Path(sys.argv[1])
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads, size = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    out = []
    with safe_open(folder / "model.safetensors", "pt") as weights:
        for layer in range(config["num_hidden_layers"]):
            q, k, v = (
                weights.get_tensor(f"model.layers.{layer}.self_attn.{role}_proj.weight").to(torch.float64).numpy()
                for role in "qkv"
            )
            repeat = lambda w: np.repeat(w.reshape(kv_heads, size, -1), heads // kv_heads, 0).reshape(heads * size, -1)
            joint = np.concatenate([repeat(k), repeat(v)])
            for energy in (0.5, 0.8, 0.95, 0.99):
                for divisor in (1, 8):
                    # Repeating leaves singular values of zero: they do not count as rank.
                    kv = min(rank(joint, energy, divisor), 2 * kv_heads * size)
                    out.append({"layer": layer, "energy": energy, "divisor": divisor, "kv": kv,
                                "q": rank(q, energy, divisor)})
    print(json.dumps(out, indent=None, separators=(",", ":")).replace("},{", "},\n{"))


if __name__ == "__main__":
    main()
