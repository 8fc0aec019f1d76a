"""Writes an FP8 folder (blocks of 128 x 128, `weight_scale_inv`) as f32: dequantise.py FOLDER OUT."""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

folder, out = map(Path, sys.argv[1:])
shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
stored = {}
for file in folder.glob("*.safetensors"):
    stored |= load_file(file)
weights = {}
for name, value in stored.items():
    if name.endswith(".weight_scale_inv"):
        continue
    value = value.float()
    scale = stored.get(name + "_scale_inv")
    if scale is not None:
        full = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
        value = value * full[: value.shape[0], : value.shape[1]]
    weights[name] = value.contiguous()
save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
config = json.loads((folder / "config.json").read_text())
config.pop("quantization_config")
(out / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
