"""MLX-LM on the CPU. Option: dtype=float32."""

import mlx.core as mx
import numpy as np
from engine import losses, main
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def run(folder, prompts, windows, new, options):
    mx.set_default_device(mx.cpu)
    dtype = getattr(mx, options.get("dtype", "float32"))
    model, _ = load_model(folder, lazy=False)
    cast = lambda x: x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x
    model.update(tree_map(cast, model.parameters()))
    made, cache = [], None
    for prompt in prompts:
        cache, ids, line = make_prompt_cache(model), prompt, []
        for _ in range(new):
            ids = [int(mx.argmax(model(mx.array([ids]), cache=cache)[0, -1]))]
            line += ids
        made.append(line)
    nats = [losses(np.array(model(mx.array([w]))[0].astype(mx.float32)), w) for w in windows]
    first = cache[0]
    values = sum(t.shape[1] * t.shape[-1] for t in (first.keys, first.values))
    return {"continuations": made, "losses": nats, "cache": values, "note": type(model).__module__.rsplit(".")[-1]}


main(run)
