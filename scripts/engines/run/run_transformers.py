"""Stock transformers on the CPU: the reference, and an engine to judge. Option: dtype=float32."""

import torch
import transformers
from engine import losses, main
from transformers import AutoModelForCausalLM

MAJOR, MINOR = map(int, transformers.__version__.split(".")[:2])
# Release 5.24 renamed the cache.
CACHE = "cache" if (MAJOR, MINOR) >= (5, 24) else "past_key_values"


def run(folder, prompts, windows, new, options):
    torch.set_grad_enabled(False)
    dtype = {"dtype" if MAJOR >= 5 else "torch_dtype": getattr(torch, options.get("dtype", "float32"))}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code="remote" in options, **dtype).eval()
    made, cache = [], None
    for prompt in prompts:
        ids, line, cache = torch.tensor([prompt]), [], None
        for _ in range(new):
            out = model(ids, use_cache=True, **{CACHE: cache})
            cache = getattr(out, CACHE)
            line.append(int(out.logits[0, -1].float().argmax()))
            ids = torch.tensor([line[-1:]])
        made.append(line)
    nats = [losses(model(torch.tensor([w]), use_cache=False).logits[0].float().numpy(), w) for w in windows]
    layers = getattr(cache, "layers", None)
    values = None
    if layers:
        values = sum(t.shape[1] * t.shape[-1] for t in (layers[0].keys, layers[0].values) if t is not None)
    return {"continuations": made, "losses": nats, "cache": values, "note": type(model).__name__}


main(run)
