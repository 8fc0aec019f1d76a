//! A quick look at the whole model before it is converted, which settles what is open: norms of queries and keys, the split,
//! slots, ranks or folds of the method, and which layers become MLA.

use super::blueprint::{emission, files};
use super::check::with_ranks;
use super::{Blueprint, Checked, hybrid};
use crate::calibrate::CalibrationText;
use crate::error::ConvertError;
use crate::methods::{Choice, Made, MlaLayers, Survey};
use crate::observe::{Event, Observer};
use crate::runtime::Device;
use crate::stream::{Keep, SourceLayer, Stream, Walk};
use crate::target::choose;
use crate::write::ShardPlan;

/// Windows of a survey.
const WINDOWS: usize = 8;
/// Tokens of a window that a survey reads, the first ones.
const LONGEST: usize = 512;
/// Below this share of explained energy, in the worst layer, a conversion that replaces norms is refused unless forced.
const LEAST_R2: f64 = 0.9;

/// Windows of a survey.
struct Windows {
    /// To fit on.
    few: Vec<Vec<u32>>,
    /// Between them, to compare on; none where there are few windows in all.
    held_out: Vec<Vec<u32>>,
}

impl Windows {
    /// Some of `windows`, evenly spread. Windows shorter than `asked` are there for their first tokens, and hold too little to
    /// fit on.
    fn new(windows: &[Vec<u32>], asked: usize) -> Self {
        let whole: Vec<&Vec<u32>> = windows.iter().filter(|window| window.len() >= asked).collect();
        let step = whole.len().div_ceil(WINDOWS).max(1);
        let every = |first: usize| -> Vec<Vec<u32>> {
            whole.iter().skip(first).step_by(step).map(|w| w[..w.len().min(LONGEST.max(asked))].to_vec()).collect()
        };
        Self { few: every(0), held_out: if step > 1 { every(step / 2) } else { Vec::new() } }
    }
}

/// Whether a survey has to run the model, or would only settle what is settled.
pub(super) fn is_open(checked: &Checked<'_>) -> bool {
    let auto = matches!(checked.case.settings.mla_layers, Some(MlaLayers::Auto(_)));
    auto || checked.candidates.splits.len() > 1 || checked.candidates.ranks_open()
}

/// Settle what is open, and say why. With `predict`, also measure the error of some layers.
///
/// # Errors
/// Layers that cannot be read or run, a model that the method cannot convert, widths that turn out impossible.
pub(crate) fn survey(
    checked: &Checked<'_>,
    text: &CalibrationText,
    predict: bool,
    device: &Device,
    observer: &dyn Observer,
) -> Result<Blueprint, ConvertError> {
    let (case, method) = (&checked.case, &checked.case.settings.method);
    let asked = case.settings.calibration.seq_len.min(case.arch.max_position);
    let windows = Windows::new(&text.windows, asked);
    let walk = Walk {
        model: checked.model(),
        device,
        windows: &windows.few,
        held_out: &windows.held_out,
        longer: text.longer.as_ref(),
        observer,
    };
    let mut decisions = checked.decisions.clone();
    if case.arch.qk_norm.is_some() && method.compresses() {
        decisions.push(survey_norms(checked, &walk)?);
    }
    let geometry = checked.spec.geometry;
    let survey = Survey { case: *case, candidates: &checked.candidates, geometry, walk };
    let Choice { split, q_rank, result, predicted_error, decisions: why } = method.survey(&survey, predict)?;
    decisions.extend(why);
    let mut spec = match checked.candidates.ranks_open() {
        true => with_ranks(checked, split, q_rank, &mut decisions)?,
        false => checked.spec.with_split(split),
    };
    let made = Made { case: *case, geometry: spec.geometry, bias: spec.bias, result: &result };
    if let Some(chosen) = hybrid::choose(&made, &walk)? {
        spec.kept = chosen.kept;
        decisions.push(chosen.decision);
    }
    blueprint(checked, Settled { spec, result, predicted_error, decisions })
}

/// What is settled without a survey: the first split, nothing remembered. For plans of conversions that leave nothing open.
///
/// # Errors
/// A layout that cannot be written.
pub(super) fn unsurveyed(checked: &Checked<'_>) -> Result<Blueprint, ConvertError> {
    blueprint(
        checked,
        Settled {
            spec: checked.spec.clone(),
            result: crate::methods::SurveyResult::default(),
            predicted_error: None,
            decisions: checked.decisions.clone(),
        },
    )
}

/// What a survey settled.
struct Settled {
    spec: crate::target::TargetSpec,
    result: crate::methods::SurveyResult,
    predicted_error: Option<f64>,
    decisions: Vec<String>,
}

fn blueprint(checked: &Checked<'_>, settled: Settled) -> Result<Blueprint, ConvertError> {
    let Settled { spec, result, predicted_error, decisions } = settled;
    let case = &checked.case;
    let planned = emission(case.arch, &spec, &case.source.tensors).planned();
    Ok(Blueprint {
        grid: checked.candidates.grid,
        max_position: checked.max_position,
        files: files(&ShardPlan::new(&planned, case.settings.max_shard_bytes)?),
        spec,
        result,
        predicted_error,
        decisions,
    })
}

/// Fit every layer's norms of queries and keys on a few windows, refuse a model for which linear maps are too far off, and say
/// how far they are.
fn survey_norms(checked: &Checked<'_>, walk: &Walk<'_>) -> Result<String, ConvertError> {
    let (model, layers) = (&walk.model, checked.case.arch.layers);
    let mut stream = Stream::start(model, walk.device, walk.windows)?;
    walk.observer.event(Event::Phase { name: "norms", steps: Some(layers as u64) });
    let (mut worst, mut best, mut at) = (f64::INFINITY, f64::NEG_INFINITY, 0);
    for index in 0..layers {
        let mut layer = SourceLayer::load(model, walk.device, index)?;
        let pass = layer.attend(&stream, Keep::default())?;
        if let Some(explained) = layer.linearise(index, pass.x.view())? {
            let r2 = explained.worst_mean();
            if r2 < worst {
                (worst, at) = (r2, index);
            }
            best = best.max(r2);
        }
        if index + 1 < layers {
            layer.advance(&mut stream, &pass.output)?;
        }
        walk.observer.event(Event::Step { done: index as u64 + 1, tokens: stream.hidden.nrows() as u64 });
    }
    if worst < LEAST_R2 && !checked.case.settings.force {
        return Err(ConvertError::refused(
            format!(
                "norms of queries and keys have no place in the target, and the linear maps nearest to them explain only \
                 {:.1}% of layer {at} ({:.1}% are asked for)",
                100.0 * worst,
                100.0 * LEAST_R2
            ),
            format!(
                "`--method exact --target {}` keeps the norms; more calibration text fits the maps better; `--force` \
                 converts all the same",
                choose(checked.case.arch, false).0
            ),
        ));
    }
    Ok(format!(
        "norms of queries and keys become the linear maps nearest to them: they explain {:.2}% to {:.2}% of a layer's queries \
         and keys, least in layer {at}",
        100.0 * worst,
        100.0 * best
    ))
}
