#!/usr/bin/env python3
"""Trains the bundled pico model: a byte-level Llama with grouped-query attention, in minutes on one CPU thread.

Random weights have no spectrum, so nothing about compression can be shown on them. This model is small enough to be
committed and trained enough that its keys and values have structure.

    python scripts/train_pico.py                  # writes fixtures/pico-trained
    python scripts/train_pico.py --validate       # trains on 11/12 of the text, prints the loss on the rest, writes nothing
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
BOS, EOS = 256, 257
SEED = 20261122

SHAPE = dict(
    vocab_size=258,
    hidden_size=128,
    intermediate_size=224,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    hidden_act="silu",
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    attention_bias=False,
    mlp_bias=False,
    bos_token_id=BOS,
    eos_token_id=EOS,
)
ROPE_THETA = 10000.0


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE without merges in which the id of a byte is its value; then `<s>` and `</s>`."""
    # The printable stand-ins of the ByteLevel alphabet: bytes that print stand for themselves, the others are moved
    # above U+0100 in order. Checked below against the tokenizers library itself.
    printable = set(range(0x21, 0x7F)) | set(range(0xA1, 0xAD)) | set(range(0xAE, 0x100))
    vocab, moved = {}, 0
    for byte in range(256):
        if byte in printable:
            vocab[chr(byte)] = byte
        else:
            vocab[chr(256 + moved)] = byte
            moved += 1
    assert set(vocab) == set(pre_tokenizers.ByteLevel.alphabet())
    vocab["<s>"], vocab["</s>"] = BOS, EOS
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    text = "Ein Stück naïve 茶, \t\r\n \x00 \U0001f375"
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    return tokenizer


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA})
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                # Scaled by the fan-in; what writes into the residual stream is made smaller with depth.
                std = 0.05 if "embed" in name else weight.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * SHAPE["num_hidden_layers"])
                weight.normal_(0.0, std)
    return model


def add_dropout(model: LlamaForCausalLM, p: float):
    """Dropout on what each sublayer adds to the residual stream. Returns the hooks, to be removed afterwards."""
    hook = lambda module, _, out: F.dropout(out, p, module.training)
    names = ("o_proj", "down_proj", "embed_tokens")
    return [m.register_forward_hook(hook) for n, m in model.named_modules() if n.endswith(names)]


@torch.no_grad()
def nats_per_byte(model, data: np.ndarray, window: int) -> float:
    """Mean next-byte loss over consecutive windows, the first byte of each being given."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(data) - 1, window - 1):
        ids = torch.from_numpy(data[start : start + window].astype(np.int64))[None]
        if ids.shape[1] < 2:
            break
        logits = model(input_ids=ids).logits[0, :-1].float()
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    model.train()
    return total / count


def baselines(train: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """Perplexity per byte of count models: order 0 and 1, and orders 0-3 interpolated by Witten-Bell."""
    result = {}
    uni = np.bincount(train, minlength=256) + 0.5
    p_uni = uni / uni.sum()
    result["unigram"] = math.exp(-np.log(p_uni[test[1:]]).mean())

    def witten_bell(order: int) -> float:
        counts = [dict() for _ in range(order + 1)]
        for n in range(1, order + 1):
            for i in range(n, len(train)):
                ctx = bytes(train[i - n : i])
                seen = counts[n].setdefault(ctx, {})
                seen[train[i]] = seen.get(train[i], 0) + 1
        total = 0.0
        for i in range(1, len(test)):
            p = p_uni[test[i]]
            for n in range(1, min(order, i) + 1):
                seen = counts[n].get(bytes(test[i - n : i]))
                if seen is None:
                    break
                size, kinds = sum(seen.values()), len(seen)
                p = (seen.get(test[i], 0) + kinds * p) / (size + kinds)
            total -= math.log(p)
        return math.exp(total / (len(test) - 1))

    result["bigram"] = witten_bell(1)
    result["fourgram"] = witten_bell(3)
    return result


def train(args, data: np.ndarray, validation: np.ndarray | None) -> tuple[LlamaForCausalLM, float]:
    """Returns the model and its running training loss in nats per byte."""
    model = new_model()
    model.train()
    hooks = add_dropout(model, args.dropout)
    decay = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    rng = np.random.default_rng(SEED)
    started = time.monotonic()
    running = None
    for step in range(args.steps):
        warm = min(1.0, (step + 1) / 100)
        cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimiser.param_groups:
            group["lr"] = args.lr * warm * (0.02 + 0.98 * cosine)
        rows = []
        for _ in range(args.batch):
            start = rng.integers(0, len(data) - args.window)
            row = data[start : start + args.window].astype(np.int64)
            if rng.random() < 0.25:
                row = np.concatenate(([BOS], row[:-1]))
            rows.append(row)
        ids = torch.from_numpy(np.stack(rows))
        logits = model(input_ids=ids).logits
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            line = f"step {step + 1:5d}  loss {running:.4f}  {time.monotonic() - started:6.1f} s"
            if validation is not None:
                line += f"  validation {nats_per_byte(model, validation, args.window):.4f}"
            print(line, flush=True)
    for hook in hooks:
        hook.remove()
    return model.eval(), running


def write(model: LlamaForCausalLM, out: Path, figures: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors = {n: p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # the library makes files that only their owner can read
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **SHAPE,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "rope_theta": ROPE_THETA,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": False}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": SHAPE["max_position_embeddings"],
    }
    for name, value in [
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config),
    ]:
        (out / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    byte_tokenizer().save(str(out / "tokenizer.json"))
    (out / "README.md").write_text(card(figures))


def card(f: dict) -> str:
    return f"""# pico-trained

A byte-level Llama with grouped-query attention that fits into a source repository: {f["parameters"]:,} parameters,
{SHAPE["num_hidden_layers"]} layers, {SHAPE["num_attention_heads"]} query heads on {SHAPE["num_key_value_heads"]} key/value heads of {SHAPE["head_dim"]}, bfloat16, tied embeddings. It is here to be converted and
verified by a first command that needs no download, and in tests. It is no use for anything else.

Tokens are bytes (id = value); `<s>` is {BOS} and `</s>` is {EOS}. The tokenizer adds neither; a quarter of the training
windows began with `<s>`, and `</s>` was never trained.

Made by `{f["command"]}` (seed {SEED}, torch {f["torch"]}, one thread) from `data/calib.txt`
in {f["steps"]} steps of {f["batch"]} windows of {f["window"]} bytes; final training loss {f["train_loss"]:.3f} nats per byte (with dropout).

Perplexity per byte on `data/heldout.txt`, no part of which was trained on, in consecutive windows of {f["window"]} bytes (the
first byte of a window is given, and is the last of the window before):

| model | perplexity |
|---|---:|
| unigram of `calib.txt` | {f["unigram"]:.2f} |
| bigram of `calib.txt`, Witten-Bell | {f["bigram"]:.2f} |
| four-gram of `calib.txt`, Witten-Bell | {f["fourgram"]:.2f} |
| this model, bfloat16 weights | {f["heldout"]:.2f} |
| (this model on `calib.txt` itself) | {f["calib"]:.2f} |

The text and the weights were made for this project and are under its licence, Apache-2.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "fixtures" / "pico-trained")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--validate", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)

    data = np.frombuffer((ROOT / "data" / "calib.txt").read_bytes(), dtype=np.uint8)
    heldout = np.frombuffer((ROOT / "data" / "heldout.txt").read_bytes(), dtype=np.uint8)
    if args.validate:
        blocks = np.array_split(data, 36)
        kept = np.concatenate([b for i, b in enumerate(blocks) if i % 12 != 7])
        train(args, kept, np.concatenate([b for i, b in enumerate(blocks) if i % 12 == 7]))
        return

    model, loss = train(args, data, None)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16).float())
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "command": "python scripts/train_pico.py",
        "torch": torch.__version__.split("+")[0],
        "train_loss": loss,
        "steps": args.steps,
        "batch": args.batch,
        "window": args.window,
        "heldout": math.exp(nats_per_byte(model, heldout, args.window)),
        "calib": math.exp(nats_per_byte(model, data, args.window)),
        **baselines(data, heldout),
    }
    model.eval()
    write(model, args.out, figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
