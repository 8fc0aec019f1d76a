"""Multi-head latent attention for models whose other parts no stock class of transformers has.

`gqa2mla convert --target hf-remote` writes this file beside the weights; load the folder with `trust_remote_code=True`.
One class serves every such model: what it has, its `config.json` says. The cache holds `kv_lora_rank + qk_rope_head_dim`
values per token and layer: the latent and one rotated key that all heads share. Some layers may keep the grouped-query
attention of the source (`gqa`), with its own cache.

Shapes: B sequences, T new tokens, S tokens that can be seen (cached and new), H heads, D hidden values, r latent values,
N and R plain and rotated values of a query or key head, V values of a value head.

Tested with transformers 4.57.6, 5.0.0, 5.18.0 and 5.24.0.
"""

import dataclasses
import inspect
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

# ---------------------------------------------------------------------------------------------------------------------
# Everything in which versions of transformers differ.

try:
    from transformers import PreTrainedConfig
except ImportError:  # 4.x
    from transformers import PretrainedConfig as PreTrainedConfig

# What arguments and outputs call the cache: `cache` from 5.24 on.
CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"
# Whether a static cache has to be told where new entries go (it counts for itself in later 5.x).
CACHE_IS_TOLD_PLACES = "cache_kwargs" in inspect.signature(Cache.update).parameters


def append_to_cache(cache: Cache, a: Tensor, b: Tensor, layer: int, places: Tensor) -> tuple[Tensor, Tensor]:
    """Add `a` [B, G, T, x] and `b` [B, G, T, y] of one layer at `places` [T]; what the layer now sees of both."""
    if cache.is_compileable and CACHE_IS_TOLD_PLACES and a.shape[-1] != b.shape[-1]:
        from transformers.cache_utils import StaticLayer

        if "value_states" not in inspect.signature(StaticLayer.lazy_initialization).parameters:
            raise ValueError(
                "static caches of transformers 4 hold keys and values of one width only, and a latent is not as wide as a "
                "rotated key. hint: use the default (dynamic) cache, or transformers 5"
            )
    return cache.update(a, b, layer, {"cache_position": places}) if CACHE_IS_TOLD_PLACES else cache.update(a, b, layer)


# ---------------------------------------------------------------------------------------------------------------------

# Every key of the config with the value it has where a model does not need it.
DEFAULTS: dict[str, Any] = dict(
    vocab_size=32000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=2048, rms_norm_eps=1e-6, hidden_act="silu", mlp_bias=False, initializer_range=0.02,
    use_cache=True, attention_dropout=0.0,
    kv_lora_rank=32, q_lora_rank=None, qk_nope_head_dim=0, qk_rope_head_dim=32, v_head_dim=16,
    attention_bias=False, query_bias=False, attention_scale=1.0,
    # Radians per token of each rotated pair (2p, 2p + 1), and those that take over past the original context.
    rotary_frequencies=None, rotary_frequencies_long=None, original_max_position_embeddings=None,
    # "head": each of the source's heads, of `qk_norm_width` values, by itself; "all": all heads together.
    qk_norm=None, qk_norm_width=None,
    # Scores and logits become `cap * tanh(x / cap)`.
    score_softcap=None, logit_softcap=None,
    embedding_multiplier=1.0, residual_multiplier=1.0, logit_multiplier=1.0,
    # Norms before attention and MLP, and on what they add to the stream.
    input_norm=True, post_norm=True, attention_out_norm=False, mlp_out_norm=False,
    # Layers that keep grouped-query attention as the source has it: `layers` (indices), `num_key_value_heads`, `head_dim`,
    # `rotary_dim` (the first values of a head, pairs (j, j + rotary_dim / 2)), `rotary_frequencies`, `rotary_amplitude`,
    # `attention_scale`, `qkv_bias`, `out_bias`, `qk_norm`.
    gqa=None,
    # Layers in `window_layers` see the latest `window_size` tokens.
    window_size=None, window_layers=None,
    # Experts: in every layer that is not in `dense_layers`, where there are any.
    n_routed_experts=None, num_experts_per_tok=None, moe_intermediate_size=None, norm_topk_prob=False,
    shared_expert_intermediate_size=None, shared_expert_gate=False, dense_layers=None,
)


class Gqa2MlaConfig(PreTrainedConfig):
    """What a converted model consists of; `DEFAULTS` lists the keys."""

    model_type = "gqa2mla"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(self, **kwargs: Any):
        for key, default in DEFAULTS.items():
            setattr(self, key, kwargs.pop(key, default))
        kwargs.setdefault("tie_word_embeddings", False)
        self.num_key_value_heads = kwargs.pop("num_key_value_heads", self.num_attention_heads)
        self.head_dim = kwargs.pop("head_dim", self.qk_rope_head_dim)
        super().__init__(**kwargs)

    # Caches of transformers read these two: they keep no more than a window of the layers that see no more.

    @property
    def layer_types(self) -> list[str]:
        """`sliding_attention` or `full_attention` for each layer."""
        windows = (self.window_of(layer) for layer in range(self.num_hidden_layers))
        return ["full_attention" if w is None else "sliding_attention" for w in windows]

    @property
    def sliding_window(self) -> Optional[int]:
        """Tokens that layers with a window see, the present one included."""
        return self.window_size

    def window_of(self, layer: int) -> Optional[int]:
        """Tokens that `layer` sees; None: all."""
        return self.window_size if self.window_layers is not None and self.window_layers[layer] else None


class RMSNorm(nn.Module):
    """Values over the root of their mean square, times a weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, divisor: Optional[int] = None) -> Tensor:
        """The mean is over the last axis, or its sum over `divisor` where some of the values are padding."""
        wide = x.float()
        square = wide.pow(2).sum(-1, keepdim=True) / (divisor or x.shape[-1])
        return (wide * torch.rsqrt(square + self.eps) * self.weight.float()).to(x.dtype)


class Visibility:
    """Which tokens each new token sees.

    A cache hands a layer the latest S of `total` tokens, in order, or, a static one, room for S tokens of which the first
    `total` are taken: in both cases key j is token `max(total - S, 0) + j`.
    """

    def __init__(self, new: int, total: Union[int, Tensor], device: torch.device, given: Optional[Tensor] = None,
                 sequence: Optional[Tensor] = None):
        """`given` is an attention mask [B, total] or [B, 1, T, S], `sequence` [B, T] which of several sequences in a row
        each token is of."""
        self.new, self.total, self.device, self.sequence = new, total, device, sequence
        self.padding, self.ready = None, None
        self.made: dict[tuple, Tensor] = {}
        if given is None:
            return
        if given.dim() == 4:
            self.ready = given
        elif given.dim() != 2:
            raise ValueError(f"attention_mask has {given.dim()} axes, expected [batch, tokens] or [batch, 1, new, tokens]")
        elif isinstance(total, int) and given.shape[1] < total:
            raise ValueError(f"attention_mask is for {given.shape[1]} tokens, but {total} are cached or given")
        elif torch.compiler.is_compiling() or not bool(given.all()):
            self.padding = given.to(device=device, dtype=torch.bool)

    def is_plain(self, keys: int, window: Optional[int]) -> bool:
        """Whether every new token sees all that come before it, and nothing else is there."""
        if self.padding is not None or self.ready is not None or self.sequence is not None:
            return False
        everything = isinstance(self.total, int) and keys == self.total and self.new in (1, keys)
        return everything and (window is None or keys <= window)

    def mask(self, keys: int, window: Optional[int], device: torch.device) -> Tensor:
        """[B or 1, 1, T, S] for a layer that is handed `keys` tokens: True where a new token sees one of them."""
        if (keys, window, device) not in self.made:
            mask = self.build(keys, window) if self.ready is None else self.ready
            self.made[keys, window, device] = mask.to(device)
        return self.made[keys, window, device]

    def build(self, keys: int, window: Optional[int]) -> Tensor:
        query = self.total - self.new + torch.arange(self.new, device=self.device)[:, None]
        first = self.total - keys
        first = first.clamp(min=0) if isinstance(first, Tensor) else max(first, 0)
        key = first + torch.arange(keys, device=self.device)
        seen = key <= query
        if window is not None:
            seen = seen & (key > query - window)
        seen = seen[None]
        if self.padding is not None:
            there = self.padding[:, key.clamp(max=self.padding.shape[1] - 1)]
            # Padding sees itself, so that no row is empty: its softmax would not be a number.
            seen = (seen & there[:, None]) | (key == query)
        if self.sequence is not None:
            seen = seen & (self.sequence[:, :, None] == self.sequence[:, None])
        return seen[:, None]


class Context:
    """What the layers of one forward pass share. Layers may be on several devices."""

    def __init__(self, seen: Visibility, angles: dict[str, Tensor], cache: Optional[Cache], places: Tensor):
        """`angles` [B or 1, T, pairs] of `latent` layers and of `kept` ones, `places` [T] of new tokens in the cache."""
        self.seen, self.angles, self.cache, self.places = seen, angles, cache, places
        # Attention weights [B, H, T, S] of each layer, where they are asked for.
        self.weights: Optional[list[Tensor]] = None
        self.made: dict[tuple, tuple[Tensor, Tensor]] = {}

    def turns(self, kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles of one kind of layer."""
        if (kind, device) not in self.made:
            angles = self.angles[kind].to(device)
            self.made[kind, device] = angles.cos(), angles.sin()
        return self.made[kind, device]

    def append(self, a: Tensor, b: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Add to the cache what a layer made of the new tokens, [B, G, T, x] and [B, G, T, y]; all that it sees of both."""
        return (a, b) if self.cache is None else append_to_cache(self.cache, a, b, layer, self.places.to(a.device))


def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float, context: Context) -> Tensor:
    """Softmax attention of q [B, H, T, x] to k [B, G, S, x] and v [B, G, S, y]: [B, T, H, y]. H is a multiple of G."""
    config, keys, window = layer.config, k.shape[2], layer.window
    dropout = config.attention_dropout if layer.training else 0.0
    fused = config._attn_implementation == "sdpa" and config.score_softcap is None and context.weights is None
    if fused:
        k, v = (part if part.shape[1] == q.shape[1] else for_each_query_head(part, q.shape[1]) for part in (k, v))
        plain = context.seen.is_plain(keys, window)
        mask = None if plain else context.seen.mask(keys, window, q.device)
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, plain and q.shape[2] > 1, scale=scale)
        return out.transpose(1, 2)
    q = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bghtx,bgsx->bghts", q, k) * scale
    if config.score_softcap is not None:
        scores = torch.tanh(scores / config.score_softcap) * config.score_softcap
    mask = context.seen.mask(keys, window, q.device)[:, :, None]
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    if context.weights is not None:
        context.weights.append(weights.flatten(1, 2))
    weights = F.dropout(weights, dropout, layer.training)
    return torch.einsum("bghts,bgsy->btghy", weights, v).flatten(2, 3)


def for_each_query_head(x: Tensor, heads: int) -> Tensor:
    """[B, G, S, x] with each head as often as query heads share it; no copy where there is one."""
    batch, groups, tokens, width = x.shape
    return x[:, :, None].expand(batch, groups, heads // groups, tokens, width).reshape(batch, heads, tokens, width)


class Attention(nn.Module):
    """Multi-head latent attention."""

    def __init__(self, config: Gqa2MlaConfig, index: int):
        super().__init__()
        c, d = config, config.hidden_size
        self.config, self.index, self.window = config, index, config.window_of(index)
        self.heads, self.nope, self.rope = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim
        wide = self.heads * (self.nope + self.rope)
        if c.q_lora_rank is None:
            self.q_proj = nn.Linear(d, wide, bias=c.query_bias)
        else:
            self.q_a_proj = nn.Linear(d, c.q_lora_rank, bias=c.attention_bias)
            self.q_b_proj = nn.Linear(c.q_lora_rank, wide, bias=c.query_bias)
        self.kv_a_proj_with_mqa = nn.Linear(d, c.kv_lora_rank + self.rope, bias=c.attention_bias)
        self.kv_b_proj = nn.Linear(c.kv_lora_rank, self.heads * (self.nope + c.v_head_dim), bias=False)
        self.o_proj = nn.Linear(self.heads * c.v_head_dim, d, bias=c.attention_bias)
        if c.qk_norm == "head":
            self.q_norm, self.k_norm = (RMSNorm(c.qk_norm_width, c.rms_norm_eps) for _ in range(2))
        elif c.qk_norm == "all":
            self.q_norm = RMSNorm(self.heads * self.rope, c.rms_norm_eps)
            self.k_norm = RMSNorm(self.rope, c.rms_norm_eps)

    def norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Norm queries [B, T, H, R] and keys [B, T, R]; of a query head's values only one source head's are not zero."""
        width = self.config.qk_norm_width
        if self.config.qk_norm == "head":
            q = self.q_norm(q.unflatten(-1, (-1, width))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, width))).flatten(-2)
        elif self.config.qk_norm == "all":
            q = self.q_norm(q.flatten(-2), self.heads * width).unflatten(-1, (self.heads, -1))
            k = self.k_norm(k)
        return q, k

    def forward(self, x: Tensor, context: Context) -> Tensor:
        c = self.config
        q = self.q_proj(x) if c.q_lora_rank is None else self.q_b_proj(self.q_a_proj(x))
        q_plain, q_turned = q.unflatten(-1, (self.heads, -1)).split([self.nope, self.rope], -1)
        latent, key = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, self.rope], -1)
        q_turned, key = self.norm(q_turned, key)
        cos, sin = context.turns("latent", x.device)
        q_turned, key = turn_pairs(q_turned, cos[:, :, None], sin[:, :, None]), turn_pairs(key, cos, sin)
        latent, key = context.append(latent[:, None], key[:, None], self.index)
        q_plain, q_turned = q_plain.transpose(1, 2), q_turned.transpose(1, 2)
        absorbs = context.cache is not None and not self.training and self.absorbs(x.shape[1], latent.shape[2])
        pooled = (self.absorbed if absorbs else self.expanded)(q_plain, q_turned, latent, key, context)
        return self.o_proj(pooled.flatten(-2))

    def absorbs(self, tokens: int, keys: int) -> bool:
        """Whether it takes fewer products to bring queries to the latents than to expand the latents for the queries."""
        rank, wide = self.config.kv_lora_rank, self.nope + self.config.v_head_dim
        expanded = keys * rank * wide + tokens * keys * (wide + self.rope)
        absorbed = (rank + tokens) * rank * wide + tokens * keys * (2 * rank + self.rope)
        return absorbed < expanded

    def expanded(self, q_plain: Tensor, q_turned: Tensor, latent: Tensor, key: Tensor, context: Context) -> Tensor:
        """Attention to the keys and values that the latents [B, 1, S, r] stand for: [B, T, H, V]."""
        made = self.kv_b_proj(latent[:, 0]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        plain, value = made.split([self.nope, self.config.v_head_dim], -1)
        key = torch.cat((plain, key.expand(-1, self.heads, -1, -1)), -1)
        return attend(self, torch.cat((q_plain, q_turned), -1), key, value, self.config.attention_scale, context)

    def absorbed(self, q_plain: Tensor, q_turned: Tensor, latent: Tensor, key: Tensor, context: Context) -> Tensor:
        """The same without expanding: queries go through `kv_b_proj`, and what they pool is a latent."""
        # The layer itself is asked for its matrix, so that adapters, quantised and offloaded weights are what they are.
        eye = torch.eye(latent.shape[-1], dtype=latent.dtype, device=latent.device)
        up = self.kv_b_proj(eye).unflatten(-1, (self.heads, -1))
        plain, value = up.split([self.nope, self.config.v_head_dim], -1)
        q = q_turned
        if self.nope:
            q = torch.cat((torch.einsum("bhtn,rhn->bhtr", q_plain, plain), q_turned), -1)
            key = torch.cat((latent, key), -1)
        pooled = attend(self, q, key, latent, self.config.attention_scale, context)
        return torch.einsum("bthr,rhv->bthv", pooled, value)


class SourceAttention(nn.Module):
    """Grouped-query attention: what the layer had before the other layers became latent."""

    def __init__(self, config: Gqa2MlaConfig, index: int):
        super().__init__()
        c, d, own = config, config.hidden_size, config.gqa
        self.config, self.index, self.window = config, index, config.window_of(index)
        self.heads, self.kv_heads, self.size = c.num_attention_heads, own["num_key_value_heads"], own["head_dim"]
        wide, narrow = self.heads * self.size, self.kv_heads * self.size
        self.q_proj = nn.Linear(d, wide, bias=own["qkv_bias"])
        self.k_proj = nn.Linear(d, narrow, bias=own["qkv_bias"])
        self.v_proj = nn.Linear(d, narrow, bias=own["qkv_bias"])
        self.o_proj = nn.Linear(wide, d, bias=own["out_bias"])
        self.norm_scope = own.get("qk_norm")
        if self.norm_scope is not None:
            widths = (self.size, self.size) if self.norm_scope == "head" else (wide, narrow)
            self.q_norm, self.k_norm = (RMSNorm(w, c.rms_norm_eps) for w in widths)

    def heads_of(self, x: Tensor, norm: Optional[RMSNorm]) -> Tensor:
        """Values [B, T, heads * size] by head, normed where the source norms them."""
        if self.norm_scope == "all":
            x = norm(x)
        x = x.unflatten(-1, (-1, self.size))
        return norm(x) if self.norm_scope == "head" else x

    def forward(self, x: Tensor, context: Context) -> Tensor:
        own = self.config.gqa
        q = self.heads_of(self.q_proj(x), getattr(self, "q_norm", None))
        k = self.heads_of(self.k_proj(x), getattr(self, "k_norm", None))
        v = self.v_proj(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
        cos, sin = (part[:, :, None] * own.get("rotary_amplitude", 1.0) for part in context.turns("kept", x.device))
        q, k = (turn_halves(part, cos, sin, own["rotary_dim"]).transpose(1, 2) for part in (q, k))
        k, v = context.append(k, v, self.index)
        return self.o_proj(attend(self, q, k, v, own["attention_scale"], context).flatten(2))


def turn_halves(x: Tensor, cos: Tensor, sin: Tensor, width: int) -> Tensor:
    """Turn pairs (j, j + width / 2) of the first `width` values of each head."""
    a, b, rest = x[..., : width // 2].float(), x[..., width // 2 : width].float(), x[..., width:]
    return torch.cat(((a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest), -1)


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (2p, 2p + 1)."""
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)


class Mlp(nn.Module):
    """Gated feed-forward network."""

    def __init__(self, config: Gqa2MlaConfig, width: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Softmax over all experts; the best of them, with their weights as they are or made to sum to one."""

    def __init__(self, config: Gqa2MlaConfig):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        self.experts = nn.ModuleList(
            Mlp(config, config.moe_intermediate_size, False) for _ in range(config.n_routed_experts)
        )
        if config.shared_expert_intermediate_size:
            self.shared_experts = Mlp(config, config.shared_expert_intermediate_size, False)
            if config.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scores = F.softmax(self.gate(flat).float(), dim=-1)
        weights, chosen = scores.topk(self.config.num_experts_per_tok, dim=-1)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            token, place = (chosen == index).nonzero(as_tuple=True)
            if token.numel():
                out.index_add_(0, token, expert(flat[token]) * weights[token, place, None].to(flat.dtype))
        if self.config.shared_expert_intermediate_size:
            shared = self.shared_experts(flat)
            if self.config.shared_expert_gate:
                shared = torch.sigmoid(self.shared_expert_gate(flat)) * shared
            out = out + shared
        return out.view_as(x)


class Gqa2MlaDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward network, each with its norms and residual connection."""

    def __init__(self, config: Gqa2MlaConfig, index: int):
        super().__init__()
        c = config
        self.factor = c.residual_multiplier
        norm = lambda has: RMSNorm(c.hidden_size, c.rms_norm_eps) if has else nn.Identity()
        self.input_layernorm = norm(c.input_norm)
        kept = c.gqa is not None and index in c.gqa["layers"]
        self.self_attn = (SourceAttention if kept else Attention)(c, index)
        self.attention_out_layernorm = norm(c.attention_out_norm)
        self.post_attention_layernorm = norm(c.post_norm)
        sparse = c.n_routed_experts is not None and index not in (c.dense_layers or ())
        self.mlp = Experts(c) if sparse else Mlp(c, c.intermediate_size, c.mlp_bias)
        self.mlp_out_layernorm = norm(c.mlp_out_norm)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        added = self.self_attn(self.input_layernorm(x), context)
        x = x + self.attention_out_layernorm(added) * self.factor
        added = self.mlp(self.post_attention_layernorm(x))
        return x + self.mlp_out_layernorm(added) * self.factor


class Gqa2MlaPreTrainedModel(PreTrainedModel):
    config_class = Gqa2MlaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Gqa2MlaDecoderLayer"]
    _skip_keys_device_placement = [CACHE]
    _supports_sdpa = True

    @staticmethod
    def create_masks_for_generate(attention_mask: Optional[Tensor] = None, **_: Any) -> Optional[Tensor]:
        """Masks are made by the model itself, for every kind of cache."""
        return attention_mask

    def one_cache(self, kwargs: dict[str, Any]) -> Optional[Cache]:
        """The cache, taken out of `kwargs`: some versions of transformers call it `cache`, others `past_key_values`."""
        given = [c for c in (kwargs.pop("cache", None), kwargs.pop("past_key_values", None)) if c is not None]
        if len(given) > 1:
            raise TypeError("`cache` and `past_key_values` are one argument with two names: give one of them")
        return given[0] if given else None

    def reject(self, kwargs: dict[str, Any]) -> None:
        """Fail on arguments that this class does not know: they may change what is to be computed."""
        unknown = sorted(key for key, value in kwargs.items() if value is not None)
        if unknown:
            raise TypeError(f"{type(self).__name__}.forward does not know {', '.join(unknown)}")


class Gqa2MlaModel(Gqa2MlaPreTrainedModel):
    """The stack of layers, without the head."""

    def __init__(self, config: Gqa2MlaConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Gqa2MlaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def angles(self, positions: Tensor, short: list[float], long: Optional[list[float]]) -> Tensor:
        """Radians [B or 1, T, pairs] of every rotated pair at `positions` [B or 1, T]."""
        if long is not None and int(positions.max()) + 1 > self.config.original_max_position_embeddings:
            short = long
        return positions[..., None].float() * torch.tensor(short, dtype=torch.float32, device=positions.device)

    def context(self, x: Tensor, attention_mask: Optional[Tensor], position_ids: Optional[Tensor],
                cache: Optional[Cache], places: Optional[Tensor]) -> Context:
        """What the layers need to know of `x` [B, T, D] beside its values."""
        new = x.shape[1]
        if places is not None:
            total = places[-1] + 1
            if not getattr(cache, "is_compileable", False):
                total = int(total)
        else:
            total = new + (cache.get_seq_length() if cache is not None else 0)
            places = total - new + torch.arange(new, device=x.device)
        sequence = None
        if position_ids is None:
            position_ids = places[None]
        elif attention_mask is None and cache is None:
            sequence = packed(position_ids)
        own, c = self.config.gqa, self.config
        angles = {"latent": self.angles(position_ids, c.rotary_frequencies, c.rotary_frequencies_long)}
        if own is not None:
            angles["kept"] = self.angles(position_ids, own["rotary_frequencies"], own.get("rotary_frequencies_long"))
        return Context(Visibility(new, total, x.device, attention_mask, sequence), angles, cache, places)

    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        past_key_values: Optional[Cache] = None,
        inputs_embeds: Optional[Tensor] = None,
        use_cache: Optional[bool] = None,
        cache: Optional[Cache] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        **kwargs: Any,
    ) -> Union[BaseModelOutputWithPast, tuple]:
        """States of the last layer, normed; arguments as those of stock models, and none but those."""
        c = self.config
        cache = self.one_cache({"cache": cache, "past_key_values": past_key_values})
        places = kwargs.pop("cache_position", None)
        self.reject(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x * c.embedding_multiplier
        use_cache = c.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            # Layers run twice, and would enter their tokens twice.
            use_cache, cache, places = False, None, None
        if use_cache and cache is None:
            cache = DynamicCache(config=c)
        context = self.context(x, attention_mask, position_ids, cache, places)
        if asked(output_attentions, c.output_attentions):
            context.weights = []
        states = [x] if asked(output_hidden_states, c.output_hidden_states) else None
        for layer in self.layers:
            x = layer(x, context)
            if states is not None:
                states.append(x)
        x = self.norm(x)
        if states is not None:
            states[-1] = x
        out = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=None if states is None else tuple(states),
            attentions=None if context.weights is None else tuple(context.weights),
            **{CACHE: cache if use_cache else None},
        )
        return out if asked(return_dict, c.return_dict) else out.to_tuple()


def asked(argument: Optional[bool], otherwise: Optional[bool]) -> bool:
    """An argument, or what the config says where there is none."""
    return bool(otherwise if argument is None else argument)


def packed(positions: Tensor) -> Optional[Tensor]:
    """Which sequence each token is of, where positions [B, T] begin anew within a row; None where they never do."""
    breaks = positions.diff(dim=-1) != 1
    if not torch.compiler.is_compiling() and not bool(breaks.any()):
        return None
    return F.pad(breaks.long(), (1, 0)).cumsum(-1)


class Gqa2MlaForCausalLM(Gqa2MlaPreTrainedModel, GenerationMixin):
    """The model with its language modeling head."""

    def __init__(self, config: Gqa2MlaConfig):
        super().__init__(config)
        self.model = Gqa2MlaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        past_key_values: Optional[Cache] = None,
        inputs_embeds: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        use_cache: Optional[bool] = None,
        logits_to_keep: Union[int, Tensor] = 0,
        cache: Optional[Cache] = None,
        token_type_ids: Optional[Tensor] = None,
        return_dict: Optional[bool] = None,
        **kwargs: Any,
    ) -> Union[CausalLMOutputWithPast, tuple]:
        """Logits [B, T, vocabulary], and the loss where there are `labels` [B, T].

        `attention_mask` [B, cached + T] is 0 for padding, on either side. `logits_to_keep` is how many of the last
        positions, or which, get logits. `token_type_ids`, which some tokenizers make, mean nothing here. An argument that
        is not known is an error.
        """
        loss_arguments = {k: kwargs.pop(k) for k in ("num_items_in_batch", "shift_labels") if k in kwargs}
        # Where packed sequences begin, which `position_ids` say too.
        if position_ids is not None:
            for key in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"):
                kwargs.pop(key, None)
        if kwargs.get("output_router_logits") is False:
            del kwargs["output_router_logits"]
        made = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            use_cache=use_cache, past_key_values=past_key_values, cache=cache, return_dict=True, **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(made.last_hidden_state[:, kept]) * self.config.logit_multiplier
        if self.config.logit_softcap is not None:
            logits = torch.tanh(logits / self.config.logit_softcap) * self.config.logit_softcap
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **loss_arguments)
        out = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=made.hidden_states, attentions=made.attentions,
            **{CACHE: getattr(made, CACHE)},
        )
        return out if asked(return_dict, self.config.return_dict) else out.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Optional[Tensor] = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Arguments of the next forward pass.

        Past the original context of a model with long frequencies these hold for every token: what was cached with the
        short ones is dropped there, and computed anew.
        """
        cache, mask = kwargs.get(CACHE), kwargs.get("attention_mask")
        cached = 0 if cache is None else int(cache.get_seq_length())
        if self.config.rotary_frequencies_long is not None and cached:
            given = input_ids.shape[1]
            longest = given if mask is None else int(mask.sum(-1).max())
            original = self.config.original_max_position_embeddings
            # Some of the tokens given are not cached yet, at least one.
            if longest > original >= longest - max(given - cached, 1):
                if given <= cached:
                    raise ValueError(
                        f"generation from inputs_embeds cannot go past the original context of {original} tokens. "
                        "hint: give input_ids"
                    )
                kwargs[CACHE] = None
                kwargs.pop("next_sequence_length", None)
                if kwargs.get("cache_position") is not None:
                    kwargs["cache_position"] = torch.arange(given, device=input_ids.device)
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)


# Folders that `save_pretrained` writes carry this file along.
Gqa2MlaConfig.register_for_auto_class()
Gqa2MlaModel.register_for_auto_class("AutoModel")
Gqa2MlaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
