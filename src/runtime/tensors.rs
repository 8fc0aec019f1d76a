//! The weights of one layer by role, in host memory.
//!
//! `W` is how weights of linear layers are held: f32 matrices for who changes them, [`HostWeight`] for who only computes
//! with them. Norms and biases are some thousand values, and f32 always.

use ndarray::Array2;

use super::{HostWeight, RuntimeError};
use crate::arch::{Architecture, Attention, MlpKind, Moe, Part, QkNormScope, StoredPart};
use crate::source::ModelSource;

/// A linear layer `y = W x + b`.
#[derive(Debug, Clone, PartialEq)]
pub struct Linear<W = Array2<f32>> {
    /// `[out, in]`.
    pub weight: W,
    /// `[out]`.
    pub bias: Option<Vec<f32>>,
}

impl<W> From<W> for Linear<W> {
    fn from(weight: W) -> Self {
        Self { weight, bias: None }
    }
}

impl<W> Linear<W> {
    fn map<V>(self, f: &impl Fn(W) -> V) -> Linear<V> {
        Linear { weight: f(self.weight), bias: self.bias }
    }
}

/// Grouped-query attention: `q [H d, D]`, `k` and `v [g d, D]`, `o [D, H d]`.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct GqaTensors<W = Array2<f32>> {
    pub q: Linear<W>,
    pub k: Linear<W>,
    pub v: Linear<W>,
    pub o: Linear<W>,
}

/// How MLA makes its queries.
#[derive(Debug, Clone, PartialEq)]
pub enum QueryTensors<W = Array2<f32>> {
    /// `q_proj [H (d_N + d_R), D]`, per head `[nope | rope]`.
    Direct(Linear<W>),
    /// Through a normed latent of width `r_q`.
    LowRank {
        /// `q_a_proj [r_q, D]`.
        a: Linear<W>,
        /// Gain of `q_a_layernorm`, `[r_q]`.
        norm: Vec<f32>,
        /// `q_b_proj [H (d_N + d_R), r_q]`, per head `[nope | rope]`.
        b: Linear<W>,
    },
}

/// Multi-head latent attention, DeepSeek layout.
#[derive(Debug, Clone, PartialEq)]
pub struct MlaTensors<W = Array2<f32>> {
    /// Queries.
    pub query: QueryTensors<W>,
    /// `kv_a_proj_with_mqa [r + d_R, D]`, rows `[latent | rope key]`.
    pub kv_a: Linear<W>,
    /// Gain of `kv_a_layernorm`, `[r]`; empty in a class that does not norm it.
    pub kv_a_norm: Vec<f32>,
    /// `kv_b_proj [H (d_N + d_V), r]`, per head `[key | value]`.
    pub kv_b: Linear<W>,
    /// `o_proj [D, H d_V]`.
    pub o: Linear<W>,
}

/// Attention weights of either variant.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum AttentionTensors<W = Array2<f32>> {
    Gqa(GqaTensors<W>),
    Mla(MlaTensors<W>),
}

impl<W> AttentionTensors<W> {
    fn map<V>(self, f: &impl Fn(W) -> V) -> AttentionTensors<V> {
        match self {
            Self::Gqa(t) => {
                AttentionTensors::Gqa(GqaTensors { q: t.q.map(f), k: t.k.map(f), v: t.v.map(f), o: t.o.map(f) })
            }
            Self::Mla(t) => AttentionTensors::Mla(MlaTensors {
                query: match t.query {
                    QueryTensors::Direct(q) => QueryTensors::Direct(q.map(f)),
                    QueryTensors::LowRank { a, norm, b } => QueryTensors::LowRank { a: a.map(f), norm, b: b.map(f) },
                },
                kv_a: t.kv_a.map(f),
                kv_a_norm: t.kv_a_norm,
                kv_b: t.kv_b.map(f),
                o: t.o.map(f),
            }),
        }
    }
}

/// MLP `down(act(gate x) * up x)`, or `down(act(up x))` without a gate: `gate` and `up [I, D]`, `down [D, I]`.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct MlpTensors<W = Array2<f32>> {
    pub gate: Option<Linear<W>>,
    pub up: Linear<W>,
    pub down: Linear<W>,
}

impl<W> MlpTensors<W> {
    fn map<V>(self, f: &impl Fn(W) -> V) -> MlpTensors<V> {
        MlpTensors { gate: self.gate.map(|gate| gate.map(f)), up: self.up.map(f), down: self.down.map(f) }
    }
}

/// A mixture of experts.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertTensors<W = Array2<f32>> {
    /// `[E, D]`.
    pub router: Linear<W>,
    /// Added to the scores for the choice, `[E]`.
    pub choice_bias: Option<Vec<f32>>,
    /// `[E]`, or none where each is read when a token goes to it.
    pub experts: Vec<MlpTensors<W>>,
    /// The expert that sees every token.
    pub shared: Option<MlpTensors<W>>,
    /// Sigmoid gate on its output, `[1, D]`.
    pub shared_router: Option<Linear<W>>,
}

/// What follows attention in a layer.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum FeedForwardTensors<W = Array2<f32>> {
    Dense(Box<MlpTensors<W>>),
    Experts(Box<ExpertTensors<W>>),
}

impl<W> From<MlpTensors<W>> for FeedForwardTensors<W> {
    fn from(mlp: MlpTensors<W>) -> Self {
        Self::Dense(Box::new(mlp))
    }
}

impl<W> FeedForwardTensors<W> {
    fn map<V>(self, f: &impl Fn(W) -> V) -> FeedForwardTensors<V> {
        match self {
            Self::Dense(mlp) => mlp.map(f).into(),
            Self::Experts(t) => FeedForwardTensors::Experts(Box::new(ExpertTensors {
                router: t.router.map(f),
                choice_bias: t.choice_bias,
                experts: t.experts.into_iter().map(|expert| expert.map(f)).collect(),
                shared: t.shared.map(|shared| shared.map(f)),
                shared_router: t.shared_router.map(|router| router.map(f)),
            })),
        }
    }
}

/// What only some families have in a layer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LayerExtras {
    /// Sliding window of this layer in tokens.
    pub window: Option<usize>,
    /// Gain of the norm of queries, per head or over all ([`Architecture::qk_norm`]).
    pub q_norm: Option<Vec<f32>>,
    /// Gain of the norm of keys.
    pub k_norm: Option<Vec<f32>>,
    /// Gain of a norm of the attention's output, `[D]`.
    pub attention_out_norm: Option<Vec<f32>>,
    /// Gain of a norm of the MLP's output, `[D]`.
    pub mlp_out_norm: Option<Vec<f32>>,
}

/// All weights of one decoder layer. Rounding to a narrower dtype is the caller's business.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerTensors<W = Array2<f32>> {
    /// Gain of the norm before attention, `[D]`; empty where a family has none.
    pub input_norm: Vec<f32>,
    /// Attention.
    pub attention: AttentionTensors<W>,
    /// Gain of the norm before the MLP, `[D]`; empty where a family has none.
    pub post_norm: Vec<f32>,
    /// MLP or experts.
    pub mlp: FeedForwardTensors<W>,
    /// What only some families have.
    pub extras: LayerExtras,
}

impl<W> LayerTensors<W> {
    /// Gain of the latent's norm; empty in a GQA layer and where the class norms no latent.
    pub fn latent_gain(&self) -> &[f32] {
        match &self.attention {
            AttentionTensors::Mla(t) => &t.kv_a_norm,
            AttentionTensors::Gqa(_) => &[],
        }
    }

    /// The same with every weight of a linear layer put through `f`.
    pub(super) fn map<V>(self, f: impl Fn(W) -> V) -> LayerTensors<V> {
        LayerTensors {
            input_norm: self.input_norm,
            attention: self.attention.map(&f),
            post_norm: self.post_norm,
            mlp: self.mlp.map(&f),
            extras: self.extras,
        }
    }
}

impl LayerTensors {
    /// Gain of the input norm of layer `layer` alone, offset included; empty where the family has no such norm.
    ///
    /// # Errors
    /// As [`LayerTensors::load`].
    pub fn load_input_norm(source: &ModelSource, arch: &Architecture, layer: usize) -> Result<Vec<f32>, RuntimeError> {
        Loader { source, arch, layer, in_place: false }.optional_norm("input_norm")
    }

    /// Read layer `layer` of a checkpoint. Factors on the residual stream are folded into what is added to it.
    ///
    /// # Errors
    /// [`RuntimeError::Source`] for a tensor that cannot be read, [`RuntimeError::Shape`] for one of another shape than
    /// the architecture implies.
    pub fn load(source: &ModelSource, arch: &Architecture, layer: usize) -> Result<Self, RuntimeError> {
        Ok(Loader { source, arch, layer, in_place: false }.layer(true)?.map(HostWeight::into_f32))
    }
}

/// Reads the weights of one layer.
pub(super) struct Loader<'a> {
    pub source: &'a ModelSource,
    pub arch: &'a Architecture,
    pub layer: usize,
    /// Whether weights are taken in place where that is possible.
    pub in_place: bool,
}

impl Loader<'_> {
    /// Everything, the routed experts if `experts`. Factors on the residual stream are folded into what is added to it.
    ///
    /// # Errors
    /// As [`LayerTensors::load`].
    pub(super) fn layer(&self, experts: bool) -> Result<LayerTensors<HostWeight>, RuntimeError> {
        let (load, arch, layer) = (self, self.arch, self.layer);
        let d = arch.hidden;
        let mut extras = LayerExtras {
            window: arch.windows.get(layer).copied().flatten(),
            attention_out_norm: load.out_norm("attention_out_norm")?,
            mlp_out_norm: load.out_norm("mlp_out_norm")?,
            ..LayerExtras::default()
        };
        let attention = match &arch.attention {
            Attention::Gqa(a) => {
                let (q, kv) = (arch.heads * a.head_dim, a.kv_heads * a.head_dim);
                if let Some(scope) = arch.qk_norm {
                    let (wide, narrow) = match scope {
                        QkNormScope::Head => (a.head_dim, a.head_dim),
                        QkNormScope::All => (q, kv),
                    };
                    extras.q_norm = Some(load.norm("q_norm", wide)?);
                    extras.k_norm = Some(load.norm("k_norm", narrow)?);
                }
                AttentionTensors::Gqa(GqaTensors {
                    q: load.linear("q", q, d, a.qkv_bias)?,
                    k: load.linear("k", kv, d, a.qkv_bias)?,
                    v: load.linear("v", kv, d, a.qkv_bias)?,
                    o: load.added("o", q, a.out_bias)?,
                })
            }
            Attention::Mla(a) => {
                let q = arch.heads * (a.qk_nope_head_dim + a.qk_rope_head_dim);
                let query = match a.q_lora_rank {
                    None => QueryTensors::Direct(load.linear("q", q, d, a.query_bias)?),
                    Some(rank) => QueryTensors::LowRank {
                        a: load.linear("q_a", rank, d, a.bias)?,
                        norm: if a.latent_norm { load.norm("q_a_norm", rank)? } else { Vec::new() },
                        b: load.linear("q_b", q, rank, a.query_bias)?,
                    },
                };
                if arch.qk_norm.is_some() {
                    let (wide, narrow) = arch.mla_norm_widths(a);
                    extras.q_norm = Some(load.norm("q_norm", wide)?);
                    extras.k_norm = Some(load.norm("k_norm", narrow)?);
                }
                let r = a.kv_lora_rank;
                AttentionTensors::Mla(MlaTensors {
                    query,
                    kv_a: load.linear("kv_a", r + a.qk_rope_head_dim, d, a.bias)?,
                    kv_a_norm: if a.latent_norm { load.norm("kv_a_norm", r)? } else { Vec::new() },
                    kv_b: load.linear("kv_b", arch.heads * (a.qk_nope_head_dim + a.v_head_dim), r, false)?,
                    o: load.added("o", arch.heads * a.v_head_dim, a.bias)?,
                })
            }
        };
        Ok(LayerTensors {
            input_norm: load.optional_norm("input_norm")?,
            attention,
            post_norm: load.optional_norm("post_norm")?,
            mlp: if arch.is_sparse(layer) { load.experts(experts)? } else { load.dense()?.into() },
            extras,
        })
    }

    /// Routed expert `expert` alone.
    ///
    /// # Errors
    /// As [`LayerTensors::load`].
    pub(super) fn routed_expert(&self, expert: usize) -> Result<MlpTensors<HostWeight>, RuntimeError> {
        match &self.arch.moe {
            Some(moe) => self.expert(moe, expert),
            None => Err(RuntimeError::Variant { expected: "dense", found: "experts" }),
        }
    }

    fn weight(&self, role: &'static str, part: &Part, out: usize, inner: usize) -> Result<HostWeight, RuntimeError> {
        load_weight(self.source, role, part, (out, inner), self.in_place)
    }

    fn linear(
        &self,
        role: &'static str,
        out: usize,
        inner: usize,
        bias: bool,
    ) -> Result<Linear<HostWeight>, RuntimeError> {
        let weight = self.weight(role, &self.arch.weight(self.layer, role), out, inner)?;
        let bias = match bias {
            true => Some(self.vector(role, &self.arch.bias(self.layer, role), out)?),
            false => None,
        };
        Ok(Linear { weight, bias })
    }

    /// A linear layer whose output is added to the residual stream.
    fn added(&self, role: &'static str, inner: usize, bias: bool) -> Result<Linear<HostWeight>, RuntimeError> {
        Ok(self.folded(self.linear(role, self.arch.hidden, inner, bias)?))
    }

    /// The factor on the residual stream folded into what is added to it. A weight that takes one is no longer the stored
    /// one, so it is held in f32.
    fn folded(&self, linear: Linear<HostWeight>) -> Linear<HostWeight> {
        let factor = self.arch.multipliers.residual as f32;
        if factor == 1.0 {
            return linear;
        }
        let bias = linear.bias.map(|bias| bias.into_iter().map(|b| b * factor).collect());
        Linear { weight: HostWeight::from(linear.weight.into_f32() * factor), bias }
    }

    fn dense(&self) -> Result<MlpTensors<HostWeight>, RuntimeError> {
        let (d, i, bias) = (self.arch.hidden, self.arch.intermediate, self.arch.mlp_bias);
        Ok(MlpTensors {
            gate: match self.arch.mlp {
                MlpKind::Gated => Some(self.linear("gate", i, d, bias)?),
                MlpKind::Plain => None,
            },
            up: self.linear("up", i, d, bias)?,
            down: self.added("down", i, bias)?,
        })
    }

    /// One routed expert.
    fn expert(&self, moe: &Moe, e: usize) -> Result<MlpTensors<HostWeight>, RuntimeError> {
        let (d, i) = (self.arch.hidden, moe.width);
        let names = self.arch.names.layer(self.layer);
        let one = |role: &'static str, out: usize, inner: usize| -> Result<Linear<HostWeight>, RuntimeError> {
            let part = Part::whole(format!("{}.weight", names.expert(role, e)));
            Ok(self.weight(role, &part, out, inner)?.into())
        };
        let down = self.folded(one("expert_down", d, i)?);
        Ok(MlpTensors { gate: Some(one("expert_gate", i, d)?), up: one("expert_up", i, d)?, down })
    }

    fn experts(&self, routed: bool) -> Result<FeedForwardTensors<HostWeight>, RuntimeError> {
        let Some(moe) = &self.arch.moe else {
            return Err(RuntimeError::Variant { expected: "dense", found: "experts" });
        };
        let (d, names) = (self.arch.hidden, self.arch.names.layer(self.layer));
        let held = if routed { moe.experts } else { 0 };
        let shared = match moe.shared_width {
            None => None,
            Some(width) => Some(MlpTensors {
                gate: Some(self.linear("shared_gate", width, d, false)?),
                up: self.linear("shared_up", width, d, false)?,
                down: self.added("shared_down", width, false)?,
            }),
        };
        Ok(FeedForwardTensors::Experts(Box::new(ExpertTensors {
            router: self.linear("router", moe.experts, d, false)?,
            choice_bias: match moe.choice_bias {
                true => Some(self.vector("router_bias", &Part::whole(names.role("router_bias")), moe.experts)?),
                false => None,
            },
            experts: (0..held).map(|e| self.expert(moe, e)).collect::<Result<_, _>>()?,
            shared_router: match (&shared, moe.shared_gated) {
                (Some(_), true) => Some(self.linear("shared_router", 1, d, false)?),
                _ => None,
            },
            shared,
        })))
    }

    fn norm(&self, role: &'static str, len: usize) -> Result<Vec<f32>, RuntimeError> {
        let name = self.arch.names.layer(self.layer).role(role);
        let mut gain = self.vector(role, &Part::whole(name), len)?;
        add_offset(self.arch, &mut gain);
        Ok(gain)
    }

    /// Empty where the family has no such norm.
    fn optional_norm(&self, role: &'static str) -> Result<Vec<f32>, RuntimeError> {
        match self.arch.names.layer(self.layer).has(role) {
            true => self.norm(role, self.arch.hidden),
            false => Ok(Vec::new()),
        }
    }

    fn out_norm(&self, role: &'static str) -> Result<Option<Vec<f32>>, RuntimeError> {
        self.optional_norm(role).map(|gain| (!gain.is_empty()).then_some(gain))
    }

    fn vector(&self, role: &'static str, part: &Part, len: usize) -> Result<Vec<f32>, RuntimeError> {
        let stored = StoredPart::find(&self.source.tensors, part)?;
        if stored.shape() != [len] {
            return Err(RuntimeError::Shape { role, expected: vec![len], found: stored.shape() });
        }
        Ok(stored.to_f32())
    }
}

/// What a family adds to stored norm weights.
pub(super) fn add_offset(arch: &Architecture, gain: &mut [f32]) {
    if arch.norm_offset != 0.0 {
        gain.iter_mut().for_each(|g| *g = (f64::from(*g) + arch.norm_offset) as f32);
    }
}

/// One matrix `[out, in]`: in place if that is wanted and possible, else read, as f32.
pub(super) fn load_weight(
    source: &ModelSource,
    role: &'static str,
    part: &Part,
    (out, inner): (usize, usize),
    in_place: bool,
) -> Result<HostWeight, RuntimeError> {
    if in_place && let Some(weight) = HostWeight::in_place(&source.tensors, part)? {
        let (rows, columns) = weight.shape();
        if (rows, columns) != (out, inner) {
            return Err(RuntimeError::Shape { role, expected: vec![out, inner], found: vec![rows, columns] });
        }
        return Ok(weight);
    }
    let stored = StoredPart::find(&source.tensors, part)?;
    let shape = || RuntimeError::Shape { role, expected: vec![out, inner], found: stored.shape() };
    if stored.shape() != [out, inner] {
        return Err(shape());
    }
    Array2::from_shape_vec((out, inner), stored.to_f32()).map(HostWeight::from).map_err(|_| shape())
}
