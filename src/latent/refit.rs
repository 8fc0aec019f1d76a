//! Fitting what each rank reads of its slice to what the whole latent gives (docs/maths.md, 12).
//!
//! A slice predicts part of the rest of the latent, and a rank pools by probabilities of its own. Both can be corrected in the
//! rank's own rows of `kv_b_proj`, at no cost when it decodes; prompts, which run through the whole model, do not change.
//!
//! Keys. With `C` the covariance of the latents `n` and centred slices, the best linear guess of `n` from `n_t` is
//! `C_{:,t} C_tt^-1 n_t`, so the rank reads
//!
//! ```text
//! UK_t <- UK C_{:,t} C_tt^-1                                                                    (R1)
//! ```
//!
//! in place of its columns of `UK`: they are the same where `C` is diagonal. The mean adds the same to all scores of a query,
//! which a softmax ignores.
//!
//! Values. With `z_t` what rank `t` pools with its own probabilities for head `h`, and `o` the head's output in the whole model, on
//! the calibration text after a prompt,
//!
//! ```text
//! [UV_1 .. UV_T] <- argmin E| o - sum_t UV_t z_t |^2 + lambda |UV - UV_0|^2                     (R2)
//! ```
//!
//! layer by layer, each on the hidden states that the fitted ranks of the layers below decode. One rank has nothing to fit.

use ndarray::{Array2, Axis, s};

use super::transform::transform_of;
use super::weights::need_mla;
use super::{LatentMoments, LatentTransform, LatentWeights, Sharing, Transform};
use crate::arch::{Architecture, MlaShape};
use crate::calibrate::PooledMoments;
use crate::error::ConvertError;
use crate::factor::FactorError;
use crate::factor::linalg::{matmul, solve_right_spd};
use crate::observe::{Event, Observer};
use crate::runtime::{AttentionTensors, Backend, Layer, LayerTensors, Model, RankTensors};
use crate::source::ModelSource;

/// Ridge on a slice's covariance, relative to its mean diagonal.
const KEY_RIDGE: f64 = 1e-3;
/// `lambda` of (R2), relative to the mean square of what is pooled.
const VALUE_RIDGE: f64 = 1e-2;

/// (R1): fit the keys of `ranks`, which hold slices of `weights`, to the `moments` of its latents.
///
/// # Errors
/// [`FactorError`] for moments that are not finite.
pub fn predict_keys(
    ranks: &mut [RankTensors],
    weights: &LatentWeights,
    moments: &LatentMoments,
    shape: &MlaShape,
    sharing: &Sharing,
) -> Result<(), FactorError> {
    if sharing.ranks == 1 {
        return Ok(());
    }
    let (r, nope, head) = (weights.rank(), shape.qk_nope_head_dim, shape.qk_nope_head_dim + shape.v_head_dim);
    let gain = |i: usize| weights.gain.as_ref().map_or(1.0, |g| g[i]);
    for rank in ranks {
        let columns = rank.columns.clone();
        let own = moments.covariance.slice(s![columns.clone(), columns.clone()]).to_owned();
        let lambda = KEY_RIDGE * own.diag().mean().unwrap_or(0.0);
        // `C_{:,t} + lambda I`, so that an uncorrelated slice keeps its columns.
        let mut all = moments.covariance.slice(s![.., columns.clone()]).to_owned();
        for (j, i) in columns.clone().enumerate() {
            all[[i, j]] += lambda;
        }
        let guess = solve_right_spd(&own, &all, KEY_RIDGE, "covariance of a slice")?.0;
        // From gained slices to gained latents.
        let guess = Array2::from_shape_fn((r, columns.len()), |(i, j)| match gain(columns.start + j) {
            0.0 => 0.0,
            g => gain(i) * guess[[i, j]] / g,
        });
        for first in (0..weights.kv_b.nrows()).step_by(head) {
            let keys = matmul(&weights.kv_b.slice(s![first..first + nope, ..]), &guess) * sharing.logit_scale;
            rank.kv_b.slice_mut(s![first..first + nope, ..]).assign(&keys.mapv(|v| v as f32));
        }
    }
    Ok(())
}

/// (R2): fit the values of `ranks`, head by head, to `moments` of what all ranks pool (side by side) against the whole model's
/// outputs.
///
/// # Errors
/// [`FactorError`] for moments that are not finite.
pub fn refit_values(ranks: &mut [RankTensors], moments: &[PooledMoments], shape: &MlaShape) -> Result<(), FactorError> {
    let (nope, head) = (shape.qk_nope_head_dim, shape.qk_nope_head_dim + shape.v_head_dim);
    let r = ranks.iter().map(|rank| rank.columns.len()).sum::<usize>();
    for (h, moments) in moments.iter().enumerate() {
        let rows = h * head + nope..(h + 1) * head;
        let mut values = Array2::<f64>::zeros((shape.v_head_dim, r));
        for rank in ranks.iter() {
            let own = rank.kv_b.slice(s![rows.clone(), ..]).mapv(f64::from);
            values.slice_mut(s![.., rank.columns.clone()]).assign(&own);
        }
        let gram = moments.gram().slice(s![..r, ..r]).to_owned();
        let missing = &moments.cross().slice(s![.., ..r]) - &matmul(&values, &gram);
        values += &solve_right_spd(&gram, &missing, VALUE_RIDGE, "what ranks pool")?.0;
        for rank in ranks.iter_mut() {
            let own = values.slice(s![.., rank.columns.clone()]).mapv(|v| v as f32);
            rank.kv_b.slice_mut(s![rows.clone(), ..]).assign(&own);
        }
    }
    Ok(())
}

/// What the ranks of every layer of `source` hold, its latents rotated by `transform`, keys fitted by (R1) and values by (R2). The
/// first half of each window is a prompt. Phase reported: `refit`.
///
/// # Errors
/// A GQA model; [`ConvertError::Runtime`], [`ConvertError::Layer`].
pub fn refitted_ranks<B: Backend>(
    source: &ModelSource,
    arch: &Architecture,
    backend: &B,
    (windows, moments): (&[Vec<u32>], &[LatentMoments]),
    (transform, sharing): (Transform, &Sharing),
    observer: &dyn Observer,
) -> Result<Vec<Vec<RankTensors>>, ConvertError> {
    let shape = need_mla(source, arch)?;
    let model = Model::new(source, arch, backend);
    observer.event(Event::Phase { name: "refit", steps: Some(arch.layers as u64) });
    let (mut whole, lengths) = model.start(windows)?;
    let mut sliced = whole.clone();
    let prefill = lengths.iter().min().map_or(0, |n| n / 2);
    let mut out = Vec::with_capacity(arch.layers);
    for index in 0..arch.layers {
        let fault = |error: FactorError| ConvertError::Layer { layer: index, source: error.into() };
        let mut tensors = LayerTensors::load(source, arch, index)?;
        let (Some(mut weights), Some(own)) = (LatentWeights::of(&tensors.attention), moments.get(index)) else {
            continue;
        };
        let transform = transform_of(transform, &tensors, &weights, shape, Some(own)).map_err(fault)?;
        let transform = transform.unwrap_or(LatentTransform::Identity);
        let layer = Layer::new(backend, arch, tensors.clone())?;
        weights.fold(&transform);
        if let AttentionTensors::Mla(t) = &mut tensors.attention {
            weights.install(t);
        }
        let own = own.transformed(&transform);
        let rotated = Layer::new(backend, arch, tensors)?;
        let mut ranks = weights.ranks(shape, sharing, Some(&own));
        if sharing.ranks > 1 {
            predict_keys(&mut ranks, &weights, &own, shape, sharing).map_err(fault)?;
            let on_backend = rotated.ranks(ranks.clone(), sharing.shared_rms)?;
            let (value, width) = (shape.v_head_dim, shape.kv_lora_rank / sharing.ranks);
            let mut pooled = vec![PooledMoments::new(shape.kv_lora_rank, value); arch.heads];
            let mut first = 0;
            for &length in &lengths {
                let rows = s![first..first + length, ..];
                let x = layer.attention_input(whole.slice(rows))?;
                let heads = layer.attention_heads(x.view(), &[length])?;
                let parts = rotated.pooled_sliced(sliced.slice(rows), prefill, &on_backend)?;
                for (h, moments) in pooled.iter_mut().enumerate() {
                    let of_head: Vec<_> = parts.iter().map(|p| p.slice(s![.., h * width..(h + 1) * width])).collect();
                    if let Ok(features) = ndarray::concatenate(Axis(1), &of_head) {
                        moments.add(features.view(), heads.slice(s![prefill.., h * value..(h + 1) * value]));
                    }
                }
                first += length;
            }
            refit_values(&mut ranks, &pooled, shape).map_err(fault)?;
        }
        layer.forward(&mut whole, &lengths)?;
        model.check_layer(index, whole.view())?;
        let on_backend = rotated.ranks(ranks.clone(), sharing.shared_rms)?;
        rotated.forward_sliced(&mut sliced, &lengths, prefill, &on_backend)?;
        model.check_layer(index, sliced.view())?;
        out.push(ranks);
        let tokens = (whole.nrows() * (index + 1)) as u64;
        observer.event(Event::Step { done: index as u64 + 1, tokens });
    }
    Ok(out)
}
