#!/usr/bin/env python3
"""Trains a conversion to predict what its source predicts, with Accelerate: one process, or as many as the launcher starts.

    python3 scripts/train/distill.py SOURCE CONVERTED OUT --text FILE [--text FILE] [--steps 200]
    accelerate launch --config_file scripts/train/fsdp.yaml scripts/train/distill.py SOURCE CONVERTED OUT --text FILE
    gqa2mla export OUT -o SERVED --target deepseek_v3 --profile portable        # afterwards

KL(source || conversion) over the whole vocabulary, AdamW, cosine. Every eighth window is held out: the loss there is printed
before and after. Folders whose latent norm is neutralised by small weights are refused (docs/training.md).
Packages: scripts/train/requirements.txt.
"""

import argparse
import json
import math
import re
import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

# What `save_pretrained` does not write and an export needs.
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")


def arguments():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("source")
    ap.add_argument("converted")
    ap.add_argument("out")
    ap.add_argument("--text", action="append", required=True, help="UTF-8 file; repeatable")
    ap.add_argument("--steps", type=int, default=200)
    ap.add_argument("--seq-len", type=int, default=512)
    ap.add_argument("--batch", type=int, default=4, help="windows a step and process")
    ap.add_argument("--lr", type=float, default=1e-5)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--attention-only", action="store_true", help="train the attention's weights alone")
    return ap.parse_args()


def refuse_small_rows(folder):
    """Stops where the latent norm is neutralised by small weights: one step of an optimiser destroys such a model."""
    from safetensors import safe_open

    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if name.endswith("kv_a_layernorm.weight") and tensors.get_tensor(name).float().abs().min() > 16:
                    sys.exit(
                        f"{folder}: `{name}` lifts a latent that was scaled down (portable profile): training destroys it.\n"
                        f"hint: gqa2mla export {folder} -o TRAINABLE --target deepseek_v3, and train that"
                    )


def windows(tokenizer, files, length):
    """Tokens of all files in windows `[N, length]`, and every eighth of them apart."""
    rows = []
    for file in files:
        ids = tokenizer(Path(file).read_text(encoding="utf-8"), add_special_tokens=False).input_ids
        rows += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    held_out = rows[7::8]
    if not held_out:
        sys.exit(f"the text has {len(rows)} windows of {length} tokens, 8 are needed to hold one out: give more text, or a smaller --seq-len")
    return torch.tensor([r for i, r in enumerate(rows) if i % 8 != 7]), torch.tensor(held_out)


def divergence(teacher, student, ids):
    """Mean KL(teacher || student) a token, nats."""
    with torch.no_grad():
        want = teacher(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    got = student(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    return torch.nn.functional.kl_div(got, want, log_target=True, reduction="none").sum(-1).mean()


def main():
    a = arguments()
    refuse_small_rows(a.converted)
    accelerator = Accelerator()
    set_seed(a.seed)
    tokenizer = AutoTokenizer.from_pretrained(a.source)
    train, held_out = windows(tokenizer, a.text, a.seq_len)
    load = lambda path, **more: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **more)
    teacher = load(a.source).eval().to(accelerator.device)
    # The modeling file of `hf-remote` is in the folder, written by gqa2mla.
    student = load(a.converted, trust_remote_code=True)
    for name, parameter in student.named_parameters():
        # Biases that are there for the constant of the latent alone stay zero: engines' own classes have none.
        unused = name.endswith("bias") and "self_attn" in name and (parameter != 0).sum() <= 1
        parameter.requires_grad_(not unused and ("self_attn" in name or not a.attention_only))
    student = accelerator.prepare(student)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=a.lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimiser, max(1, a.steps // 20), a.steps)
    optimiser, schedule = accelerator.prepare(optimiser, schedule)

    @torch.no_grad()
    def judged():
        own = held_out[accelerator.process_index :: accelerator.num_processes][:16]
        own = own if len(own) else held_out[:1]
        losses = [divergence(teacher, student, row[None].to(accelerator.device)) for row in own]
        # Every process takes part as often: sharded weights are gathered in each forward pass.
        return accelerator.gather(torch.stack(losses).mean()[None]).mean().item()

    before = judged()
    order = torch.Generator().manual_seed(a.seed)
    each = a.batch * accelerator.num_processes
    for step in range(a.steps):
        chosen = torch.randint(len(train), (each,), generator=order)
        ids = train[chosen[accelerator.process_index :: accelerator.num_processes]].to(accelerator.device)
        loss = divergence(teacher, student, ids)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if not math.isfinite(loss.item()):
            sys.exit(f"the loss of step {step} is {loss.item()}: lower --lr")
        if accelerator.is_main_process and (step + 1) % max(1, a.steps // 10) == 0:
            print(f"step {step + 1}/{a.steps}: KL {loss.item():.4f}", file=sys.stderr, flush=True)
    after = judged()
    state = accelerator.get_state_dict(student)
    if accelerator.is_main_process:
        accelerator.unwrap_model(student).save_pretrained(a.out, state_dict=state)
        for name in SIDE_FILES:
            if (Path(a.converted) / name).exists():
                shutil.copy(Path(a.converted) / name, a.out)
        for name in re.findall(r"(\w+)\.\w+", " ".join((student_config(a.converted).get("auto_map") or {}).values())):
            shutil.copy(Path(a.converted) / f"{name}.py", a.out)
        print(json.dumps({"steps": a.steps, "tokens": a.steps * each * a.seq_len, "processes": accelerator.num_processes,
                          "held_out_kl": {"before": before, "after": after}}))
    accelerator.wait_for_everyone()
    accelerator.end_training()


def student_config(folder):
    return json.loads((Path(folder) / "config.json").read_text())


if __name__ == "__main__":
    main()
