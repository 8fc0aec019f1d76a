//! A quick look at the whole model before converting it: which frequencies get slots (shared by all layers, since a stock
//! class has one list), which split of the budget loses least, which FreqFold.

use ndarray::{Array2, ArrayView2};

use super::aware::{Converted, Inputs, convert_layer};
use super::head_norms::survey_norms;
use super::streams::{SourceLayer, SourcePass, Stream};
use super::widths::folds;
use super::{ConvertError, Job, Method, RopeGrid};
use super::{hybrid, weights};
use crate::arch::AttentionSource;
use crate::calibrate::{LatentAttention, Moments, output_projection, relative_error};
use crate::factor::slots::{share_slots, stock_grid};
use crate::methods::attention_aware::analyse_slots;
use crate::methods::{MethodError, MlaLayer, care, transmla};
use crate::observe::{Event, Observer};
use crate::refine::RefineSettings;
use crate::runtime::Device;

/// Windows that the survey looks at.
const WINDOWS: usize = 8;
/// Tokens of a window that it looks at, the first ones.
const LONGEST: usize = 512;
/// At most this many layers are converted on trial, evenly spread.
const TRIAL_LAYERS: usize = 8;

/// What the survey found.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub(super) struct Survey {
    /// Slots per source frequency, `[d / 2]`.
    pub slots: Vec<usize>,
    /// FreqFold.
    pub fold: usize,
    /// Layers that keep the source's attention, where the survey chose them.
    pub kept: Vec<bool>,
    /// What methods that factorise weights need to know.
    pub weights: Option<weights::Found>,
    /// Mean relative error of the trial layers, for what was chosen.
    pub predicted_error: Option<f64>,
}

/// Look at the model, settle what the settings leave open, and say why. `longer` is a window for the choice of a split.
pub(super) fn survey(
    job: &mut Job<'_>,
    backend: &Device,
    (windows, longer): (&[Vec<u32>], Option<Vec<u32>>),
    measure: bool,
    observer: &dyn Observer,
) -> Result<Survey, ConvertError> {
    // Windows that are shorter than asked for are there for their first tokens, and hold too little to fit on.
    let asked = job.settings.calibration.seq_len.min(job.arch.max_position);
    let whole: Vec<&Vec<u32>> = windows.iter().filter(|window| window.len() >= asked).collect();
    let step = whole.len().div_ceil(WINDOWS).max(1);
    let every = |first: usize| -> Vec<Vec<u32>> {
        whole.iter().skip(first).step_by(step).map(|w| w[..w.len().min(LONGEST.max(asked))].to_vec()).collect()
    };
    let few = every(0);
    // Between them; none where there are few windows in all.
    let held_out = every(step / 2);
    let held_out = if step > 1 { held_out } else { Vec::new() };
    if job.arch.qk_norm.is_some() && job.settings.method != Method::Exact {
        survey_norms(job, backend, &few, observer)?;
    }
    let mut found = match job.settings.method {
        Method::Exact => Survey::default(),
        Method::Transmla | Method::Care => survey_fold(job, backend, &few, measure, observer)?,
        Method::AttentionAware => survey_slots(job, backend, &few, (&held_out, longer), measure, observer)?,
        Method::XEcomla | Method::Mha2mla => weights::survey_weights(job, backend, &few, measure, observer)?,
    };
    hybrid::choose(job, backend, &few, &mut found, observer)?;
    Ok(found)
}

/// Relative error of the attention output of one layer of the source, converted as the survey settled it, without
/// refinement and without the output refit: on few tokens that would fit noise.
pub(super) fn convert_on_trial(
    job: &Job<'_>,
    found: &Survey,
    index: usize,
    layer: &SourceLayer<'_>,
    pass: &SourcePass,
    windows: &[usize],
) -> Result<f64, ConvertError> {
    let attention = &layer.attention;
    let made = match job.settings.method {
        Method::AttentionAware => {
            let made =
                aware_on_trial(job, (index, layer, pass, windows), &found.slots, job.spec.geometry.kv_lora_rank)?;
            return Ok(made.report.predicted_error);
        }
        Method::XEcomla | Method::Mha2mla => {
            weights::convert(job, found, index, attention).map_err(ConvertError::layer(index))?.layer
        }
        Method::Exact | Method::Transmla | Method::Care => {
            return published_on_trial(job, (index, layer, pass, windows), &[found.fold]).map(|e| e[0]);
        }
    };
    Ok(output_error(&made, attention.score_softcap, pass.x.view(), windows, &pass.output))
}

/// A layer of the source on the survey's windows: its index, itself, its attention, tokens per window.
type Trial<'a> = (usize, &'a SourceLayer<'a>, &'a SourcePass, &'a [usize]);

/// A layer by `attention-aware` at one choice of slots and latent width. Without the output refit: on few tokens it would
/// fit noise.
fn aware_on_trial(
    job: &Job<'_>,
    (index, layer, pass, windows): Trial<'_>,
    slots: &[usize],
    rank: usize,
) -> Result<Converted, ConvertError> {
    let inputs = Inputs {
        index,
        source: &layer.attention,
        target: pass,
        x: pass.x.view(),
        windows,
        slots,
        rank,
        steps: super::Steps { output_refit: false, ..job.settings.steps },
        bias: job.spec.bias,
        refine: RefineSettings { steps: 0, ..RefineSettings::default() },
    };
    convert_layer(&inputs)
}

/// Errors of TransMLA or CARE at several FreqFolds.
fn published_on_trial(
    job: &Job<'_>,
    (index, layer, pass, windows): Trial<'_>,
    folds: &[usize],
) -> Result<Vec<f64>, ConvertError> {
    let mut moments = Moments::new(job.arch.hidden);
    moments.add(pass.x.view());
    let cap = layer.attention.score_softcap;
    let error = |fold: &usize| {
        let made = published_layer(job, *fold, &layer.attention, &moments).map_err(ConvertError::layer(index))?;
        Ok(output_error(&made.layer, cap, pass.x.view(), windows, &pass.output))
    };
    folds.iter().map(error).collect()
}

/// Layers that are converted on trial.
pub(super) fn trial_layers(layers: usize) -> Vec<usize> {
    let count = layers.min(TRIAL_LAYERS);
    (0..count).map(|i| (2 * i + 1) * layers / (2 * count)).collect()
}

/// Run the source over the survey's windows, handing each layer to `look`.
pub(super) fn walk(
    job: &Job<'_>,
    backend: &Device,
    windows: &[Vec<u32>],
    observer: &dyn Observer,
    profile: bool,
    mut look: impl FnMut(usize, &SourceLayer<'_>, &SourcePass, &Stream) -> Result<(), ConvertError>,
) -> Result<(), ConvertError> {
    walk_beside(job, backend, windows, &[], observer, profile, |index, layer, (pass, stream), _| {
        look(index, layer, pass, stream)
    })
}

/// As [`walk`], with other lists of windows beside them, which nothing is fitted on.
fn walk_beside(
    job: &Job<'_>,
    backend: &Device,
    windows: &[Vec<u32>],
    beside: &[&[Vec<u32>]],
    observer: &dyn Observer,
    profile: bool,
    mut look: impl FnMut(
        usize,
        &SourceLayer<'_>,
        (&SourcePass, &Stream),
        &[(SourcePass, &Stream)],
    ) -> Result<(), ConvertError>,
) -> Result<(), ConvertError> {
    let mut stream = Stream::start(job, backend, windows)?;
    let mut others =
        beside.iter().map(|windows| Stream::start(job, backend, windows)).collect::<Result<Vec<_>, _>>()?;
    observer.event(Event::Phase { name: "survey", steps: Some(job.arch.layers as u64) });
    for index in 0..job.arch.layers {
        let mut layer = SourceLayer::load(job, backend, index)?;
        let pass = layer.attend(&stream, profile)?;
        let passes = others.iter().map(|other| Ok((layer.attend(other, false)?, other)));
        let passes = passes.collect::<Result<Vec<_>, ConvertError>>()?;
        layer.linearise(index, pass.x.view())?;
        look(index, &layer, (&pass, &stream), &passes)?;
        if index + 1 < job.arch.layers {
            let outputs: Vec<_> = passes.into_iter().map(|(pass, _)| pass.output).collect();
            layer.advance(&mut stream, &pass.output)?;
            for (other, output) in others.iter_mut().zip(&outputs) {
                layer.advance(other, output)?;
            }
        }
        let tokens = (stream.hidden.nrows() * (index + 1)) as u64;
        observer.event(Event::Step { done: index as u64 + 1, tokens });
    }
    Ok(())
}

fn survey_fold(
    job: &mut Job<'_>,
    backend: &Device,
    windows: &[Vec<u32>],
    measure: bool,
    observer: &dyn Observer,
) -> Result<Survey, ConvertError> {
    let candidates = folds(job);
    if candidates.is_empty() {
        return Err(ConvertError::refused(
            format!(
                "qk_rope_head_dim {} leaves no FreqFold for head size {}",
                job.spec.geometry.qk_rope_head_dim, job.shape.head_dim
            ),
            "choose a qk_rope_head_dim that divides the head size",
        ));
    }
    if candidates.len() == 1 && !measure {
        return Ok(Survey { fold: candidates[0], ..Survey::default() });
    }
    let trial = trial_layers(job.arch.layers);
    let mut errors = vec![0.0; candidates.len()];
    walk(job, backend, windows, observer, false, |index, layer, pass, stream| {
        if !trial.contains(&index) {
            return Ok(());
        }
        let found = published_on_trial(job, (index, layer, pass, &stream.windows), &candidates)?;
        errors.iter_mut().zip(found).for_each(|(error, e)| *error += e / trial.len() as f64);
        Ok(())
    })?;
    let best = least(&errors);
    if candidates.len() > 1 {
        let list: Vec<String> = candidates.iter().zip(&errors).map(|(f, e)| format!("{f}: {e:.3}")).collect();
        job.decisions.push(format!(
            "freqfold {}: the least error of the attention output on {} trial layers ({})",
            candidates[best],
            trial.len(),
            list.join(", ")
        ));
    }
    Ok(Survey { fold: candidates[best], predicted_error: Some(errors[best]), ..Survey::default() })
}

/// Index of the least error, the first of equals.
fn least(errors: &[f64]) -> usize {
    (0..errors.len()).fold(0, |best, i| if errors[i] < errors[best] { i } else { best })
}

/// One layer by the published method that was asked for, TransMLA or CARE, at one FreqFold.
pub(super) fn published_layer(
    job: &Job<'_>,
    fold: usize,
    attention: &AttentionSource,
    moments: &Moments,
) -> Result<transmla::Converted, MethodError> {
    let settings = transmla::Settings {
        rope_dim: job.spec.geometry.qk_rope_head_dim,
        rank: job.spec.geometry.kv_lora_rank,
        q_rank: job.settings.q_lora_rank,
        fold,
        balance: job.settings.balance_kv_ratio,
    };
    match job.settings.method {
        Method::Care => care::convert(attention, moments, &settings),
        _ => transmla::convert(attention, moments, &settings, transmla::Metric::Plain),
    }
}

/// Relative error of a converted layer's attention output on normed inputs `x`, against the source's `want`.
pub(super) fn output_error(
    layer: &MlaLayer,
    cap: Option<f64>,
    x: ArrayView2<'_, f32>,
    windows: &[usize],
    want: &Array2<f32>,
) -> f64 {
    let heads = LatentAttention::new(layer, x, windows).capped(cap).outputs();
    relative_error(output_projection(layer, &heads).view(), want.view())
}

/// Splits are compared on windows that nothing was fitted on: refits on few tokens flatter the wider latent, which has more
/// to fit. Where there is a `longer` window than any that is fitted on, the error on it has an equal say: far away there, rotated
/// width is worth more.
fn survey_slots(
    job: &mut Job<'_>,
    backend: &Device,
    windows: &[Vec<u32>],
    (held_out, longer): (&[Vec<u32>], Option<Vec<u32>>),
    measure: bool,
    observer: &dyn Observer,
) -> Result<Survey, ConvertError> {
    let (head_dim, rotary_dim, steps) = (job.shape.head_dim, job.shape.rotary_dim, job.settings.steps);
    let mut values: Vec<Array2<f64>> = Vec::new();
    if job.grid == RopeGrid::Free {
        walk(job, backend, windows, observer, true, |index, layer, pass, _| {
            let mut moments = Moments::new(job.arch.hidden);
            moments.add(pass.x.view());
            if let Some(phases) = &pass.phases {
                let analysis =
                    analyse_slots(&layer.attention, &moments, phases, &steps).map_err(ConvertError::layer(index))?;
                values.push(analysis.value);
            }
            Ok(())
        })?;
    }
    let slots_for = |rope: usize| match job.grid {
        RopeGrid::Free => Some(share_slots(&values, rope / 2)),
        RopeGrid::Stock => stock_grid(rotary_dim, rope).map(|mut slots| {
            // Pairs that do not turn.
            slots.resize(head_dim / 2, 0);
            slots
        }),
    };
    let candidates: Vec<(usize, usize, Vec<usize>)> =
        job.splits.iter().filter_map(|&(rope, rank)| slots_for(rope).map(|s| (rope, rank, s))).collect();
    let Some(first) = candidates.first() else {
        return Err(ConvertError::refused(
            format!("no rotated width fits the stock grid of head size {head_dim}"),
            "use `--rope-grid free`, or a qk_rope_head_dim that divides the head size",
        ));
    };
    if candidates.len() == 1 && !measure {
        job.set_split(first.0, first.1);
        return Ok(Survey { slots: first.2.clone(), ..Survey::default() });
    }
    let trial = trial_layers(job.arch.layers);
    let longer = longer.filter(|_| candidates.len() > 1 && !held_out.is_empty());
    let beside = [Some(held_out), longer.as_ref().map(std::slice::from_ref)];
    let beside: Vec<&[Vec<u32>]> = beside.into_iter().flatten().filter(|windows| !windows.is_empty()).collect();
    // Of each candidate, on the windows held out and on the longer one.
    let mut errors = vec![[0.0; 2]; candidates.len()];
    walk_beside(job, backend, windows, &beside, observer, true, |index, layer, (pass, stream), others| {
        if !trial.contains(&index) {
            return Ok(());
        }
        for (errors, (_, rank, slots)) in errors.iter_mut().zip(&candidates) {
            let made = aware_on_trial(job, (index, layer, pass, &stream.windows), slots, *rank)?;
            let cap = layer.attention.score_softcap;
            let of_trial = |(pass, stream): &(SourcePass, &Stream)| {
                output_error(&made.layer, cap, pass.x.view(), &stream.windows, &pass.output)
            };
            errors[0] += others.first().map_or(made.report.predicted_error, of_trial) / trial.len() as f64;
            errors[1] += others.get(1).map_or(0.0, of_trial) / trial.len() as f64;
        }
        Ok(())
    })?;
    let best = least(&errors.iter().map(|of| of[0] + of[1]).collect::<Vec<_>>());
    if candidates.len() > 1 {
        let error = |of: &[f64; 2]| match longer {
            None => format!("{:.3}", of[0]),
            Some(_) => format!("{:.3} and {:.3}", of[0], of[1]),
        };
        let list: Vec<String> =
            candidates.iter().zip(&errors).map(|((rope, rank, _), e)| format!("{rope}+{rank}: {}", error(e))).collect();
        job.decisions.push(format!(
            "split {} rotated + {} latent: the least error of the attention output on {} trial layers{} ({})",
            candidates[best].0,
            candidates[best].1,
            trial.len(),
            longer
                .as_ref()
                .map_or_else(String::new, |w| format!(", on short windows and on one of {} tokens", w.len())),
            list.join(", ")
        ));
    }
    let (rope, rank, slots) = candidates.into_iter().nth(best).unwrap_or_default();
    job.set_split(rope, rank);
    Ok(Survey { slots, predicted_error: Some(errors[best][0]), ..Survey::default() })
}
