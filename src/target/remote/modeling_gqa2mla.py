"""Multi-head latent attention for models whose other parts no stock class of transformers has.

Written into the output of `gqa2mla convert --target hf-remote`; load it with `trust_remote_code=True`. One class serves
every such model: what it has, its `config.json` says. Plain eager attention over a latent cache: `kv_lora_rank +
qk_rope_head_dim` values per token and layer. Some layers may keep the attention of the source, with its own cache.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

try:
    from transformers import PreTrainedConfig
except ImportError:  # transformers 4
    from transformers import PretrainedConfig as PreTrainedConfig

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}

# Every key of the config with the value it has where a model does not need it.
DEFAULTS = dict(
    vocab_size=32000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=2048, rms_norm_eps=1e-6, hidden_act="silu", mlp_bias=False,
    kv_lora_rank=32, q_lora_rank=None, qk_nope_head_dim=0, qk_rope_head_dim=32, v_head_dim=16,
    attention_bias=False, query_bias=False, attention_scale=1.0,
    # Radians per token of each rotated pair (2p, 2p + 1), and those that take over past the original context.
    rotary_frequencies=None, rotary_frequencies_long=None, original_max_position_embeddings=None,
    # "head": each of the source's heads, of `qk_norm_width` values, by itself; "all": all heads together.
    qk_norm=None, qk_norm_width=None,
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
    # Experts: layer i has them where `sparse_layers[i]`.
    n_routed_experts=None, num_experts_per_tok=None, moe_intermediate_size=None, norm_topk_prob=False,
    shared_expert_intermediate_size=None, shared_expert_gate=False, dense_layers=None,
)


class Gqa2MlaConfig(PreTrainedConfig):
    model_type = "gqa2mla"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, **kwargs):
        for key, default in DEFAULTS.items():
            setattr(self, key, kwargs.pop(key, default))
        kwargs.setdefault("tie_word_embeddings", False)
        self.num_key_value_heads = kwargs.pop("num_key_value_heads", self.num_attention_heads)
        self.head_dim = kwargs.pop("head_dim", self.qk_rope_head_dim)
        super().__init__(**kwargs)


class RmsNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x, divisor=None):
        """Mean over the last axis, or its sum over `divisor` where some of the values are padding."""
        wide = x.float()
        square = wide.pow(2).sum(-1, keepdim=True) / (divisor or x.shape[-1])
        return (wide * torch.rsqrt(square + self.eps) * self.weight.float()).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config, index: int):
        super().__init__()
        c, d = config, config.hidden_size
        self.config, self.index = config, index
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
            self.q_norm, self.k_norm = (RmsNorm(c.qk_norm_width, c.rms_norm_eps) for _ in range(2))
        elif c.qk_norm == "all":
            self.q_norm = RmsNorm(self.heads * self.rope, c.rms_norm_eps)
            self.k_norm = RmsNorm(self.rope, c.rms_norm_eps)
        windowed = c.window_layers is not None and c.window_layers[index]
        self.window = c.window_size if windowed else None

    def norm(self, q, k):
        """Norm rotated queries [B, T, H, R] and keys [B, T, R]; of a query head's values only one head's are not zero."""
        width = self.config.qk_norm_width
        if self.config.qk_norm == "head":
            q = self.q_norm(q.unflatten(-1, (-1, width))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, width))).flatten(-2)
        elif self.config.qk_norm == "all":
            q = self.q_norm(q.flatten(-2), self.heads * width).unflatten(-1, (self.heads, -1))
            k = self.k_norm(k)
        return q, k

    def forward(self, x, rotations, mask, past):
        c = self.config
        batch, tokens, _ = x.shape
        q = self.q_proj(x) if c.q_lora_rank is None else self.q_b_proj(self.q_a_proj(x))
        q_plain, q_turned = q.view(batch, tokens, self.heads, -1).split([self.nope, self.rope], -1)
        latent, key = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, self.rope], -1)
        q_turned, key = self.norm(q_turned, key)
        cos, sin = rotations[0]
        q_turned, key = turn(q_turned, cos[:, :, None], sin[:, :, None]), turn(key, cos, sin)
        if past is not None:
            latent, key = past.update(latent[:, None], key[:, None], self.index)
            latent, key = latent[:, 0], key[:, 0]
        k_plain, value = self.kv_b_proj(latent).view(batch, -1, self.heads, self.nope + c.v_head_dim).split(
            [self.nope, c.v_head_dim], -1
        )
        scores = torch.einsum("bqhd,bkd->bhqk", q_turned, key)
        if self.nope:
            scores = scores + torch.einsum("bqhd,bkhd->bhqk", q_plain, k_plain)
        weights = probabilities(self, scores * c.attention_scale, mask).to(x.dtype)
        return self.o_proj(torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(-2))


class SourceAttention(nn.Module):
    """Grouped-query attention: what the layer had before the other layers became latent."""

    def __init__(self, config, index: int):
        super().__init__()
        c, d, own = config, config.hidden_size, config.gqa
        self.config, self.index = config, index
        self.heads, self.kv_heads, self.size = c.num_attention_heads, own["num_key_value_heads"], own["head_dim"]
        wide, narrow = self.heads * self.size, self.kv_heads * self.size
        self.q_proj = nn.Linear(d, wide, bias=own["qkv_bias"])
        self.k_proj = nn.Linear(d, narrow, bias=own["qkv_bias"])
        self.v_proj = nn.Linear(d, narrow, bias=own["qkv_bias"])
        self.o_proj = nn.Linear(wide, d, bias=own["out_bias"])
        self.norm_scope = own.get("qk_norm")
        if self.norm_scope is not None:
            widths = (self.size, self.size) if self.norm_scope == "head" else (wide, narrow)
            self.q_norm, self.k_norm = (RmsNorm(w, c.rms_norm_eps) for w in widths)
        windowed = c.window_layers is not None and c.window_layers[index]
        self.window = c.window_size if windowed else None

    def heads_of(self, x, norm):
        if self.norm_scope == "all":
            x = norm(x)
        x = x.unflatten(-1, (-1, self.size))
        return norm(x) if self.norm_scope == "head" else x

    def forward(self, x, rotations, mask, past):
        own = self.config.gqa
        q = self.heads_of(self.q_proj(x), getattr(self, "q_norm", None))
        k = self.heads_of(self.k_proj(x), getattr(self, "k_norm", None))
        v = self.v_proj(x).unflatten(-1, (-1, self.size))
        cos, sin = (part[:, :, None] * own.get("rotary_amplitude", 1.0) for part in rotations[1])
        q, k = (turn_halves(part, cos, sin, own["rotary_dim"]) for part in (q, k))
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if past is not None:
            k, v = past.update(k, v, self.index)
        q = q.unflatten(2, (self.kv_heads, -1))
        scores = torch.einsum("bqgnd,bgkd->bgnqk", q, k).flatten(1, 2) * own["attention_scale"]
        weights = probabilities(self, scores, mask).to(x.dtype).unflatten(1, (self.kv_heads, -1))
        return self.o_proj(torch.einsum("bgnqk,bgkd->bqgnd", weights, v).flatten(2))


def probabilities(layer, scores, mask):
    cap = layer.config.score_softcap
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    visible, distance = mask
    if layer.window is not None:
        visible = visible & (distance < layer.window)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return F.softmax(scores, dim=-1, dtype=torch.float32)


def turn_halves(x, cos, sin, width):
    a, b, rest = x[..., : width // 2].float(), x[..., width // 2 : width].float(), x[..., width:]
    return torch.cat(((a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest), -1)


def turn(x, cos, sin):
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)


class Mlp(nn.Module):
    def __init__(self, config, width: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Softmax over all experts; the best of them, with their weights as they are or made to sum to one."""

    def __init__(self, config):
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

    def forward(self, x):
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


class Layer(nn.Module):
    def __init__(self, config, index: int):
        super().__init__()
        c = config
        self.factor = c.residual_multiplier
        norm = lambda has: RmsNorm(c.hidden_size, c.rms_norm_eps) if has else nn.Identity()
        self.input_layernorm = norm(c.input_norm)
        kept = c.gqa is not None and index in c.gqa["layers"]
        self.self_attn = (SourceAttention if kept else Attention)(c, index)
        self.attention_out_layernorm = norm(c.attention_out_norm)
        self.post_attention_layernorm = norm(c.post_norm)
        sparse = c.n_routed_experts is not None and index not in (c.dense_layers or ())
        self.mlp = Experts(c) if sparse else Mlp(c, c.intermediate_size, c.mlp_bias)
        self.mlp_out_layernorm = norm(c.mlp_out_norm)

    def forward(self, x, rotations, mask, past):
        added = self.self_attn(self.input_layernorm(x), rotations, mask, past)
        x = x + self.attention_out_layernorm(added) * self.factor
        added = self.mlp(self.post_attention_layernorm(x))
        return x + self.mlp_out_layernorm(added) * self.factor


class Gqa2MlaPreTrainedModel(PreTrainedModel):
    config_class = Gqa2MlaConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RmsNorm):
            nn.init.ones_(module.weight)


class Gqa2MlaModel(Gqa2MlaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def rotation(self, positions, keys):
        frequencies = keys["rotary_frequencies"]
        long = keys.get("rotary_frequencies_long")
        if long is not None and int(positions.max()) + 1 > keys["original_max_position_embeddings"]:
            frequencies = long
        angles = positions[..., None].float() * torch.tensor(frequencies, dtype=torch.float32, device=positions.device)
        return angles.cos(), angles.sin()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                inputs_embeds=None, use_cache=None, **_):
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x * self.config.embedding_multiplier
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        places = torch.arange(before, before + x.shape[1], device=x.device)
        if position_ids is None:
            position_ids = places[None]
        distance = places[:, None] - torch.arange(before + x.shape[1], device=x.device)[None]
        visible = (distance >= 0)[None, None]
        if attention_mask is not None and attention_mask.dim() == 2:
            visible = visible & attention_mask[:, None, None, : distance.shape[1]].bool()
        rotations = [self.rotation(position_ids, keys) for keys in (vars(self.config), self.config.gqa) if keys]
        for layer in self.layers:
            x = layer(x, rotations, (visible, distance), past_key_values)
        return self.norm(x), past_key_values


class Gqa2MlaForCausalLM(Gqa2MlaPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = Gqa2MlaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                inputs_embeds=None, labels=None, use_cache=None, logits_to_keep=0, **kwargs):
        use_cache = self.config.use_cache if use_cache is None else use_cache
        hidden, past = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        if logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden) * self.config.logit_multiplier
        if self.config.logit_softcap is not None:
            logits = torch.tanh(logits / self.config.logit_softcap) * self.config.logit_softcap
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past if use_cache else None)
