#!/usr/bin/env python3
"""What quantising a folder's weights costs, by the formats of the `gguf` package, beside the same for other folders.

    python3 scripts/engines/quantised.py --text FILE FOLDER [FOLDER ...] [--windows 2] [--seq-len 768] [--json OUT]

For F16, Q8_0 and Q4_0: the largest relative error of a matrix by its name, that of the latent's rows of kv_a_proj_with_mqa, and the
loss in transformers with every matrix quantised and widened again. A folder's errors should be those of its source's.
Needs the environment `transformers-4` of engines.txt.
"""

import argparse
import json

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from transformers import AutoModelForCausalLM, AutoTokenizer

FORMATS = ("F16", "Q8_0", "Q4_0")
LATENT = "kv_a_proj_with_mqa"


def loss(model, ids):
    with torch.no_grad():
        return float(np.mean([model(input_ids=row[None], labels=row[None], use_cache=False).loss.item() for row in ids]))


def relative(rounded, weight):
    return float(np.linalg.norm(rounded - weight) / max(np.linalg.norm(weight), 1e-30))


def quantise(model, name):
    """Every matrix of `model` by way of the format `name`; the largest error by the name of the matrix."""
    kind, worst = getattr(GGMLQuantizationType, name), {}
    for parameter_name, parameter in model.named_parameters():
        # Blocks are 32 values of a row; norms and biases stay f32 in GGUF files.
        if parameter.dim() != 2 or parameter.shape[1] % 32:
            continue
        weight = parameter.detach().numpy()
        rounded = quants.dequantize(quants.quantize(weight, kind), kind).reshape(weight.shape)
        parts = {parameter_name.split(".")[-2]: slice(None)}
        if LATENT in parameter_name:
            parts["latent rows"] = slice(model.config.kv_lora_rank)
        for part, rows in parts.items():
            worst[part] = max(worst.get(part, 0.0), relative(rounded[rows], weight[rows]))
        parameter.data.copy_(torch.from_numpy(rounded))
    return worst


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folders", nargs="+")
    ap.add_argument("--text", required=True)
    ap.add_argument("--windows", type=int, default=2)
    ap.add_argument("--seq-len", type=int, default=768)
    ap.add_argument("--json")
    a = ap.parse_args()
    table = []
    for folder in a.folders:
        tokens = AutoTokenizer.from_pretrained(folder)(open(a.text, encoding="utf-8").read()).input_ids
        ids = torch.tensor(tokens[: a.windows * a.seq_len]).view(a.windows, a.seq_len)
        load = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        entry = {"folder": folder, "loss": {"F32": loss(load(), ids)}, "worst relative error": {}}
        for name in FORMATS:
            model = load()
            entry["worst relative error"][name] = quantise(model, name)
            entry["loss"][name] = loss(model, ids)
        table.append(entry)
        print(json.dumps(entry, indent=1), flush=True)
    if a.json:
        with open(a.json, "w", encoding="utf-8") as out:
            json.dump(table, out, indent=1)


if __name__ == "__main__":
    main()
