#!/usr/bin/env python3
"""Converts some layers of small random models (`--mla-layers`) and compares the tool's perplexity with stock transformers'.

    python scripts/check_hybrids.py

The same windows of the same text, in float32, with the code that is written beside the weights. Exit 1 where the mean
negative log-likelihood differs by 1e-4 nats or more, or where transformers' own cache gives other logits by 1e-3 or more.
Needs a release build.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from check_transformers import PHI, ROOT, make

WINDOW, WINDOWS = 48, 4
CASES = [
    ("llama", dict(vocab_size=258), ["--method", "x-ecomla"]),
    ("qwen2", dict(vocab_size=258), ["--method", "x-ecomla"]),
    ("qwen3", dict(vocab_size=258, head_dim=16), ["--method", "x-ecomla"]),
    ("gemma2", dict(vocab_size=258, head_dim=16, query_pre_attn_scalar=20, sliding_window=9), ["--method", "mha2mla"]),
    ("phi3", {**PHI, "vocab_size": 258}, ["--method", "mha2mla"]),
    ("olmo2", dict(vocab_size=258), ["--method", "mha2mla", "--partial-rope", "2-norm"]),
    ("granite", dict(vocab_size=258, residual_multiplier=0.3, attention_multiplier=0.2, logits_scaling=4.0),
     ["--method", "attention-aware"]),
]


def run(*args):
    binary = ROOT / "target/release/gqa2mla"
    done = subprocess.run([binary, *args], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, args))}\n{done.stderr}")
    return done.stdout


@torch.no_grad()
def measure(folder, text):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=True, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            raise SystemExit(f"{folder}: {problem}: {info[problem]}")
    model.eval()
    ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(text, add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: WINDOW * WINDOWS]).view(WINDOWS, WINDOW)
    logits = model(input_ids=windows, use_cache=False).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).item()
    past, cached = None, 0.0
    for t in range(0, WINDOW, 8):
        out = model(input_ids=windows[:, t : t + 8], past_key_values=past, use_cache=True)
        past = out.past_key_values
        if getattr(model.config, "rotary_frequencies_long", None) is None:
            cached = max(cached, (out.logits - logits[:, t : t + 8]).abs().max().item())
    return nll, cached


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    text = "The river bends twice before it meets the sea, and the town lies in the second bend. " * 40
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "text.txt").write_text(text)
        for number, (family, fields, options) in enumerate(CASES):
            source, out = root / f"{number}", root / f"{number}-out"
            make(family, fields, number).save_pretrained(source)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(ROOT / "fixtures/pico-trained" / file, source)
            run("convert", source, "-o", out, *options, "--mla-layers", "1", "--dtype", "f32", "--force",
                "--calib-samples", "8", "--calib-seq-len", "48")
            ours = json.loads(run("eval", out, "--text", root / "text.txt", "--seq-len", str(WINDOW), "--windows",
                                  str(WINDOWS), "--json"))
            nll, cached = measure(out, text)
            difference = abs(nll - ours["nll_nats_per_token"])
            good = difference < 1e-4 and cached < 1e-3
            failures += not good
            print(f"{family:10} {' '.join(options):40} nll {nll:.6f}  differs {difference:.1e}  cached {cached:.1e}"
                  f"  {'' if good else 'FAILED'}", flush=True)
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
