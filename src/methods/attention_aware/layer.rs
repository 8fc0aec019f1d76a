//! `attention-aware` for one layer: the closed form, then the refits on what the converted attention really pools.

use faer::c64;
use ndarray::{Array2, ArrayView2};

use super::output::refit_output;
use super::refine::{RefineSettings, refine};
use super::scores::refit_scores;
use super::values::refit_values;
use super::{Draft, DraftSettings, Step, Steps, analyse_slots, draft};
use crate::arch::AttentionSource;
use crate::calibrate::{Moments, relative_error};
use crate::error::ConvertError;
use crate::methods::LayerReport;
use crate::mla::{LatentAttention, MlaLayer, output_projection};
use crate::stream::SourcePass;

/// A ridge this many times larger than asked is worth a note in the report.
pub(super) const RIDGE_NOTE: f64 = 2.0;

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
fn closed_form(inputs: &Inputs<'_>) -> Result<Draft, ConvertError> {
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
    if let Some(source) = &inputs.target.queries_keys {
        refit_scores(&mut layer, source, inputs.x, inputs.windows, &inputs.steps)
            .map_err(ConvertError::layer(inputs.index))?;
    }
    let heads = refit_values(inputs, &mut layer, &mut notes)?;
    if inputs.steps.has(Step::OutputRefit) {
        refit_output(inputs, &mut layer, &heads, &mut notes)?;
    }
    let mut output = output_projection(&layer, &heads);
    let mut calibration_error = relative_error(output.view(), inputs.target.output.view());
    if inputs.refine.steps > 0 {
        let (x, target) = (inputs.x, inputs.target.output.view());
        let refined = refine(&layer, x, target, inputs.windows, inputs.bias, &inputs.refine);
        if refined.kept {
            layer = refined.layer;
            let heads =
                LatentAttention::new(&layer, inputs.x, inputs.windows).capped(inputs.source.score_softcap).outputs();
            output = output_projection(&layer, &heads);
            // On windows that no gradient step saw.
            calibration_error = refined.error_after;
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
        LayerReport { layer: inputs.index, calibration_error, rope_loss, rank_loss, notes, ..LayerReport::default() };
    Ok(Converted { layer, report, output })
}
