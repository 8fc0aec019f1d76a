#!/usr/bin/env python3
"""Converts the pico fixtures with `--target hf-remote` and puts the class written beside the weights through what people do.

    python scripts/engines/check_remote.py                      # in the transformers that is installed, about two minutes
    python scripts/engines/check_remote.py --cases gemma2 qwen3 --checks generate padding
    scripts/engines/transformers.sh                             # in every pinned version

Each check compares two ways to the same result: the source in stock transformers, the same call without a cache, one row
of a batch alone, eager attention, ... Prints a line per conversion and a table of the worst figure of each check. Exit 1 when
anything fails. Needs a release build, torch, accelerate; peft for one of the checks.
"""

import argparse
import builtins
import copy
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

ROOT = Path(__file__).resolve().parents[2]
MAJOR = int(transformers.__version__.split(".")[0])
DTYPE = "dtype" if MAJOR >= 5 else "torch_dtype"
# What calls and outputs name the cache.
CACHE = "cache" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else "past_key_values"
OTHER = "past_key_values" if CACHE == "cache" else "cache"
TEXT = "The river bends twice before it meets the sea, and the town lies in the second bend. " * 12


@dataclass(frozen=True)
class Case:
    """A conversion: a fixture, changes to its config, options of `convert`."""

    name: str
    fixture: str
    options: tuple[str, ...] = ("--method", "exact")
    config: dict = field(default_factory=dict)
    # Whether the fixture is given the tokenizer of pico-trained, which calibration needs.
    reads: bool = False

    @property
    def exact(self) -> bool:
        return "exact" in self.options


EXACT = ["llama", "llama3", "mha", "qwen2", "qwen3", "qwen3-moe", "gemma2", "olmo2", "granite", "phi3", "phi3-long",
         "mixtral", "qwen2-moe", "mistral"]
CASES = [Case(name, f"pico-{name}") for name in EXACT] + [
    Case("mistral-window", "pico-mistral", config={"sliding_window": 7}),
    Case("trained-aware", "pico-trained", ("--kv-budget", "50%")),
    Case("trained-transmla", "pico-trained", ("--method", "transmla", "--kv-budget", "50%", "--q-lora-rank", "64")),
    Case("trained-narrow", "pico-trained", ("--method", "mha2mla", "--kv-budget", "25%")),
    Case("trained-hybrid", "pico-trained", ("--method", "x-ecomla", "--mla-layers", "0,2")),
    Case("qwen2-hybrid", "pico-qwen2", ("--method", "x-ecomla", "--mla-layers", "1"), reads=True),
    Case("qwen3-hybrid", "pico-qwen3", ("--method", "x-ecomla", "--mla-layers", "1"), reads=True),
    Case("gemma2-hybrid", "pico-gemma2", ("--method", "mha2mla", "--mla-layers", "1"), reads=True),
    Case("olmo2-hybrid", "pico-olmo2", ("--method", "mha2mla", "--mla-layers", "0", "--partial-rope", "2-norm"), reads=True),
    Case("phi3-hybrid", "pico-phi3", ("--method", "mha2mla", "--mla-layers", "1"), reads=True),
    Case("mixtral-hybrid", "pico-mixtral", ("--method", "x-ecomla", "--mla-layers", "0"), reads=True),
]


class Failed(Exception):
    """A check that did not hold."""


class Skipped(Exception):
    """A check that has nothing to look at here."""


def within(figure: float, limit: float, what: str = "differs") -> float:
    if not figure <= limit:
        raise Failed(f"{what} by {figure:.3g}, allowed {limit:g}")
    return figure


def same(a, b, what: str) -> float:
    if a != b:
        raise Failed(f"{what}: {a} against {b}")
    return 0.0


def difference(a, b) -> float:
    return (a.float() - b.float()).abs().max().item()


def load(folder, dtype=torch.float32, **options):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **{DTYPE: dtype, **options}
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            raise Failed(f"{problem}: {info[problem]}")
    return model.eval()


class Loaded:
    """A source and its conversion, with tokens to run them on."""

    def __init__(self, case: Case, source: Path, folder: Path, scratch: Path, binary: Path):
        self.case, self.source, self.folder, self.scratch, self.binary = case, source, folder, scratch, binary
        self.config = json.loads((folder / "config.json").read_text())
        generator = torch.Generator().manual_seed(7)
        self.ids = torch.randint(3, self.config["vocab_size"], (3, 24), generator=generator)

    @cached_property
    def model(self):
        return load(self.folder)

    @cached_property
    def stock(self):
        return load(self.source, attn_implementation="eager")

    def fresh(self):
        return copy.deepcopy(self.model)

    @property
    def switches(self) -> bool:
        """Whether frequencies change within the tokens of a check."""
        return (self.config.get("original_max_position_embeddings") or 10**9) < 48

    @property
    def crosses(self) -> bool:
        """Whether generation from a prompt of five tokens passes that place."""
        return self.switches

    @property
    def windowed(self) -> bool:
        return self.config.get("window_size") is not None


@torch.no_grad()
def logits(model, ids, **options):
    return model(input_ids=ids, use_cache=False, **options).logits


@torch.no_grad()
def greedy(model, ids, new: int, **options) -> list[list[int]]:
    """Greedy continuations of rows of equal length by `generate`."""
    options.setdefault("attention_mask", torch.ones_like(ids))
    out = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **options)
    return out[:, ids.shape[1] :].tolist()


@torch.no_grad()
def recomputed(model, ids, new: int, suppress=()) -> list[list[int]]:
    """The same by hand: every token from the whole text before it."""
    for _ in range(new):
        last = logits(model, ids)[:, -1]
        for token in suppress:
            last[:, token] = float("-inf")
        ids = torch.cat((ids, last.argmax(-1, keepdim=True)), 1)
    return ids[:, -new:].tolist()


def end_tokens(model) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


# ------------------------------------------------------------------------------------------------------------- checks


def equals_source(x: Loaded) -> float:
    """Logits against the source in stock transformers, or the mean loss against that of the tool's own runtime."""
    if x.case.exact:
        scale = max(1.0, logits(x.stock, x.ids).abs().max().item())
        return within(difference(logits(x.model, x.ids), logits(x.stock, x.ids)) / scale, 1e-4, "a logit differs")
    text = x.scratch / "text.txt"
    text.write_text(TEXT)
    made = subprocess.run([x.binary, "eval", x.folder, "--text", text, "--seq-len", "48", "--windows", "4", "--json"],
                          capture_output=True, text=True, check=True)
    ids = AutoTokenizer.from_pretrained(x.folder, trust_remote_code=True)(TEXT, add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: 48 * 4]).view(4, 48)
    ours = F.cross_entropy(logits(x.model, windows)[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).item()
    return within(abs(ours - json.loads(made.stdout)["nll_nats_per_token"]), 1e-4, "the loss differs")


def plain_call(x: Loaded) -> float:
    """No arguments but tokens: a cache comes back, `use_cache=False` gives none, a tuple where one is asked for."""
    with torch.no_grad():
        out = x.model(x.ids)
        bare = x.model(x.ids, use_cache=False)
        parts = x.model(x.ids, return_dict=False)
    if out[CACHE] is None or out.past_key_values is None or out[CACHE].get_seq_length() != x.ids.shape[1]:
        raise Failed("no cache comes back")
    if bare.get(CACHE) is not None:
        raise Failed("a cache comes back that was not asked for")
    if not isinstance(parts, tuple):
        raise Failed("return_dict=False gives no tuple")
    return within(max(difference(out.logits, bare.logits), difference(out.logits, parts[0])), 0)


def generate(x: Loaded) -> float:
    """Greedy `generate` with a cache, without, and by hand, and by the source where the conversion is exact."""
    prompt, new = x.ids[:1, :5], 24
    ends = end_tokens(x.model)
    by_hand = recomputed(x.model, prompt, new, ends)
    same(greedy(x.model, prompt, new, use_cache=True), by_hand, "with a cache, and recomputed")
    same(greedy(x.model, prompt, new, use_cache=False), by_hand, "without a cache, and recomputed")
    if x.case.exact:
        same(greedy(x.stock, prompt, new, use_cache=False), by_hand, "by the source, and converted")
    return 0.0


def decode(x: Loaded) -> float:
    """Logits token by token, and in pieces, over a cache."""
    ids = x.ids[:, : x.config["original_max_position_embeddings"]] if x.switches else x.ids
    expected, worst = logits(x.model, ids), 0.0
    for piece in (1, 5, 8):
        cache, made = None, []
        for at in range(0, ids.shape[1], piece):
            with torch.no_grad():
                out = x.model(ids[:, at : at + piece], use_cache=True, **{CACHE: cache})
            cache = out[CACHE]
            made.append(out.logits)
        worst = max(worst, difference(torch.cat(made, 1), expected))
    return within(worst, 2e-4, "a logit over a cache differs")


def latent_layers(model) -> list:
    """Attention modules that can read latents without expanding them."""
    return [m for m in model.modules() if hasattr(m, "absorbs")]


def absorbing(x: Loaded) -> float:
    """Both ways to attend to a cache, each made to be taken: expanding the latents, and bringing queries to them."""
    model, made = x.fresh(), []
    for absorbs in (True, False):
        for layer in latent_layers(model):
            layer.absorbs = lambda *_, absorbs=absorbs: absorbs
        with torch.no_grad():
            past = model(x.ids[:, :9], use_cache=True)[CACHE]
            made.append(model(x.ids[:, 9:12], use_cache=True, **{CACHE: past}).logits)
    if torch.equal(*made):
        raise Failed("both ways give the same bits: one of them was not taken")
    return within(difference(*made), 2e-4, "a logit differs")


def latent_cache(x: Loaded) -> float:
    """What the cache holds: the latent and one key per token and layer, or the source's keys and values in kept layers."""
    c = x.config
    tokens = x.ids.shape[1]
    with torch.no_grad():
        cache = x.model(x.ids)[CACHE]
    kept = set((c.get("gqa") or {}).get("layers", ()))
    for layer in range(c["num_hidden_layers"]):
        held = sum(part.numel() for part in (cache.layers[layer].keys, cache.layers[layer].values)) / len(x.ids)
        window = c["window_size"] if x.windowed and c["window_layers"][layer] else None
        stays = tokens if window is None else min(tokens, window - 1)
        width = c["kv_lora_rank"] + c["qk_rope_head_dim"]
        if layer in kept:
            width = 2 * c["gqa"]["num_key_value_heads"] * c["gqa"]["head_dim"]
        same(held, stays * width, f"values held in layer {layer}")
    report = json.loads((x.folder / "conversion.json").read_text())
    mla = report["cache_values_per_token_per_layer"]
    same(mla, c["kv_lora_rank"] + c["qk_rope_head_dim"], "the report's cache")
    return 0.0


def padding(x: Loaded) -> float:
    """A batch of prompts of several lengths, padded on the left, against each alone; and padded on the right."""
    lengths, new = (4, 9, 12), 6
    prompts = [row[:n] for row, n in zip(x.ids, lengths)]
    left = torch.stack([F.pad(p, (max(lengths) - len(p), 0)) for p in prompts])
    mask = torch.stack([F.pad(torch.ones_like(p), (max(lengths) - len(p), 0)) for p in prompts])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        batch = x.model(left, attention_mask=mask, position_ids=positions).logits
        shifted = x.model(left, attention_mask=mask).logits
        right = torch.stack([F.pad(p, (0, max(lengths) - len(p))) for p in prompts])
        right_mask = torch.stack([F.pad(torch.ones_like(p), (0, max(lengths) - len(p))) for p in prompts])
        right = x.model(right, attention_mask=right_mask).logits
    if not bool(torch.isfinite(batch).all()):
        raise Failed("logits of padding are not finite")
    worst = 0.0
    for row, prompt in enumerate(prompts):
        alone = logits(x.model, prompt[None])[0]
        worst = max(worst, difference(batch[row, -len(prompt) :], alone), difference(shifted[row, -len(prompt) :], alone),
                    difference(right[row, : len(prompt)], alone))
    within(worst, 2e-4, "a logit of a padded row differs")
    if x.crosses:  # rows of a batch switch frequencies together
        return worst
    together = greedy(x.model, left, new, attention_mask=mask)
    for row, prompt in enumerate(prompts):
        same(together[row], greedy(x.model, prompt[None], new)[0], f"row {row} of a padded batch, and alone")
    return worst


def round_trip(x: Loaded) -> float:
    """`save_pretrained` and back: the same bits, and the code is carried along."""
    folder = x.scratch / "saved"
    x.model.save_pretrained(folder)
    if not (folder / "modeling_gqa2mla.py").exists():
        raise Failed("the code was not carried along")
    again = load(folder)
    worst = within(difference(logits(again, x.ids), logits(x.model, x.ids)), 0, "a logit of the saved model differs")
    # A model that is loaded by its class, and a second generation.
    twice = x.scratch / "twice"
    type(again).from_pretrained(folder, **{DTYPE: torch.float32}).save_pretrained(twice)
    if (twice / "modeling_gqa2mla.py").read_text() != (x.folder / "modeling_gqa2mla.py").read_text():
        raise Failed("the code changed on its way")
    within(difference(logits(load(twice), x.ids), logits(x.model, x.ids)), 0, "a logit of the twice saved model differs")
    # By the file itself, without the automatic classes.
    spec = importlib.util.spec_from_file_location("modeling_gqa2mla", x.folder / "modeling_gqa2mla.py")
    module = sys.modules["modeling_gqa2mla"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    direct = x.scratch / "direct"
    module.Gqa2MlaForCausalLM.from_pretrained(x.folder, **{DTYPE: torch.float32}).save_pretrained(direct)
    within(difference(logits(load(direct), x.ids), logits(x.model, x.ids)), 0, "a logit of the model saved by its class differs")
    inspected = subprocess.run([x.binary, "inspect", twice, "--json"], capture_output=True, text=True)
    if inspected.returncode:
        raise Failed(f"inspect of the saved folder: {inspected.stderr.strip()}")
    return worst


def gradients(model, ids) -> tuple[float, dict]:
    model.train()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.loss.item(), grads


def apart(a: dict, b: dict) -> float:
    same(sorted(a), sorted(b), "parameters with gradients")
    scale = max(g.abs().max().item() for g in a.values())
    return max(difference(a[name], b[name]) for name in a) / scale


def checkpointing(x: Loaded) -> float:
    """Gradients with and without gradient checkpointing, of both kinds; every parameter has one."""
    model = x.fresh()
    plain = gradients(model, x.ids)
    idle = [n for n, p in model.named_parameters() if n not in plain[1] and "experts." not in n]
    if idle:
        raise Failed(f"no gradient reaches {idle}")
    worst = 0.0
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        runs = []
        counted = [m.register_forward_hook(lambda *_: runs.append(1)) for m in model.modules() if hasattr(m, "o_proj")]
        saved = gradients(model, x.ids)
        same(len(runs), 2 * x.config["num_hidden_layers"], "runs of attention, there and back")
        for hook in counted:
            hook.remove()
        same(saved[0], plain[0], "losses")
        worst = max(worst, apart(saved[1], plain[1]))
    # What was switched on for training must not be in the way of generation.
    with torch.no_grad():
        same(greedy(model.eval(), x.ids[:1, :5], 4), greedy(x.model, x.ids[:1, :5], 4), "generated while checkpointing is on")
    return within(worst, 1e-6, "a gradient differs, of the largest,")


def sdpa_and_eager(x: Loaded) -> float:
    """Fused attention against plain: logits, logits over a cache with padding, gradients."""
    fused, plain = load(x.folder, attn_implementation="sdpa"), load(x.folder, attn_implementation="eager")
    same(fused.config._attn_implementation, "sdpa", "attention")
    mask = torch.ones_like(x.ids)
    mask[0, :7] = 0
    worst = max(difference(logits(fused, x.ids), logits(plain, x.ids)),
                difference(logits(fused, x.ids, attention_mask=mask), logits(plain, x.ids, attention_mask=mask)))
    within(worst, 2e-4, "a logit differs")
    if not x.crosses:
        same(greedy(fused, x.ids[:2, :5], 12), greedy(plain, x.ids[:2, :5], 12), "continuations of both")
    within(apart(gradients(fused, x.ids)[1], gradients(plain, x.ids)[1]), 1e-4, "a gradient differs, of the largest,")
    return worst


def half_precision(x: Loaded) -> float:
    """bf16 and f16, both kinds of attention: the loss of f32, and finite gradients."""
    worst = 0.0
    expected = x.model(x.ids, labels=x.ids).loss.item()
    for dtype in (torch.bfloat16, torch.float16):
        for attention in ("sdpa", "eager"):
            model = load(x.folder, dtype, attn_implementation=attention)
            same({p.dtype for p in model.parameters()}, {dtype}, "dtypes of weights")
            loss, grads = gradients(model, x.ids)
            if not all(bool(torch.isfinite(g).all()) for g in grads.values()):
                raise Failed(f"gradients in {dtype} are not finite")
            worst = max(worst, abs(loss - expected))
            made = greedy(model.eval(), x.ids[:2, :5], 6)
            same([len(row) for row in made], [6, 6], "generated tokens")
    return within(worst, 0.06, "the loss in 16 bits differs")


def device_map(x: Loaded) -> float:
    """accelerate's placement on the CPU, and layers whose weights wait on the disk."""
    worst = 0.0
    layers = x.config["num_hidden_layers"]
    disk = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    disk |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(layers)}
    for placed in ("auto", {"": "cpu"}, disk):
        folder = x.scratch / "offload"
        model = load(x.folder, device_map=placed, offload_folder=folder if placed is disk else None)
        worst = max(worst, difference(logits(model, x.ids), logits(x.model, x.ids)))
        same(greedy(model, x.ids[:1, :5], 8), greedy(x.model, x.ids[:1, :5], 8), f"continuations with device_map {placed}")
        shutil.rmtree(folder, ignore_errors=True)
    return within(worst, 1e-6, "a logit differs")


def labels(x: Loaded) -> float:
    """`labels=`: the mean loss of the next token, `-100` left out, and a sum where the trainer says by what to divide."""
    wanted = x.ids.clone()
    wanted[0, :9] = -100
    with torch.no_grad():
        out = x.model(x.ids, labels=wanted)
        part = x.model(x.ids, labels=wanted, num_items_in_batch=10)
    targets = wanted[:, 1:].flatten()
    losses = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), targets, reduction="sum")
    return within(max(abs(out.loss.item() - losses.item() / (targets != -100).sum().item()),
                      abs(part.loss.item() - losses.item() / 10)), 1e-5, "the loss differs")


def hidden_states(x: Loaded) -> float:
    """`output_hidden_states`: one state more than layers, the last what the head reads. `output_attentions`: sums of one."""
    with torch.no_grad():
        out = x.model(x.ids, output_hidden_states=True)
        same(len(out.hidden_states), x.config["num_hidden_layers"] + 1, "states")
        head = x.model.lm_head(out.hidden_states[-1]) * x.config["logit_multiplier"]
        weights = x.model(x.ids, output_attentions=True).attentions
    if x.config["logit_softcap"]:
        head = torch.tanh(head / x.config["logit_softcap"]) * x.config["logit_softcap"]
    same(len(weights), x.config["num_hidden_layers"], "attention weights")
    for w in weights:
        same(tuple(w.shape), (len(x.ids), x.config["num_attention_heads"], x.ids.shape[1], x.ids.shape[1]), "weights")
        within(difference(w.sum(-1), torch.ones(())), 1e-5, "the sum of attention weights differs from one")
    base = AutoModel.from_pretrained(x.folder, trust_remote_code=True, **{DTYPE: torch.float32}).eval()
    with torch.no_grad():
        within(difference(base(x.ids).last_hidden_state, out.hidden_states[-1]), 1e-6, "a state of the base model differs")
    same(x.model(x.ids).hidden_states, None, "states that were not asked for")
    return within(difference(head, out.logits), 1e-5, "the last state differs")


def logits_to_keep(x: Loaded) -> float:
    """Logits of the last positions, or of those named."""
    full, places = logits(x.model, x.ids), torch.tensor([2, 5])
    return within(max(difference(logits(x.model, x.ids, logits_to_keep=3), full[:, -3:]),
                      difference(logits(x.model, x.ids, logits_to_keep=places), full[:, places])), 1e-6)


def inputs_embeds(x: Loaded) -> float:
    """Embeddings in place of tokens."""
    table = x.model.get_input_embeddings()
    with torch.no_grad():
        worst = difference(x.model(inputs_embeds=table(x.ids)).logits, logits(x.model, x.ids))
        if not x.crosses:
            made = x.model.generate(inputs_embeds=table(x.ids[:1, :5]), max_new_tokens=8, min_new_tokens=8, do_sample=False,
                                    attention_mask=torch.ones(1, 5, dtype=torch.long), pad_token_id=0)
            same(made[:, -8:].tolist(), greedy(x.model, x.ids[:1, :5], 8), "continuations of embeddings and of tokens")
    try:
        x.model(x.ids, inputs_embeds=table(x.ids))
    except ValueError:
        return within(worst, 0)
    raise Failed("tokens and embeddings together are taken")


def caches(x: Loaded) -> float:
    """Beams, prompt lookup (several tokens at once, rolled back), and static caches, against the plain cache."""
    prompt = x.ids[:2, :5].repeat(1, 2)
    if not x.crosses:
        same(greedy(x.model, prompt, 10, num_beams=3), greedy(x.model, prompt, 10, num_beams=3, use_cache=False),
             "beams with and without a cache")
    if not x.windowed and not x.crosses:  # a window cannot be rolled back, in stock models neither
        one = prompt[:1]
        same(greedy(x.model, one, 12, prompt_lookup_num_tokens=3), greedy(x.model, one, 12), "prompt lookup")
    if MAJOR < 5:
        widths = {x.config["kv_lora_rank"], x.config["qk_rope_head_dim"]}
        try:
            greedy(x.model, prompt, 2, cache_implementation="static")
        except ValueError as e:
            if len(widths) == 1 or "transformers 5" not in str(e):
                raise
            return 0.0
        same(len(widths), 1, "a static cache of transformers 4 was taken for several widths")
    same(greedy(x.model, prompt, 10, cache_implementation="static"), greedy(x.model, prompt, 10), "a static cache")
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    if not x.crosses:
        same(greedy(x.model, prompt, 10, cache_implementation="static", attention_mask=mask),
             greedy(x.model, prompt, 10, attention_mask=mask), "a static cache with padding")
    cache = StaticCache(config=x.model.config, max_cache_len=32)
    with torch.no_grad():
        made = x.model(x.ids[:, :10], use_cache=True, **{CACHE: cache}).logits
    return within(difference(made, logits(x.model, x.ids[:, :10])), 2e-4, "a logit over a static cache differs")


def arguments(x: Loaded) -> float:
    """Both names of the cache work; two caches, and arguments that are not known, are errors."""
    first, rest = x.ids[:, :8], x.ids[:, 8:12]
    expected = None
    with torch.no_grad():
        for name in (CACHE, OTHER):
            past = x.model(first, use_cache=True)[CACHE]
            made = x.model(rest, use_cache=True, **{name: past})
            same(made[CACHE] is past, True, "the cache that was given comes back")
            expected = made.logits if expected is None else expected
            within(difference(made.logits, expected), 1e-5, f"{name}= differs")
    for bad in ({"no_such_argument": 1}, {"cache": DynamicCache(), "past_key_values": DynamicCache()},
                {"is_causal": False}, {"head_mask": torch.ones(1)}, {"output_router_logits": True}):
        try:
            x.model(first, **bad)
        except TypeError:
            continue
        raise Failed(f"{sorted(bad)} is taken without a word")
    with torch.no_grad():
        quiet = x.model(first, token_type_ids=torch.zeros_like(first), output_router_logits=False).logits
    try:
        x.model(rest, attention_mask=torch.ones_like(rest), **{CACHE: x.model(first, use_cache=True)[CACHE]})
    except ValueError:
        return within(difference(quiet, logits(x.model, first)), 0)
    raise Failed("an attention mask that leaves out cached tokens is taken")


def packed(x: Loaded) -> float:
    """Two texts in one row, told apart by their positions."""
    a, b = x.ids[:1, :7], x.ids[1:2, :10]
    row = torch.cat((a, b), 1)
    positions = torch.cat((torch.arange(7), torch.arange(10)))[None]
    with torch.no_grad():
        made = x.model(row, position_ids=positions, use_cache=False).logits
    return within(max(difference(made[:, :7], logits(x.model, a)), difference(made[:, 7:], logits(x.model, b))), 2e-4)


def resize(x: Loaded) -> float:
    """A larger vocabulary: the old logits stay, and the model can be saved and trained."""
    model = x.fresh()
    size = x.config["vocab_size"]
    model.resize_token_embeddings(size + 5)
    same(logits(model, x.ids).shape[-1], size + 5, "logits")
    folder = x.scratch / "resized"
    model.save_pretrained(folder)
    again = load(folder)
    gradients(again, x.ids + 5)
    return within(difference(logits(again.eval(), x.ids)[..., :size], logits(x.model, x.ids)), 1e-6, "a logit differs")


def adapters(x: Loaded) -> float:
    """LoRA on every linear layer: what is trained counts over a cache too, and merging changes nothing."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise Skipped("peft is not installed") from None
    torch.manual_seed(0)
    model = get_peft_model(x.fresh(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    model.eval()
    for layer in latent_layers(model):
        layer.absorbs = lambda *_: True
    prompt, worst = x.ids[:2, :6], 0.0
    changed = difference(logits(model, x.ids), logits(x.model, x.ids))
    if changed < 1e-3:
        raise Failed("adapters change nothing")
    same(greedy(model, prompt, 12), greedy(model, prompt, 12, use_cache=False), "with adapters, with and without a cache")
    before = logits(model, x.ids)
    worst = difference(logits(model.merge_and_unload(), x.ids), before)
    return within(worst, 2e-4 * max(1.0, before.abs().max().item()), "a logit of the merged model differs")


def card(x: Loaded) -> float:
    """The lines of the model card, as they stand, in the folder; those of the tokenizer where there is one."""
    lines = (x.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    tokenizer = (x.folder / "tokenizer.json").exists()
    if not tokenizer:
        lines = "".join(line + "\n" for line in lines.splitlines() if not line.startswith("tokenizer"))
    # What transformers asks on the terminal, such as whether to run custom code.
    questions, names = [], {}

    def ask(question=""):
        questions.append(question)
        raise EOFError

    folder, terminal = Path.cwd(), builtins.input
    builtins.input = ask
    os.chdir(x.folder)
    try:
        exec(compile(lines, "card", "exec"), names)  # noqa: S102: the lines are what is checked
    finally:
        os.chdir(folder)
        builtins.input = terminal
    if questions:
        raise Failed(f"the card's lines ask: {questions[0]!r}")
    if tokenizer:
        ids = names["tokenizer"](TEXT[:40], return_tensors="pt")
        same(names["model"].generate(**ids, max_new_tokens=4, min_new_tokens=4).shape[1], ids["input_ids"].shape[1] + 4, "made")
    return within(difference(logits(names["model"].float().eval(), x.ids), logits(x.model, x.ids)), 1e-6, "a logit differs")


CHECKS = [equals_source, plain_call, generate, decode, absorbing, latent_cache, padding, round_trip, checkpointing, sdpa_and_eager,
          half_precision, device_map, labels, hidden_states, logits_to_keep, inputs_embeds, caches, arguments, packed,
          resize, adapters, card]


# ---------------------------------------------------------------------------------------------------------------- run


def prepared(case: Case, work: Path) -> Path:
    """The source's folder: a fixture as it is, or a copy with another config or with the tokenizer of pico-trained."""
    fixture = ROOT / "fixtures" / case.fixture
    if not case.config and not case.reads:
        return fixture
    source = work / f"{case.name}-source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    config = json.loads((fixture / "config.json").read_text()) | case.config
    tensors = {}
    for file in fixture.glob("model*.safetensors"):
        tensors |= load_file(file)
    if case.reads:
        trained = ROOT / "fixtures/pico-trained"
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(trained / file, source)
        config["vocab_size"] = json.loads((trained / "config.json").read_text())["vocab_size"]
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                # Rows over again, a little apart from the first ones, so that no two tokens are the same.
                rows = torch.arange(config["vocab_size"])
                old = tensors[name]
                new = old[rows % len(old)].float() * (1 + 0.3 * (rows // len(old))[:, None])
                tensors[name] = new.to(old.dtype).contiguous()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config))
    return source


def convert(case: Case, source: Path, out: Path, binary: Path) -> None:
    """Convert, unless an earlier run left the folder."""
    if out.exists():
        return
    options = ["--dtype", "f32", "--force"]
    if not case.exact:
        options += ["--calib-samples", "8", "--calib-seq-len", "48"]
    done = subprocess.run([binary, "convert", source, "-o", out, "--target", "hf-remote", *case.options, *options, "-q"],
                          capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case.name}: {done.stderr.strip()}")


def run(case: Case, work: Path, binary: Path, wanted: list) -> dict:
    """Figure or complaint of every check of one conversion."""
    source, out = prepared(case, work), work / case.name
    convert(case, source, out, binary)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        x = Loaded(case, source, out, Path(scratch), binary)
        for check in wanted:
            try:
                found[check.__name__] = check(x)
            except Skipped:
                found[check.__name__] = None
            except Failed as e:
                found[check.__name__] = str(e)
            except Exception as e:  # noqa: BLE001: whatever goes wrong is a failure of this check
                where = traceback.extract_tb(e.__traceback__)[-1]
                found[check.__name__] = f"{type(e).__name__}: {e} ({Path(where.filename).name}:{where.lineno})"
            for p in x.model.parameters():
                p.grad = None
    return found


def table(files: list[Path]) -> None:
    """Worst figure of each check in each version, from what `--json` wrote."""
    runs = [json.loads(file.read_text()) for file in files]
    names = list(dict.fromkeys(name for run in runs for found in run["results"].values() for name in found))
    rows = [["", *(run["transformers"] for run in runs)]]
    for name in names:
        row = [name]
        for run in runs:
            values = [found[name] for found in run["results"].values() if name in found]
            bad = sum(isinstance(v, str) for v in values)
            figures = [v for v in values if isinstance(v, float | int)]
            row.append(f"{bad} FAILED" if bad else f"{max(figures):.1e}" if figures else "-")
        rows.append(row)
    rows.append(["conversions", *(str(len(run["results"])) for run in runs)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/gqa2mla")
    parser.add_argument("--work", type=Path, help="keep conversions here, and take those that are there")
    parser.add_argument("--cases", nargs="*", metavar="CASE", choices=[c.name for c in CASES])
    parser.add_argument("--checks", nargs="*", metavar="CHECK", choices=[c.__name__ for c in CHECKS])
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--table", type=Path, nargs="+", metavar="JSON", help="only print such files side by side")
    args = parser.parse_args()
    if args.table:
        table(args.table)
        return 0
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    wanted = [c for c in CHECKS if not args.checks or c.__name__ in args.checks]
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = (args.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        for case in CASES:
            if args.cases and case.name not in args.cases:
                continue
            found = results[case.name] = run(case, work, args.binary.resolve(), wanted)
            bad = {name: v for name, v in found.items() if isinstance(v, str)}
            print(f"{case.name:18} {len(found) - len(bad):2} of {len(found)} checks hold", flush=True)
            for name, complaint in bad.items():
                print(f"    {name}: {complaint}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__,
                                         "results": results}, indent=1))
    print(f"\ntransformers {transformers.__version__}, torch {torch.__version__}")
    failures = 0
    for check in wanted:
        values = [found[check.__name__] for found in results.values()]
        bad = sum(isinstance(v, str) for v in values)
        figures = [v for v in values if isinstance(v, float | int)]
        failures += bad
        worst = f"{max(figures):.1e}" if figures else "-"
        print(f"  {check.__name__:16} {len(figures):3} hold  worst {worst:>8}{f'  {bad} FAILED' if bad else ''}")
    print(f"{failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
