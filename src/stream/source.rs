//! The calibration tokens on their way through the layers: hidden states, and one layer of the source at work on them.

use std::ops::Range;

use faer::c64;
use ndarray::{Array2, ArrayView2, Axis, concatenate, s};

use super::head_norms::{Explained, HeadNorms};
use crate::arch::{Architecture, AttentionSource, load_attention_source};
use crate::calibrate::{attend, project};
use crate::error::ConvertError;
use crate::mla::{LatentAttention, MlaLayer};
use crate::runtime::{Device, Layer, LayerTensors, Model, Qkv};
use crate::source::ModelSource;

/// The model that is converted, as its layers are read.
#[derive(Debug, Clone, Copy)]
pub struct SourceModel<'a> {
    /// Its files.
    pub source: &'a ModelSource,
    /// Its architecture.
    pub arch: &'a Architecture,
    /// Whether the output keeps norms of queries and keys; otherwise they become linear maps ([`SourceLayer::linearise`]).
    pub keeps_head_norms: bool,
}

/// Some rows of windows that lie end to end, given the tokens of each.
pub type Rows = fn(&[usize]) -> Vec<Range<usize>>;

/// What a pass of the source's attention shall keep beside its output.
#[derive(Debug, Clone, Copy, Default)]
pub struct Keep {
    /// Phases by head and frequency ([`SourcePass::phases`]).
    pub phases: bool,
    /// Queries and keys of these rows, given the tokens of each window ([`SourcePass::queries_keys`]).
    pub queries_keys: Option<Rows>,
}

/// Hidden states of one model at the input of a layer, for all windows end to end.
#[derive(Debug)]
pub struct Stream {
    /// `[T, D]`.
    pub hidden: Array2<f32>,
    /// Tokens per window.
    pub windows: Vec<usize>,
}

/// What the source's attention does on a stream.
#[derive(Debug)]
pub struct SourcePass {
    /// Queries and keys after RoPE of the rows that [`Keep::queries_keys`] names, without values; if asked for.
    pub queries_keys: Option<Qkv>,
    /// Normed input, `[T, D]`.
    pub x: Array2<f32>,
    /// Head outputs before the output projection, `[T, H d]`.
    pub heads: Array2<f32>,
    /// Attention output, `[T, D]`, to be added to the hidden state.
    pub output: Array2<f32>,
    /// Mean phase `alpha[h, j]` of each head and frequency over the keys it attends to, if asked for.
    pub phases: Option<Array2<c64>>,
}

/// Gain of the input norm of layer `index`, `[D]`, without loading the layer.
///
/// # Errors
/// Tensors that cannot be read.
pub fn input_gain(model: &SourceModel<'_>, index: usize) -> Result<Vec<f64>, ConvertError> {
    Ok(widened(model, &LayerTensors::load_input_norm(model.source, model.arch, index)?))
}

/// Where there is no norm the gain bounds nothing; only classes that do not need the bound take such a source.
fn widened(model: &SourceModel<'_>, gain: &[f32]) -> Vec<f64> {
    match gain.is_empty() {
        true => vec![1.0; model.arch.hidden],
        false => gain.iter().map(|v| f64::from(*v)).collect(),
    }
}

/// Some rows, in order.
pub fn pick_rows(a: ArrayView2<'_, f32>, rows: &[Range<usize>]) -> Array2<f32> {
    let parts: Vec<_> = rows.iter().map(|rows| a.slice(s![rows.clone(), ..])).collect();
    concatenate(Axis(0), &parts).unwrap_or_else(|_| Array2::zeros((0, a.ncols())))
}

/// One source layer: its weights for the maths, and for the forward pass.
pub struct SourceLayer<'b> {
    /// f64, for the factorisation.
    pub attention: AttentionSource,
    /// Gain of the input norm.
    pub gain: Vec<f64>,
    /// f32, for the forward pass.
    pub layer: Layer<'b, Device>,
    /// Norms of queries and keys that the target has no place for.
    norms: Option<HeadNorms>,
}

impl<'b> SourceLayer<'b> {
    /// Read layer `index`.
    ///
    /// # Errors
    /// Tensors that cannot be read.
    pub fn load(model: &SourceModel<'_>, backend: &'b Device, index: usize) -> Result<Self, ConvertError> {
        let attention = load_attention_source(model.source, model.arch, index)?;
        let tensors = LayerTensors::load(model.source, model.arch, index)?;
        let gain = widened(model, &tensors.input_norm);
        let extras = &tensors.extras;
        let norms = match (model.arch.qk_norm, &extras.q_norm, &extras.k_norm) {
            (Some(scope), Some(q), Some(k)) if !model.keeps_head_norms => {
                Some(HeadNorms { scope, q: q.clone(), k: k.clone(), eps: model.arch.norm_eps })
            }
            _ => None,
        };
        Ok(Self { attention, gain, layer: Layer::new(backend, model.arch, tensors)?, norms })
    }

    /// Replace norms of queries and keys, where the target has no place for them, by linear maps fitted on normed inputs
    /// `x` `[T, D]`. The forward pass keeps the norms. `None`: there are none to replace.
    ///
    /// # Errors
    /// Inputs with a singular moment.
    pub fn linearise(&mut self, index: usize, x: ArrayView2<'_, f32>) -> Result<Option<Explained>, ConvertError> {
        match self.norms.take() {
            None => Ok(None),
            Some(norms) => norms.linearise(&mut self.attention, x).map(Some).map_err(ConvertError::layer(index)),
        }
    }

    /// The source's attention on a stream.
    ///
    /// # Errors
    /// A device that fails.
    pub fn attend(&self, stream: &Stream, keep: Keep) -> Result<SourcePass, ConvertError> {
        let x = self.layer.attention_input(stream.hidden.view())?;
        let qkv = self.layer.project_qkv(x.view(), &stream.windows)?;
        let (heads, distances) = attend(&qkv, &stream.windows, keep.phases);
        let queries_keys = keep.queries_keys.map(|rows| {
            let rows = rows(&stream.windows);
            let (q, k) = (pick_rows(qkv.q.view(), &rows), pick_rows(qkv.k.view(), &rows));
            Qkv { v: Array2::zeros((q.nrows(), 0)), q, k, v_dim: 0, ..qkv }
        });
        drop(qkv);
        let output = self.layer.output_projection(heads.view())?;
        Ok(SourcePass { queries_keys, x, heads, output, phases: distances.map(|d| d.phases(&self.attention.inv_freq)) })
    }

    /// Attention output with the source's own values and the keys of `rotated`, a layer whose latent is its keys without
    /// rotation.
    ///
    /// # Errors
    /// A device that fails.
    pub fn output_with_keys(
        &self,
        rotated: &MlaLayer,
        x: ArrayView2<'_, f32>,
        windows: &[usize],
    ) -> Result<Array2<f32>, ConvertError> {
        let (d, n) = (self.attention.head_dim, self.attention.group());
        let values = project(x, &self.attention.wv, self.attention.bv.as_ref());
        let attention = LatentAttention::new(rotated, x, windows).capped(self.attention.score_softcap);
        let mut heads = Array2::zeros((x.nrows(), rotated.heads * d));
        for h in 0..rotated.heads {
            let own = values.slice(s![.., (h / n) * d..(h / n + 1) * d]);
            attention.pool_from(h, own, heads.slice_mut(s![.., h * d..(h + 1) * d]));
        }
        Ok(self.layer.output_projection(heads.view())?)
    }

    /// Add the attention output, and then the MLP's, to a stream: it becomes the input of the next layer.
    ///
    /// # Errors
    /// A device that fails.
    pub fn advance(&self, stream: &mut Stream, attention: &Array2<f32>) -> Result<(), ConvertError> {
        self.layer.add_attention(&mut stream.hidden, attention.view())?;
        self.layer.add_mlp(&mut stream.hidden)?;
        Ok(())
    }
}

impl Stream {
    /// Embed windows of tokens.
    ///
    /// # Errors
    /// An embedding that cannot be read.
    pub fn start(model: &SourceModel<'_>, backend: &Device, windows: &[Vec<u32>]) -> Result<Self, ConvertError> {
        let model = Model::new(model.source, model.arch, backend);
        let tokens: Vec<u32> = windows.iter().flatten().copied().collect();
        Ok(Self { hidden: model.embed(&tokens)?, windows: windows.iter().map(Vec::len).collect() })
    }
}

/// The rows of the first `count` windows.
pub fn first_windows<'a>(
    x: ArrayView2<'a, f32>,
    windows: &'a [usize],
    count: usize,
) -> (ArrayView2<'a, f32>, &'a [usize]) {
    let count = count.min(windows.len());
    let rows = windows[..count].iter().sum::<usize>();
    (x.slice_move(s![..rows, ..]), &windows[..count])
}
