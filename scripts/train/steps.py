#!/usr/bin/env python3
"""Held-out loss of a source and of its conversions before and after the same few steps of ordinary training.

    python3 scripts/train/steps.py SOURCE CONVERTED [CONVERTED ...] --text FILE --held-out FILE [--steps 20] [--lr 1e-4]

AdamW on all parameters (weight decay 0.01, gradient clipped to 1), and LoRA of rank 8 on all linear layers, in f32. A conversion
holds where its loss moves as the source's does: exit 1 where one does not within --within nats.
Packages: scripts/train/requirements.txt and peft.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

WAYS = ("adamw", "lora")


def windows(tokenizer, file, length):
    ids = tokenizer(Path(file).read_text(encoding="utf-8"), return_tensors="pt", add_special_tokens=False).input_ids[0]
    return ids[: len(ids) // length * length].view(-1, length)


def trained(folder, way, a):
    """Held-out loss before, after one step, and at the end."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    if way == "lora":
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    train, held_out = windows(tokenizer, a.text, a.seq_len), windows(tokenizer, a.held_out, a.seq_len)[: a.windows]

    @torch.no_grad()
    def loss():
        return model(input_ids=held_out, labels=held_out, use_cache=False).loss.item()

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=a.lr, weight_decay=0.01)
    losses = [loss()]
    for step in range(a.steps):
        row = train[step % len(train)][None]
        model(input_ids=row, labels=row, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step in (0, a.steps - 1):
            losses.append(loss())
    return losses


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("source")
    ap.add_argument("converted", nargs="+")
    ap.add_argument("--text", required=True)
    ap.add_argument("--held-out", required=True)
    ap.add_argument("--steps", type=int, default=20)
    ap.add_argument("--lr", type=float, default=1e-4)
    ap.add_argument("--seq-len", type=int, default=256)
    ap.add_argument("--windows", type=int, default=4)
    ap.add_argument("--within", type=float, default=0.05)
    ap.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    a = ap.parse_args()
    good = True
    for way in a.ways:
        own = None
        for folder in [a.source, *a.converted]:
            losses = trained(folder, way, a)
            moved = losses[-1] - losses[0]
            own = moved if own is None else own
            holds = abs(moved - own) <= a.within
            good &= holds
            print(json.dumps({"folder": folder, "way": way, "loss": [round(l, 4) for l in losses],
                              "moved": round(moved, 4), "holds": holds}), flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
