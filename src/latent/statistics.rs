//! Second moments of every layer's latents on calibration text, through the reference runtime, one layer in memory at a
//! time.

use ndarray::{Array1, Array2, ArrayView2, s};

use super::weights::need_mla;
use crate::arch::Architecture;
use crate::calibrate::{CorpusError, Moments, calibration_windows, read_texts};
use crate::convert::{CalibrationSettings, ConvertError};
use crate::observe::{Event, Observer};
use crate::runtime::{Backend, LayerTensors, Model};
use crate::source::ModelSource;

/// Moments of one layer's latents `n = norm(c)`, before the norm's gain; where the class norms no latent, of `c` itself.
#[derive(Debug, Clone)]
pub struct LatentMoments {
    /// `E[n]`, `[r]`.
    pub mean: Array1<f64>,
    /// `E[n n^T]`, `[r, r]`.
    pub second: Array2<f64>,
}

impl LatentMoments {
    /// `E[(n - mean)(n - mean)^T]`.
    pub fn covariance(&self) -> Array2<f64> {
        let mean = self.mean.view().insert_axis(ndarray::Axis(1));
        &self.second - &mean.dot(&mean.t())
    }
}

/// Calibration windows for a latent of `rank` values.
///
/// # Errors
/// A text that cannot be read or is too short.
pub fn latent_windows(
    source: &ModelSource,
    arch: &Architecture,
    settings: &CalibrationSettings,
    rank: usize,
) -> Result<Vec<Vec<u32>>, ConvertError> {
    let mut settings = settings.clone();
    settings.seq_len = settings.seq_len.min(arch.max_position);
    let texts = read_texts(&settings.files)?;
    let why = format!(", four for each of the {rank} values of the latent");
    let windows: Result<_, CorpusError> = calibration_windows(&source.tokenizer()?, &texts, &settings, 4 * rank, &why);
    Ok(windows?)
}

/// Run the windows through the model and take each layer's moments on the way. Phase reported: `calibrate`.
///
/// # Errors
/// A GQA model; [`ConvertError::Runtime`].
pub fn latent_moments<B: Backend>(
    source: &ModelSource,
    arch: &Architecture,
    backend: &B,
    windows: &[Vec<u32>],
    observer: &dyn Observer,
) -> Result<Vec<LatentMoments>, ConvertError> {
    let rank = need_mla(source, arch)?.kv_lora_rank;
    let model = Model::new(source, arch, backend);
    observer.event(Event::Phase { name: "calibrate", steps: Some(arch.layers as u64) });
    let (mut hidden, lengths) = model.start(windows)?;
    let mut out = Vec::with_capacity(arch.layers);
    for index in 0..arch.layers {
        let tensors = LayerTensors::load(source, arch, index)?;
        let gain = tensors.latent_gain().to_vec();
        let layer = crate::runtime::Layer::new(backend, arch, tensors)?;
        let x = layer.attention_input(hidden.view())?;
        let latents = layer.latents(x.view(), &lengths)?;
        out.push(moments_of(latents.slice(s![.., ..rank]), &gain));
        layer.forward(&mut hidden, &lengths)?;
        model.check_layer(index, hidden.view())?;
        let tokens = (hidden.nrows() * (index + 1)) as u64;
        observer.event(Event::Step { done: index as u64 + 1, tokens });
    }
    Ok(out)
}

/// Moments of latents `[T, r]`, with their gain taken out again. Where a gain is zero nothing is read, and the moments are 0.
fn moments_of(latents: ArrayView2<'_, f32>, gain: &[f32]) -> LatentMoments {
    let mut moments = Moments::new(latents.ncols());
    moments.add(latents);
    let (mut mean, mut second) = (moments.mean(), moments.second());
    let inverse = |i: usize| match gain.get(i) {
        None => 1.0,
        Some(0.0) => 0.0,
        Some(g) => 1.0 / f64::from(*g),
    };
    mean.iter_mut().enumerate().for_each(|(i, m)| *m *= inverse(i));
    second.indexed_iter_mut().for_each(|((i, j), m)| *m *= inverse(i) * inverse(j));
    LatentMoments { mean, second }
}
