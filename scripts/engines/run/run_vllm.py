"""vLLM on the CPU. Options: dtype=float32, impl=auto|transformers.

In eager mode its rotary operator for CPUs is wrong for queries of three dimensions, for published models too; leaving that operator to
torch avoids it.
"""

import json
import os

for key, value in {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(key, value)

from engine import main


def cache_width(worker):
    caches = worker.model_runner.kv_caches
    return [type(worker.model_runner.get_model()).__name__, list(caches[0].shape) if caches else None]


def run(folder, prompts, windows, new, options):
    from vllm import LLM, SamplingParams

    longest = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    llm = LLM(
        model=str(folder), dtype=options.get("dtype", "float32"), model_impl=options.get("impl", "auto"), enforce_eager=True,
        max_model_len=min(512, longest), max_num_seqs=8, enable_prefix_caching=False, seed=0, disable_log_stats=True,
        skip_tokenizer_init=True, max_num_batched_tokens=1024,
        compilation_config={"custom_ops": ["all", "-rotary_embedding"]},
    )
    name, shape = llm.collective_rpc(cache_width)[0]
    greedy = lambda **more: SamplingParams(temperature=0, detokenize=False, **more)
    out = llm.generate([{"prompt_token_ids": p} for p in prompts], greedy(max_tokens=new, ignore_eos=True), use_tqdm=False)
    made = [list(o.outputs[0].token_ids) for o in out]
    windows = [w[: longest - 1] for w in windows]
    out = llm.generate([{"prompt_token_ids": w} for w in windows], greedy(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    nats = [[-o.prompt_logprobs[i][t].logprob for i, t in enumerate(o.prompt_token_ids) if i] for o in out]
    return {"continuations": made, "losses": nats, "cache": shape[-1] if shape else None, "note": name}


if __name__ == "__main__":
    main(run)
