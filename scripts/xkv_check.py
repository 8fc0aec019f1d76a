#!/usr/bin/env python3
"""What low rank in the cached values of a prompt costs, in stock transformers: the figures of docs/xkv.md by another way.

    python scripts/xkv_check.py FOLDER TEXT [--window 1024] [--prompt 768] [--ranks 184,150,111]

Prefill by transformers, `torch.linalg.svd` of each layer's values `[prompt, g d]` in its cache, truncated, put back; then the
rest of the window. Prints nats per token over the tokens predicted from after the prompt, as `eval --xkv` does with full-rank keys.
"""

import argparse

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=768)
    parser.add_argument("--ranks", default="184,150,111")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager").eval()
    with open(args.text, encoding="utf-8") as file:
        # The file itself: transformers may put a pre-tokenizer of its own in place of the file's.
        ids = Tokenizer.from_file(f"{args.model}/tokenizer.json").encode(file.read()).ids[: args.window]
    ids = torch.tensor([ids])
    exact = None
    for rank in [None, *map(int, args.ranks.split(","))]:
        with torch.no_grad():
            cache = model(ids[:, : args.prompt], use_cache=True).past_key_values
            lost = 0.0
            for layer in cache.layers if rank else []:
                _, heads, tokens, width = layer.values.shape
                x = layer.values[0].permute(1, 0, 2).reshape(tokens, heads * width).double()
                u, s, vt = torch.linalg.svd(x, full_matrices=False)
                lost = max(lost, float((s[rank:] ** 2).sum() / (s**2).sum()))
                x = ((u[:, :rank] * s[:rank]) @ vt[:rank]).float()
                layer.values = x.reshape(tokens, heads, width).permute(1, 0, 2)[None].contiguous()
            logits = model(ids[:, args.prompt :], past_key_values=cache).logits
        nats = float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, args.prompt + 1 :]))
        exact = nats if exact is None else exact
        print(f"rank {rank or 'full'}: {nats:.4f} nats, excess {nats - exact:.4f}, energy lost at most {100 * lost:.2f}%")


if __name__ == "__main__":
    main()
