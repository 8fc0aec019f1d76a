//! One layer of an MLA checkpoint as a neutral [`MlaLayer`].

use ndarray::{Array1, Array2, Axis, s};

use super::latent::{Plain, Stored};
use crate::arch::{Architecture, MlaShape, Part, RopeLayout, StoredPart};
use crate::error::ConvertError;
use crate::mla::{MlaLayer, Query};
use crate::source::{ModelSource, scan_non_finite};

/// The attention of one layer as it is stored.
pub(super) struct StoredLayer {
    /// To queries `[H (d_N + d_R), D]` with its bias, or through a latent.
    query: StoredQuery,
    /// To keys and values, per head `[keys without rotation | values]`.
    latent: Stored,
    /// Rotated key `[d_R, D]` and its bias.
    key: (Array2<f64>, Option<Array1<f64>>),
    /// `[D, H d_V]` and its bias.
    output: (Array2<f64>, Option<Array1<f64>>),
    /// Gain of the norm before attention, `[D]`.
    pub input: Vec<f64>,
}

struct StoredQuery {
    /// `[H (d_N + d_R), D]`, or the latent's maps.
    map: Result<Array2<f64>, Stored>,
    /// `[H (d_N + d_R)]`.
    bias: Option<Array1<f64>>,
}

/// Reads the attention of layer `layer`.
pub(super) struct Reader<'a> {
    pub source: &'a ModelSource,
    pub arch: &'a Architecture,
    pub shape: &'a MlaShape,
    /// What the gain of the input norm is multiplied by, and the maps that read it are divided by: a power of two, which undoes
    /// what was done for the latents' sake.
    pub input_factor: f64,
}

impl Reader<'_> {
    /// The attention of layer `layer`, as it is stored.
    ///
    /// # Errors
    /// [`ConvertError::NotFinite`] naming the tensor; [`ConvertError::Source`].
    pub fn read(&self, layer: usize) -> Result<StoredLayer, ConvertError> {
        let (arch, shape) = (self.arch, self.shape);
        let (heads, d, r) = (arch.heads, arch.hidden, shape.kv_lora_rank);
        let q = heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim);
        let bias = |role: &str, there: bool| there.then(|| self.vector(&arch.bias(layer, role))).transpose();
        let query = match shape.q_lora_rank {
            None => StoredQuery {
                map: Ok(self.matrix(layer, "q", q, d)? / self.input_factor),
                bias: bias("q", shape.query_bias)?,
            },
            Some(rank) => StoredQuery {
                map: Err(Stored {
                    down: self.matrix(layer, "q_a", rank, d)? / self.input_factor,
                    bias: bias("q_a", shape.bias)?,
                    gain: self.gain(layer, "q_a_norm")?,
                    up: self.matrix(layer, "q_b", q, rank)?,
                }),
                bias: bias("q_b", shape.query_bias)?,
            },
        };
        let both = self.matrix(layer, "kv_a", r + shape.qk_rope_head_dim, d)? / self.input_factor;
        let both_bias = bias("kv_a", shape.bias)?;
        let part = |bias: &Option<Array1<f64>>, from: usize, to: usize| {
            bias.as_ref().map(|b| b.slice(s![from..to]).to_owned())
        };
        let end = both.nrows();
        let latent = Stored {
            down: both.slice(s![..r, ..]).to_owned(),
            bias: part(&both_bias, 0, r),
            gain: self.gain(layer, "kv_a_norm")?,
            up: self.matrix(layer, "kv_b", heads * (shape.qk_nope_head_dim + shape.v_head_dim), r)?,
        };
        let key = (both.slice(s![r.., ..]).to_owned(), part(&both_bias, r, end));
        let output = (self.matrix(layer, "o", d, heads * shape.v_head_dim)?, bias("o", shape.bias)?);
        let input = self.input_gain(layer)?.iter().map(|g| g * self.input_factor).collect();
        Ok(StoredLayer { query, latent, key, output, input })
    }

    /// Gain of the norm before attention, `[D]`, as it is stored.
    ///
    /// # Errors
    /// As [`Reader::read`].
    pub fn input_gain(&self, layer: usize) -> Result<Vec<f64>, ConvertError> {
        let names = self.arch.names.layer(layer);
        Ok(match names.has("input_norm") {
            true => (self.vector(&Part::whole(names.role("input_norm")))? + self.arch.norm_offset).to_vec(),
            false => vec![1.0; self.arch.hidden],
        })
    }

    fn values(&self, part: &Part) -> Result<Vec<f64>, ConvertError> {
        if let Some(fault) = scan_non_finite(&self.source.tensors, &part.name)? {
            return Err(ConvertError::NotFinite {
                name: part.name.clone(),
                count: fault.count,
                index: fault.first_index,
                value: fault.value,
            });
        }
        Ok(StoredPart::find(&self.source.tensors, part)?.to_f64())
    }

    fn vector(&self, part: &Part) -> Result<Array1<f64>, ConvertError> {
        Ok(Array1::from_vec(self.values(part)?))
    }

    fn matrix(&self, layer: usize, role: &str, rows: usize, columns: usize) -> Result<Array2<f64>, ConvertError> {
        let part = self.arch.weight(layer, role);
        Array2::from_shape_vec((rows, columns), self.values(&part)?).map_err(|_| {
            ConvertError::refused(
                format!("tensor `{}` is not [{rows}, {columns}]", part.name),
                "is the checkpoint intact? `gqa2mla verify-files` compares it with its manifest",
            )
        })
    }

    fn gain(&self, layer: usize, role: &str) -> Result<Option<Array1<f64>>, ConvertError> {
        if !self.shape.latent_norm {
            return Ok(None);
        }
        let part = Part::whole(self.arch.names.layer(layer).role(role));
        Ok(Some(self.vector(&part)? + self.arch.norm_offset))
    }
}

impl StoredLayer {
    /// The larger relative error of taking the norms of the two latents for none.
    pub fn error_without_norms(&self, eps: f64) -> f64 {
        let query = self.query.map.as_ref().err().map_or(0.0, |q| q.error_without_norm(&self.input, eps));
        query.max(self.latent.error_without_norm(&self.input, eps))
    }

    /// Whether the norms of its latents do nothing.
    pub fn is_neutral(&self, eps: f64) -> bool {
        self.query.map.as_ref().err().is_none_or(|q| q.is_neutral(&self.input, eps))
            && self.latent.is_neutral(&self.input, eps)
    }

    /// The layer without the norms of its latents, and whether keys had a constant (which the softmax removes).
    pub fn neutral(self, arch: &Architecture, shape: &MlaShape) -> (MlaLayer, bool) {
        let (heads, nope, rope, value) = (arch.heads, shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim);
        let Self { query, latent, key, output, input } = self;
        let eps = shape.latent_eps;
        let mut query_bias = query.bias.unwrap_or_else(|| Array1::zeros(heads * (nope + rope)));
        let (down, map) = match query.map {
            Ok(map) => (None, map),
            Err(stored) => {
                let Plain { down, up, constant } = stored.plain(&input, eps);
                query_bias += &constant;
                // A latent as wide as the input, as some classes need one, is no latent.
                if down.nrows() >= arch.hidden { (None, up.dot(&down)) } else { (Some(down), up) }
            }
        };
        let Plain { down: rows, up, constant } = latent.plain(&input, eps);
        let pairs = pair_rows(arch.rope.layout, rope);
        // What multiplies rotated values on both sides of the product.
        let amplitude = arch.rope.amplitude;
        let turned = |m: Array2<f64>, heads: usize| {
            let all: Vec<usize> = (0..heads).flat_map(|h| pairs.iter().map(move |i| h * rope + i)).collect();
            m.select(Axis(0), &all) * amplitude
        };
        let turned_bias = |b: Array1<f64>, heads: usize| turned(b.insert_axis(Axis(1)), heads).column(0).to_owned();
        let (q_nope, q_rope) = split(&map, heads, nope, rope);
        let (bias_nope, bias_rope) = split(&query_bias.insert_axis(Axis(1)), heads, nope, rope);
        let (k_up, v_up) = split(&up, heads, nope, value);
        let (k_constant, v_constant) = split(&constant.insert_axis(Axis(1)), heads, nope, value);
        let residual = arch.multipliers.residual;
        let wo = output.0 * residual;
        let mut wo_bias = output.1.map_or_else(|| Array1::zeros(arch.hidden), |b| b * residual);
        wo_bias += &wo.dot(&v_constant.column(0));
        let layer = MlaLayer {
            heads,
            query: Query {
                down,
                nope: q_nope,
                nope_bias: unless_zero(bias_nope.column(0).to_owned()),
                rope: turned(q_rope, heads),
                rope_bias: unless_zero(turned_bias(bias_rope.column(0).to_owned(), heads)),
            },
            latent: rows,
            k_rope: turned(key.0, 1),
            k_rope_bias: key.1.and_then(|b| unless_zero(turned_bias(b, 1))),
            k_up,
            v_up,
            wo,
            wo_bias: unless_zero(wo_bias),
            rope_freq: arch.rope.inv_freq.clone(),
            score_scale: shape.score_scale,
        };
        (layer, k_constant.iter().any(|v| *v != 0.0))
    }
}

fn unless_zero(b: Array1<f64>) -> Option<Array1<f64>> {
    b.iter().any(|v| *v != 0.0).then_some(b)
}

/// Row of a rotated part in the stored order, for each row with pairs `(2p, 2p + 1)`.
fn pair_rows(layout: RopeLayout, rope: usize) -> Vec<usize> {
    match layout {
        RopeLayout::Interleaved => (0..rope).collect(),
        RopeLayout::Half => (0..rope).map(|i| i / 2 + i % 2 * (rope / 2)).collect(),
    }
}

/// The first `a` rows of each head's `a + b`, and the others.
fn split(m: &Array2<f64>, heads: usize, a: usize, b: usize) -> (Array2<f64>, Array2<f64>) {
    let rows = |from: usize, n: usize| -> Vec<usize> {
        (0..heads).flat_map(|h| (0..n).map(move |i| h * (a + b) + from + i)).collect()
    };
    (m.select(Axis(0), &rows(0, a)), m.select(Axis(0), &rows(a, b)))
}
