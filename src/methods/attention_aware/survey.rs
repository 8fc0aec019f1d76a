//! What is open of `attention-aware` until the model was surveyed: which frequencies get slots (shared by all layers, since a
//! stock class has one list), and which split of the budget loses least.

use ndarray::Array2;

use super::layer::{Converted, Inputs, convert_layer};
use super::refine::RefineSettings;
use super::{AttentionAware, Slots, Step, analyse_slots};
use crate::calibrate::Moments;
use crate::error::ConvertError;
use crate::factor::slots::{share_slots, stock_grid};
use crate::methods::{Choice, Made, Split, Survey, SurveyResult, least, trial_layers};
use crate::mla::output_error;
use crate::stream::{SourcePass, Stream, Visit};
use crate::target::RopeGrid;

/// A split with its slots per source frequency, `[d / 2]`.
struct Candidate {
    split: Split,
    slots: Vec<usize>,
}

/// Errors of a candidate on trial layers.
#[derive(Clone, Copy, Default)]
struct Errors {
    /// On windows held out, or those fitted on where there are too few.
    short: f64,
    /// On the longer window.
    long: f64,
}

/// Settle slots and split.
pub(super) fn survey(method: &AttentionAware, survey: &Survey<'_>, predict: bool) -> Result<Choice, ConvertError> {
    let candidates = candidates(method, survey)?;
    let Some(first) = candidates.first() else {
        return Err(ConvertError::refused(
            format!("no rotated width fits the stock grid of head size {}", survey.case.shape.head_dim),
            "use `--rope-grid free`, or a qk_rope_head_dim that divides the head size",
        ));
    };
    let chosen = |candidate: &Candidate, predicted_error: Option<f64>, decisions: Vec<String>| {
        let result = SurveyResult::new(&Slots { slots: candidate.slots.clone() })?;
        Ok(Choice { split: candidate.split, q_rank: None, result, predicted_error, decisions })
    };
    if candidates.len() == 1 && !predict {
        return chosen(first, None, Vec::new());
    }
    let trial = trial_layers(survey.case.arch.layers);
    let (errors, longer) = compare(method, survey, &candidates, &trial)?;
    let best = least(&errors.iter().map(|e| e.short + e.long).collect::<Vec<_>>());
    let mut decisions = Vec::new();
    if candidates.len() > 1 {
        let error = |of: &Errors| match longer {
            None => format!("{:.3}", of.short),
            Some(_) => format!("{:.3} and {:.3}", of.short, of.long),
        };
        let one = |(c, e): (&Candidate, &Errors)| format!("{}+{}: {}", c.split.rope, c.split.rank, error(e));
        let list: Vec<String> = candidates.iter().zip(&errors).map(one).collect();
        let beyond = longer.map(|n| format!(", on short windows and on one of {n} tokens")).unwrap_or_default();
        decisions.push(format!(
            "split {} rotated + {} latent: the least error of the attention output on {} trial layers{beyond} ({})",
            candidates[best].split.rope,
            candidates[best].split.rank,
            trial.len(),
            list.join(", ")
        ));
    }
    chosen(&candidates[best], Some(errors[best].short), decisions)
}

/// Slots of every split.
fn candidates(method: &AttentionAware, survey: &Survey<'_>) -> Result<Vec<Candidate>, ConvertError> {
    let (head_dim, rotary_dim) = (survey.case.shape.head_dim, survey.case.shape.rotary_dim);
    let grid = survey.candidates.grid;
    let mut values: Vec<Array2<f64>> = Vec::new();
    if grid == RopeGrid::Free {
        survey.walk.layers(method.keep(), |visit| {
            let mut moments = Moments::new(survey.case.arch.hidden);
            moments.add(visit.pass.x.view());
            if let Some(phases) = &visit.pass.phases {
                let analysis = analyse_slots(&visit.layer.attention, &moments, phases, &method.steps);
                values.push(analysis.map_err(ConvertError::layer(visit.index))?.value);
            }
            Ok(())
        })?;
    }
    let slots = |rope: usize| match grid {
        RopeGrid::Free => Some(share_slots(&values, rope / 2)),
        RopeGrid::Stock => stock_grid(rotary_dim, rope).map(|mut slots| {
            // Pairs without rotation.
            slots.resize(head_dim / 2, 0);
            slots
        }),
    };
    let splits = survey.candidates.splits.iter();
    Ok(splits.filter_map(|&split| slots(split.rope).map(|slots| Candidate { split, slots })).collect())
}

/// Errors of the candidates, and the length of the longer window if one was used.
///
/// Splits are compared on windows that nothing was fitted on: refits on few tokens flatter the wider latent, which has more
/// to fit. Where there is a window longer than any that is fitted on, the error on it counts as much: at its distances,
/// rotated width is worth more.
fn compare(
    method: &AttentionAware,
    survey: &Survey<'_>,
    candidates: &[Candidate],
    trial: &[usize],
) -> Result<(Vec<Errors>, Option<usize>), ConvertError> {
    let held_out = survey.walk.held_out;
    let longer = survey.walk.longer.filter(|_| candidates.len() > 1 && !held_out.is_empty());
    let beside = [Some(held_out), longer.map(std::slice::from_ref)];
    let beside: Vec<&[Vec<u32>]> = beside.into_iter().flatten().filter(|windows| !windows.is_empty()).collect();
    let result = SurveyResult::default();
    let made = Made { case: survey.case, geometry: survey.geometry, bias: survey.candidates.bias, result: &result };
    let mut errors = vec![Errors::default(); candidates.len()];
    survey.walk.layers_beside(&beside, method.keep(), |visit| {
        if !trial.contains(&visit.index) {
            return Ok(());
        }
        let cap = visit.layer.attention.score_softcap;
        for (errors, candidate) in errors.iter_mut().zip(candidates) {
            let out = convert_on_trial(method, &made, &visit, &candidate.slots, candidate.split.rank)?;
            let error = |(pass, stream): &(SourcePass, &Stream)| {
                output_error(&out.layer, cap, pass.x.view(), &stream.windows, pass.output.view())
            };
            let share = trial.len() as f64;
            errors.short += visit.others.first().map_or(out.report.calibration_error, error) / share;
            errors.long += visit.others.get(1).map_or(0.0, error) / share;
        }
        Ok(())
    })?;
    Ok((errors, longer.map(Vec::len)))
}

/// One layer at one choice of slots and latent width, without refinement and without the output refit: on few tokens both
/// would fit noise.
pub(super) fn convert_on_trial(
    method: &AttentionAware,
    made: &Made<'_>,
    visit: &Visit<'_, '_>,
    slots: &[usize],
    rank: usize,
) -> Result<Converted, ConvertError> {
    convert_layer(&Inputs {
        index: visit.index,
        source: &visit.layer.attention,
        target: visit.pass,
        x: visit.pass.x.view(),
        windows: &visit.stream.windows,
        slots,
        rank,
        steps: method.steps.without(Step::OutputRefit),
        bias: made.bias,
        refine: RefineSettings { steps: 0, ..RefineSettings::default() },
    })
}
