//! The attention weights of one source layer in normal form.

use ndarray::{Array1, Array2};

use super::{ArchError, Architecture, Attention, RopeLayout};
use crate::source::{ModelSource, TensorView};

/// Grouped-query attention of one layer, in f64, ready for the maths.
///
/// Query head `h` attends to KV head `h / (H / g)`. Pair `j` of a head is rows `(j, j + d/2)` and turns by `inv_freq[j]`
/// radians per token.
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
    let names = arch.names.layer(layer);
    let matrix = |role: &str| -> Result<Array2<f64>, ArchError> {
        let view = source.tensors.view(&names.weight(role))?;
        Ok(to_matrix(&view))
    };
    let bias = |role: &str, has: bool| -> Result<Option<Array1<f64>>, ArchError> {
        if !has {
            return Ok(None);
        }
        Ok(Some(Array1::from_vec(source.tensors.view(&names.bias(role))?.to_f64())))
    };
    let qkv_bias = shape.qkv_bias;
    Ok(AttentionSource {
        heads: arch.heads,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        wq: matrix("q")?,
        wk: matrix("k")?,
        wv: matrix("v")?,
        wo: matrix("o")?,
        bq: bias("q", qkv_bias)?,
        bk: bias("k", qkv_bias)?,
        bv: bias("v", qkv_bias)?,
        bo: bias("o", shape.out_bias)?,
        inv_freq: arch.rope.inv_freq.clone(),
        score_scale: (shape.head_dim as f64).powf(-0.5) * arch.rope.amplitude.powi(2),
    })
}

fn to_matrix(view: &TensorView<'_>) -> Array2<f64> {
    let (rows, cols) = (view.shape[0], view.shape[1]);
    // The shape was checked against the config, and the byte length against the shape, when the model was opened.
    Array2::from_shape_fn((rows, cols), {
        let data = view.to_f64();
        move |(i, j)| data[i * cols + j]
    })
}
