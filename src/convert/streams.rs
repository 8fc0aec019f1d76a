//! The calibration tokens on their way through the layers: the source's hidden states and, where the method calibrates on
//! it, the converted model's.

use faer::c64;
use ndarray::{Array2, ArrayView2, s};

use super::head_norms::{Explained, HeadNorms};
use super::{ConvertError, Job, scores};
use crate::arch::{AttentionSource, load_attention_source};
use crate::calibrate::{LatentAttention, attend, project};
use crate::methods::MlaLayer;
use crate::runtime::{Device, Layer, LayerTensors, Model, Qkv};

/// Hidden states of one model at the input of a layer, for all windows end to end.
#[derive(Debug)]
pub(super) struct Stream {
    /// `[T, D]`.
    pub hidden: Array2<f32>,
    /// Tokens per window.
    pub windows: Vec<usize>,
}

/// What the source's attention does on a stream.
pub(super) struct SourcePass {
    /// Queries and keys after RoPE of the windows that [`scores::choose`] names, without values; if asked for.
    pub scores: Option<Qkv>,
    /// Normed input, `[T, D]`.
    pub x: Array2<f32>,
    /// Head outputs before the output projection, `[T, H d]`.
    pub heads: Array2<f32>,
    /// Attention output, `[T, D]`, to be added to the hidden state.
    pub output: Array2<f32>,
    /// `alpha[h, j]`, if asked for.
    pub phases: Option<Array2<c64>>,
}

/// Gain of the input norm of layer `index`, without loading the layer.
pub(super) fn input_gain(job: &Job<'_>, index: usize) -> Result<Vec<f64>, ConvertError> {
    Ok(wide(job, &LayerTensors::load_input_norm(job.source, job.arch, index)?))
}

/// Where there is no norm the gain bounds nothing; only classes that do not need the bound take such a source.
fn wide(job: &Job<'_>, gain: &[f32]) -> Vec<f64> {
    match gain.is_empty() {
        true => vec![1.0; job.arch.hidden],
        false => gain.iter().map(|v| f64::from(*v)).collect(),
    }
}

/// One source layer: its weights for the maths, and for the forward pass.
pub(super) struct SourceLayer<'b> {
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
    pub fn load(job: &Job<'_>, backend: &'b Device, index: usize) -> Result<Self, ConvertError> {
        let attention = load_attention_source(job.source, job.arch, index)?;
        let tensors = LayerTensors::load(job.source, job.arch, index)?;
        let gain = wide(job, &tensors.input_norm);
        let extras = &tensors.extras;
        let norms = match (job.arch.qk_norm, &extras.q_norm, &extras.k_norm) {
            (Some(scope), Some(q), Some(k)) if !job.spec.qk_norm => {
                Some(HeadNorms { scope, q: q.clone(), k: k.clone(), eps: job.arch.norm_eps })
            }
            _ => None,
        };
        Ok(Self { attention, gain, layer: Layer::new(backend, job.arch, tensors)?, norms })
    }

    /// Replace norms of queries and keys, where the target has no place for them, by linear maps fitted on normed inputs
    /// `x` `[T, D]`. The forward pass keeps the norms.
    pub fn linearise(&mut self, index: usize, x: ArrayView2<'_, f32>) -> Result<Option<Explained>, ConvertError> {
        match self.norms.take() {
            None => Ok(None),
            Some(norms) => norms.linearise(&mut self.attention, x).map(Some).map_err(ConvertError::layer(index)),
        }
    }

    /// The source's attention on a stream; with `fitted`, also what refits on scores need of it, and the phases.
    pub fn attend(&self, stream: &Stream, fitted: bool) -> Result<SourcePass, ConvertError> {
        let x = self.layer.attention_input(stream.hidden.view())?;
        let qkv = self.layer.project_qkv(x.view(), &stream.windows)?;
        let (heads, distances) = attend(&qkv, &stream.windows, fitted);
        let scores = fitted.then(|| scores::of_chosen(&qkv, &stream.windows));
        drop(qkv);
        let output = self.layer.output_projection(heads.view())?;
        Ok(SourcePass { scores, x, heads, output, phases: distances.map(|d| d.phases(&self.attention.inv_freq)) })
    }

    /// Attention output with the source's own values and a layer's keys that lost rotations (`rotated`, whose latent is
    /// its keys).
    pub fn behind_rotation(
        &self,
        rotated: &MlaLayer,
        x: &Array2<f32>,
        windows: &[usize],
    ) -> Result<Array2<f32>, ConvertError> {
        let (d, n) = (self.attention.head_dim, self.attention.group());
        let values = project(x.view(), &self.attention.wv, self.attention.bv.as_ref());
        let attention = LatentAttention::new(rotated, x.view(), windows).capped(self.attention.score_softcap);
        let mut heads = Array2::zeros((x.nrows(), rotated.heads * d));
        for h in 0..rotated.heads {
            let own = values.slice(s![.., (h / n) * d..(h / n + 1) * d]);
            attention.pool_from(h, own, heads.slice_mut(s![.., h * d..(h + 1) * d]));
        }
        Ok(self.layer.output_projection(heads.view())?)
    }

    /// Add the attention output and the MLP's to a stream.
    pub fn advance(&self, stream: &mut Stream, attention: &Array2<f32>) -> Result<(), ConvertError> {
        self.layer.add_attention(&mut stream.hidden, attention.view())?;
        self.layer.add_mlp(&mut stream.hidden)?;
        Ok(())
    }
}

impl Stream {
    /// Embed windows of tokens.
    pub fn start(job: &Job<'_>, backend: &Device, windows: &[Vec<u32>]) -> Result<Self, ConvertError> {
        let model = Model::new(job.source, job.arch, backend);
        let tokens: Vec<u32> = windows.iter().flatten().copied().collect();
        Ok(Self { hidden: model.embed(&tokens)?, windows: windows.iter().map(Vec::len).collect() })
    }
}

/// The rows of the first `count` windows.
pub(super) fn first_windows<'a>(
    x: &'a Array2<f32>,
    windows: &'a [usize],
    count: usize,
) -> (ArrayView2<'a, f32>, &'a [usize]) {
    let count = count.min(windows.len());
    let rows = windows[..count].iter().sum::<usize>();
    (x.slice(s![..rows, ..]), &windows[..count])
}
