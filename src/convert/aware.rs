//! `attention-aware` for one layer: the closed form, then the refits on what the converted attention really pools.

use faer::c64;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::scores::refit_scores;
use super::streams::SourcePass;
use super::{ConvertError, LayerReport, Steps};
use crate::arch::AttentionSource;
use crate::calibrate::{LatentAttention, Moments, PooledMoments, output_projection, relative_error};
use crate::factor::FactorError;
use crate::factor::linalg::matmul_f32_into;
use crate::factor::refit::refit;
use crate::methods::MlaLayer;
use crate::methods::attention_aware::{Draft, DraftSettings, analyse_slots, draft};
use crate::refine::{RefineSettings, refine};

/// Ridge of the value refit, as a share of the mean pooled energy: enough to hold directions that hardly vary.
const VALUE_RIDGE: f64 = 1e-4;
/// Ridge of the output refit towards the present projection (algorithms.md 18.3).
const OUTPUT_RIDGE: f64 = 0.01;
/// Heads whose values are refitted side by side, so that one's copies and solves run beside the other's products.
const HEADS: usize = 2;
/// A ridge this many times larger than asked is worth a note in the report.
const RIDGE_NOTE: f64 = 2.0;

/// One converted layer with its attention output on the stream it was calibrated on.
pub(super) struct Converted {
    pub layer: MlaLayer,
    pub report: LayerReport,
    /// `[T, D]`.
    pub output: Array2<f32>,
}

/// What a layer is converted from.
pub(super) struct Inputs<'a> {
    pub index: usize,
    pub source: &'a AttentionSource,
    /// What the source's attention does with the tokens below, on the source's stream: the target of the refits.
    pub target: &'a SourcePass,
    /// Normed inputs the converted layer sees, `[T, D]`.
    pub x: ArrayView2<'a, f32>,
    pub windows: &'a [usize],
    /// Slots per frequency.
    pub slots: &'a [usize],
    pub rank: usize,
    pub steps: Steps,
    pub bias: bool,
    /// Gradient steps after the closed form; none where `steps` is 0.
    pub refine: RefineSettings,
}

/// The closed form without refits.
pub(super) fn closed_form(inputs: &Inputs<'_>) -> Result<Draft, ConvertError> {
    let mut moments = Moments::new(inputs.x.ncols());
    moments.add(inputs.x);
    let ones;
    let phases: &Array2<c64> = match &inputs.target.phases {
        Some(p) => p,
        None => {
            ones = Array2::from_elem((inputs.source.heads, inputs.source.head_dim / 2), c64::new(1.0, 0.0));
            &ones
        }
    };
    let fail = ConvertError::layer(inputs.index);
    let analysis = analyse_slots(inputs.source, &moments, phases, &inputs.steps).map_err(&fail)?;
    let settings = DraftSettings { slots: inputs.slots, rank: inputs.rank, steps: inputs.steps, bias: inputs.bias };
    draft(inputs.source, &moments, phases, &analysis, &settings).map_err(&fail)
}

/// Convert one layer.
pub(super) fn convert_layer(inputs: &Inputs<'_>) -> Result<Converted, ConvertError> {
    let Draft { mut layer, rank_loss, rope_loss } = closed_form(inputs)?;
    let mut notes = Vec::new();
    if let Some(scores) = &inputs.target.scores {
        refit_scores(&mut layer, scores, inputs.x, inputs.windows, &inputs.steps)
            .map_err(ConvertError::layer(inputs.index))?;
    }
    let heads = refit_values(inputs, &mut layer, &mut notes)?;
    if inputs.steps.output_refit {
        refit_output(inputs, &mut layer, &heads, &mut notes)?;
    }
    let mut output = output_projection(&layer, &heads);
    let mut predicted_error = relative_error(output.view(), inputs.target.output.view());
    if inputs.refine.steps > 0 {
        let (x, target) = (inputs.x, inputs.target.output.view());
        let refined = refine(&layer, x, target, inputs.windows, inputs.bias, &inputs.refine);
        if refined.kept {
            layer = refined.layer;
            let heads =
                LatentAttention::new(&layer, inputs.x, inputs.windows).capped(inputs.source.score_softcap).outputs();
            output = output_projection(&layer, &heads);
            // On windows that no gradient step saw.
            predicted_error = refined.error_after;
            notes.push(format!(
                "refined: held-out error {:.4} to {:.4} (step {})",
                refined.error_before, refined.error_after, refined.best_step
            ));
        } else {
            notes.push(format!(
                "refinement did not lower the held-out error {:.4}: closed form kept",
                refined.error_before
            ));
        }
    }
    let report =
        LayerReport { layer: inputs.index, predicted_error, rope_loss, rank_loss, notes, ..LayerReport::default() };
    Ok(Converted { layer, report, output })
}

/// Each head's value up-projection, refitted so that what the converted attention pools gives the source's head output.
/// Returns the head outputs `[T, H d_V]`.
fn refit_values(
    inputs: &Inputs<'_>,
    layer: &mut MlaLayer,
    notes: &mut Vec<String>,
) -> Result<Array2<f32>, ConvertError> {
    let (value, heads) = (layer.value_dim(), layer.heads);
    let tokens = inputs.x.nrows();
    let mut out = Array2::zeros((tokens, heads * value));
    let mut ups = layer.v_up.clone();
    let mut constants = Array1::zeros(heads * value);
    {
        let attention = LatentAttention::new(layer, inputs.x, inputs.windows).capped(inputs.source.score_softcap);

        let of_head = |h: usize, pooled: &mut Array2<f32>, out: ArrayViewMut2<'_, f32>| {
            attention.pool(h, pooled.view_mut());
            if !inputs.steps.value_refit {
                attention.head_output(h, pooled.view(), out);
                return Ok(None);
            }
            let mut moments = PooledMoments::new(pooled.ncols(), value);
            moments.add(pooled.view(), inputs.target.heads.slice(s![.., h * value..(h + 1) * value]));
            let fit = refit(&moments.gram(), &moments.cross(), None, VALUE_RIDGE, inputs.bias, "pooled latents")?;
            let up = fit.weight.mapv(|v| v as f32);
            matmul_f32_into(out, pooled.view(), up.t());
            Ok(Some(fit))
        };
        let mut pooled = vec![Array2::zeros((tokens, layer.latent.nrows())); HEADS.min(heads)];
        let mut places: Vec<_> = out.axis_chunks_iter_mut(Axis(1), value).enumerate().collect();
        for now in places.chunks_mut(HEADS) {
            let work = pooled.par_iter_mut().zip(now.par_iter_mut());
            let found = work.map(|(pooled, (h, out))| of_head(*h, pooled, out.view_mut()));
            let found = found.collect::<Result<Vec<_>, FactorError>>().map_err(ConvertError::layer(inputs.index))?;
            for (&mut (h, _), fit) in now.iter_mut().zip(found) {
                let Some(fit) = fit else { continue };
                let columns = h * value..(h + 1) * value;
                if fit.ridge > VALUE_RIDGE * RIDGE_NOTE {
                    notes.push(format!(
                        "head {h}: singular pooled latents, value refit regularised by {:.0e}",
                        fit.ridge
                    ));
                }
                ups.slice_mut(s![columns.clone(), ..]).assign(&fit.weight);
                constants.slice_mut(s![columns]).assign(&fit.offset);
            }
        }
    }
    if inputs.steps.value_refit {
        layer.v_up = ups;
        if inputs.bias {
            // The offsets replace every constant the closed form had carried: the targets hold the value bias already.
            let carried = layer.wo.dot(&constants);
            layer.wo_bias = Some(inputs.source.bo.as_ref().map_or(carried.clone(), |b| b + &carried));
        }
    }
    Ok(out)
}

/// The output projection, refitted on the source's attention output.
fn refit_output(
    inputs: &Inputs<'_>,
    layer: &mut MlaLayer,
    heads: &Array2<f32>,
    notes: &mut Vec<String>,
) -> Result<(), ConvertError> {
    let mut moments = PooledMoments::new(heads.ncols(), layer.hidden());
    moments.add(heads.view(), inputs.target.output.view());
    let fit = refit(&moments.gram(), &moments.cross(), Some(&layer.wo), OUTPUT_RIDGE, inputs.bias, "head outputs")
        .map_err(ConvertError::layer(inputs.index))?;
    if fit.ridge > OUTPUT_RIDGE * RIDGE_NOTE {
        notes.push(format!("singular head outputs, output refit regularised by {:.0e}", fit.ridge));
    }
    layer.wo = fit.weight;
    if inputs.bias {
        layer.wo_bias = Some(fit.offset);
    }
    Ok(())
}
