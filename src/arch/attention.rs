//! The attention weights of one source layer in normal form.

use ndarray::{Array1, Array2, Axis};

use super::weights::{matrix, vector};
use super::{ArchError, Architecture, Attention, RopeLayout};
use crate::source::ModelSource;

/// Grouped-query attention of one layer, in f64, ready for the maths.
///
/// Query head `h` attends to KV head `h / (H / g)`. Pair `j` of a head is rows `(j, j + d/2)` and turns by `inv_freq[j]`
/// radians per token. Where a model rotates only part of a head, the rows are permuted into this form and the pairs that do
/// not turn come last, with frequency zero. Factors on the residual stream are in `wo` and `bo`.
#[derive(Debug, Clone)]
pub struct AttentionSource {
    /// Query heads `H`.
    pub heads: usize,
    /// KV heads `g`.
    pub kv_heads: usize,
    /// Head size `d`.
    pub head_dim: usize,
    /// `[H d, D]`.
    pub wq: Array2<f64>,
    /// `[g d, D]`.
    pub wk: Array2<f64>,
    /// `[g d, D]`.
    pub wv: Array2<f64>,
    /// `[D, H d]`.
    pub wo: Array2<f64>,
    /// `[H d]`.
    pub bq: Option<Array1<f64>>,
    /// `[g d]`.
    pub bk: Option<Array1<f64>>,
    /// `[g d]`.
    pub bv: Option<Array1<f64>>,
    /// `[D]`.
    pub bo: Option<Array1<f64>>,
    /// Radians per token of each pair, `[d / 2]`.
    pub inv_freq: Vec<f64>,
    /// What multiplies `<q, k>` before the softmax: `d^(-1/2)`, times the square of RoPE's amplitude.
    pub score_scale: f64,
    /// Cap `c` of the scores, `c tanh(s / c)`.
    pub score_softcap: Option<f64>,
}

impl AttentionSource {
    /// Hidden size `D`.
    pub fn hidden(&self) -> usize {
        self.wq.ncols()
    }

    /// Queries per KV head, `n = H / g`.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// Rows of a head in normal form: entry `i` is the stored row that becomes row `i`. Rotated pair `j < rotary / 2`, stored
/// as `(j, j + rotary / 2)`, becomes `(j, j + d / 2)`; the rest follows in order.
pub(crate) fn normal_rows(head_dim: usize, rotary: usize) -> Vec<usize> {
    let (half, turned) = (head_dim / 2, rotary / 2);
    let still = half - turned;
    let row = |i: usize| {
        let (upper, j) = (i / half, i % half);
        if j < turned { j + upper * turned } else { rotary + upper * still + j - turned }
    };
    (0..head_dim).map(row).collect()
}

/// Read layer `layer` of a GQA checkpoint.
///
/// # Errors
/// [`ArchError::Source`] when a tensor cannot be read, [`ArchError::Unsupported`] for a model that is MLA already.
pub fn load_attention_source(
    source: &ModelSource,
    arch: &Architecture,
    layer: usize,
) -> Result<AttentionSource, ArchError> {
    let Attention::Gqa(shape) = &arch.attention else {
        return Err(ArchError::Unsupported {
            what: format!("converting `{}`, which is MLA already,", arch.model_type),
            hint: Some("give the GQA checkpoint it was made from".into()),
        });
    };
    debug_assert_eq!(arch.rope.layout, RopeLayout::Half);
    let d = shape.head_dim;
    if !d.is_multiple_of(2) {
        return Err(ArchError::Unsupported { what: format!("converting heads of odd size {d}"), hint: None });
    }
    let residual = arch.multipliers.residual;
    let scale = |role: &str| if role == "o" { residual } else { 1.0 };
    let weight = |role: &str| matrix(source, &arch.weight(layer, role), scale(role));
    let bias = |role: &str, has: bool| -> Result<Option<Array1<f64>>, ArchError> {
        if !has {
            return Ok(None);
        }
        vector(source, &arch.bias(layer, role), scale(role)).map(Some)
    };
    let qkv_bias = shape.qkv_bias;
    let mut out = AttentionSource {
        heads: arch.heads,
        kv_heads: shape.kv_heads,
        head_dim: d,
        wq: weight("q")?,
        wk: weight("k")?,
        wv: weight("v")?,
        wo: weight("o")?,
        bq: bias("q", qkv_bias)?,
        bk: bias("k", qkv_bias)?,
        bv: bias("v", qkv_bias)?,
        bo: bias("o", shape.out_bias)?,
        inv_freq: arch.rope.inv_freq.clone(),
        score_scale: shape.score_scale * arch.rope.amplitude.powi(2),
        score_softcap: arch.score_softcap,
    };
    if shape.rotary_dim < d {
        let rows = normal_rows(d, shape.rotary_dim);
        let of_heads = |heads: usize| -> Vec<usize> { (0..heads * d).map(|i| i / d * d + rows[i % d]).collect() };
        let (q, k) = (of_heads(out.heads), of_heads(out.kv_heads));
        out.wq = out.wq.select(Axis(0), &q);
        out.wk = out.wk.select(Axis(0), &k);
        out.bq = out.bq.map(|b| b.select(Axis(0), &q));
        out.bk = out.bk.map(|b| b.select(Axis(0), &k));
        out.inv_freq.resize(d / 2, 0.0);
        // The amplitude is that of rotated pairs; `score_scale` gives it to all.
        if arch.rope.amplitude != 1.0 {
            let turned = shape.rotary_dim / 2;
            let still = |i: usize| i % d % (d / 2) >= turned;
            for (w, b) in [(&mut out.wq, &mut out.bq), (&mut out.wk, &mut out.bk)] {
                for (i, mut row) in w.rows_mut().into_iter().enumerate().filter(|(i, _)| still(*i)) {
                    row /= arch.rope.amplitude;
                    if let Some(b) = b {
                        b[i] /= arch.rope.amplitude;
                    }
                }
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_rows_are_a_permutation_that_keeps_pairs() {
        assert_eq!(normal_rows(8, 8), (0..8).collect::<Vec<_>>());
        // Stored: pairs (0, 2) and (1, 3) turn, 4..8 do not.
        assert_eq!(normal_rows(8, 4), [0, 1, 4, 5, 2, 3, 6, 7]);
        let mut rows = normal_rows(12, 8);
        rows.sort_unstable();
        assert_eq!(rows, (0..12).collect::<Vec<_>>());
    }
}
