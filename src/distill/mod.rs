//! Distillation: an MLA model is trained until it predicts what its source predicts (docs/distill.md).
//!
//! The loss is `KL(source || student)` over the whole vocabulary. Gradients are this library's own; windows that are never
//! trained on decide which state is written, the one that came in among them. The output has the student's class, geometry and
//! dtypes, and every tensor that is not trained bit for bit.

mod head;
mod layer;
mod network;
mod optimiser;
mod report;
mod student;
mod tensors;
#[cfg(test)]
mod tests;
mod text;
mod training;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Instant;

pub use report::{
    CurvePoint, DISTILL_FILE, DISTILL_SCHEMA, DistillReport, DistillSettings, HeldOutPoint, TextFigures, Train,
};

use crate::arch::Architecture;
use crate::error::ConvertError;
use crate::observe::{Event, Observer};
use crate::publish::{self, Compute, Config, Extras, Place, Publisher};
use crate::runtime::{Cpu, Model};
use crate::source::ModelSource;
use crate::target::{Cut, Emit, Origin};
use crate::write::{Leftover, PlannedTensor, ShardPlan};
use student::{StoredLayers, Student};
use tensors::Tensors;
use text::Text;
use training::{Outcome, Teacher, Training};

/// Files beside the weights that the caller wants in the folder: name and content, made of the report.
pub type DistillExtras<'a> = Extras<'a, DistillReport>;

/// A model and what its config says.
pub type Opened<'a> = (&'a ModelSource, &'a Architecture);

pub(crate) fn refused(message: impl Into<String>, hint: impl Into<String>) -> ConvertError {
    ConvertError::refused(message, hint)
}

/// Train `student` to predict what `source` predicts, and write it into the folder `output`.
///
/// The folder appears, complete, in one rename; on any error it is as it was. The result does not depend on the number of
/// threads. Phase reported: `distill`.
///
/// # Errors
/// [`ConvertError`]: models that do not belong together or cannot be trained, text that is too short or cannot be read, files
/// that cannot be read or written.
pub fn distill(
    source: Opened<'_>,
    student: Opened<'_>,
    settings: &DistillSettings,
    output: &Path,
    extras: DistillExtras<'_>,
    observer: &dyn Observer,
) -> Result<DistillReport, ConvertError> {
    let learner = Student::new(student.0, student.1)?;
    check_pair(source, student)?;
    let mut decisions = Vec::new();
    let seq_len = window_length(source.1, student.1, settings, &mut decisions)?;
    let texts = text::read(&source.0.tokenizer()?, settings, seq_len)?;
    // Whatever is trained keeps its name, dtype and shape, so the files are laid out before it is known.
    let planned: Vec<PlannedTensor> = tensor_list(&learner).into_iter().map(|(planned, _)| planned).collect();
    let shards = ShardPlan::new(&planned, settings.max_shard_bytes)?;
    let leftover = if settings.leftover == Leftover::Resume { Leftover::Refuse } else { settings.leftover };
    let place = Place { output, overwrite: settings.overwrite, leftover, bytes: shards.file_bytes() };
    let staging = publish::stage(student.0, &place)?;
    for decision in &decisions {
        observer.event(Event::Note(decision.clone()));
    }
    let begun = Instant::now();
    let start = training::start(&learner, settings.train)?;
    let frozen = StoredLayers::new(&learner, &start.0)?;
    let training = Training {
        teacher: Teacher::new(Model::new(source.0, source.1, &Cpu))?,
        student: &learner,
        network: learner.network(seq_len, &frozen)?,
        start,
        texts: &texts,
        settings,
        observer,
    };
    let outcome = training.run()?;
    drop(training);
    for note in &outcome.notes {
        observer.event(Event::Warning(note.clone()));
    }
    decisions.extend(outcome.notes.iter().cloned());
    let seconds = begun.elapsed().as_secs_f64();

    let mut publisher = Publisher::new(student.0, staging, shards, observer);
    let mut written = Written { student: &learner, best: outcome.best.as_deref(), current: None };
    publisher.write(&emission(&learner, &written)?, &mut written)?;
    publisher.side_files(Config::Kept { without: &[], with: &[] }, &[])?;
    let report = report_of((source.0, student.0), settings, output, &texts, outcome, (decisions, seconds, seq_len));
    publisher.report(&report, extras)?;
    Ok(DistillReport { output: publisher.finish()?, ..report })
}

fn report_of(
    (source, student): (&ModelSource, &ModelSource),
    settings: &DistillSettings,
    output: &Path,
    texts: &[Text],
    outcome: Outcome,
    (decisions, seconds, seq_len): (Vec<String>, f64, usize),
) -> DistillReport {
    let figures = |(i, text): (usize, &Text)| TextFigures {
        name: text.name.clone(),
        train_tokens: text.train_tokens(),
        held_out_tokens: text.held_out_tokens(),
        held_out_windows: text.held_out_windows.clone(),
        kl_before: outcome.before.texts[i],
        kl_after: outcome.after.texts[i],
    };
    DistillReport {
        schema_version: DISTILL_SCHEMA,
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
        output: output.to_owned(),
        source: source.spec.clone(),
        student: student.spec.clone(),
        student_fingerprint: publish::fingerprint(student),
        settings: settings.clone(),
        seq_len,
        tokens: outcome.curve.last().map_or(0, |point| point.tokens),
        trained_values: outcome.trained_values,
        kl_before: outcome.before.all,
        kl_after: outcome.after.all,
        best_step: outcome.best_step,
        averaged: outcome.averaged,
        texts: texts.iter().enumerate().map(figures).collect(),
        curve: outcome.curve,
        held_out: outcome.held_out,
        decisions,
        seconds,
    }
}

/// Refuse models that are not a source and its conversion.
fn check_pair((source, teacher): Opened<'_>, (student, learner): Opened<'_>) -> Result<(), ConvertError> {
    for (what, theirs, ours) in [
        ("tokens in the vocabulary", teacher.vocab, learner.vocab),
        ("values in a hidden state", teacher.hidden, learner.hidden),
        ("layers", teacher.layers, learner.layers),
    ] {
        if theirs != ours {
            return Err(refused(
                format!("`{}` has {theirs} {what}, `{}` has {ours}", source.spec, student.spec),
                "give the model that the student was converted from",
            ));
        }
    }
    Ok(())
}

/// Tokens of the longest windows.
fn window_length(
    source: &Architecture,
    student: &Architecture,
    settings: &DistillSettings,
    decisions: &mut Vec<String>,
) -> Result<usize, ConvertError> {
    if settings.seq_len < 2 || settings.batch_tokens == 0 || settings.tokens == 0 {
        return Err(refused(
            "there is nothing to train on in windows of less than two tokens, or in none",
            "1024 is the default of `--seq-len`",
        ));
    }
    let original = |arch: &Architecture| arch.rope.long.as_ref().map_or(usize::MAX, |long| long.original);
    let limit = [source.max_position, student.max_position, original(source), original(student)].into_iter().min();
    let length = settings.seq_len.min(limit.unwrap_or(usize::MAX));
    if length < settings.seq_len {
        decisions
            .push(format!("windows of {length} tokens: the models have no more positions with the same frequencies"));
    }
    Ok(length)
}

/// Every tensor of the student in model order, as it is planned, and the layer it belongs to.
fn tensor_list(student: &Student<'_>) -> Vec<(PlannedTensor, usize)> {
    let (tensors, arch) = (&student.source.tensors, student.arch);
    let expected = arch.expected_tensors();
    let known: BTreeSet<&str> = expected.iter().map(|t| t.name.as_str()).collect();
    let more = tensors.in_file_order().map(|(name, _)| (name, arch.layers)).filter(|(name, _)| !known.contains(name));
    let expected = expected.iter().map(|t| (t.name.as_str(), t.layer.unwrap_or(arch.layers)));
    let planned = |(name, layer): (&str, usize)| {
        let info = tensors.get(name)?;
        Some((PlannedTensor { name: name.to_owned(), dtype: info.dtype, shape: info.shape.clone() }, layer))
    };
    expected.chain(more).filter_map(planned).collect()
}

/// A tensor that was trained: its layer and its name.
type Key = (usize, String);

fn emission(student: &Student<'_>, written: &Written<'_>) -> Result<Vec<Emit<Key>>, ConvertError> {
    let mut trained = BTreeMap::new();
    for (index, tensors) in written.best.unwrap_or_default().iter().enumerate() {
        trained.extend(student.trained_names(index, tensors).into_iter().map(|name| (name, index)));
    }
    let emit = |(planned, _): (PlannedTensor, usize)| {
        let from = match trained.get(&planned.name) {
            Some(index) => Origin::Computed((*index, planned.name.clone())),
            None => Origin::Stored { name: planned.name.clone(), cut: Cut::Whole },
        };
        Emit { planned, from }
    };
    Ok(tensor_list(student).into_iter().map(emit).collect())
}

/// The trained tensors, a layer at a time.
struct Written<'a> {
    student: &'a Student<'a>,
    best: Option<&'a [Tensors<f32>]>,
    current: Option<(usize, BTreeMap<String, Vec<f64>>)>,
}

impl Compute<Key> for Written<'_> {
    fn values(&mut self, (layer, name): &Key) -> Result<Option<Cow<'_, [f64]>>, ConvertError> {
        let Some(best) = self.best else { return Ok(None) };
        if self.current.as_ref().is_none_or(|(at, _)| at != layer) {
            let values = self.student.written(*layer, &best[*layer])?;
            self.current = Some((*layer, values.into_iter().collect()));
        }
        let values = self.current.as_ref().and_then(|(_, values)| values.get(name));
        Ok(values.map(|values| Cow::Borrowed(values.as_slice())))
    }
}
