//! The conversion loop itself.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use super::checkpoint::{self, Finished, Saved, Start};
use super::fit;
use super::layers::stream_names;
use super::memory::{Need, give_back};
use super::sink::Sink;
use super::survey::{Survey, survey};
use super::weights;
use super::{ConversionReport, ConvertError, ConvertSettings, Job, LayerReport, Method, MlaLayers, Plan, TargetKind};
use crate::arch::Architecture;
use crate::calibrate::{CalibrationText, calibration_text, read_texts};
use crate::observe::{Event, Observer};
use crate::runtime::Device;
use crate::source::ModelSource;
use crate::target::{REMOTE_FILE, TokenizerFiles, tokenizer_files};
use crate::write::{Leftover, ShardPlan, StagedWriter, Staging, StagingOptions};

/// Version of `conversion.json` and of the plan.
pub const SCHEMA_VERSION: u32 = 1;

/// Files beside the weights that the caller wants in the folder: name and a function of the report.
pub type Extras<'a> = &'a dyn Fn(&ConversionReport) -> Vec<(String, Vec<u8>)>;

/// Calibration text as the settings and [`fit::longer_window`] ask, empty for a method that needs none.
fn text(job: &mut Job<'_>, observer: &dyn Observer) -> Result<CalibrationText, ConvertError> {
    if job.settings.method == Method::Exact {
        return Ok(CalibrationText::default());
    }
    let mut calibration = job.settings.calibration.clone();
    if calibration.seq_len < 2 {
        return Err(ConvertError::refused("--calib-seq-len has to be at least 2", "256 is the default"));
    }
    if calibration.seq_len > job.arch.max_position {
        calibration.seq_len = job.arch.max_position;
        observer.event(Event::Note(format!(
            "calibration windows of {} tokens: the model has no more positions",
            calibration.seq_len
        )));
    }
    if let Some(longest) = calibration.max_seq_len.filter(|n| *n < job.settings.calibration.seq_len) {
        return Err(ConvertError::refused(
            format!("--calib-max-seq-len {longest} is less than --calib-seq-len {}", job.settings.calibration.seq_len),
            "the same number of tokens for both gives windows of one length",
        ));
    }
    calibration.max_seq_len = Some(fit::longest_window(job));
    if calibration.samples == 0 {
        return Err(ConvertError::refused("--calib-samples 0 leaves nothing to calibrate on", "128 is the default"));
    }
    calibration.samples = fit::samples(job, &calibration);
    // Nothing is fitted to the text but norms, where there are some.
    let measured = job.settings.method.from_weights() && job.arch.qk_norm.is_none();
    if measured {
        calibration.samples = calibration.samples.min(weights::MEASURED_WINDOWS);
    }
    let (rope, rank) = if measured { (0, 0) } else { job.splits[0] };
    let needed = 4 * (rope + rank);
    let why = format!(", four for each of the {} cached values", rope + rank);
    if let Some(tokens) = job.settings.fit_tokens.filter(|n| *n < needed) {
        return Err(ConvertError::refused(
            format!("--fit-tokens {tokens} is too few: at least {needed} are needed{why}"),
            "leave it out, or allow more",
        ));
    }
    let tokenizer = job.source.tokenizer()?;
    let texts = read_texts(&calibration.files)?;
    let text = calibration_text(&tokenizer, &texts, &calibration, fit::longer_window(job), needed, &why)?;
    let found = text.windows.iter().map(Vec::len).sum::<usize>() / calibration.seq_len;
    if found < calibration.samples && !measured {
        observer.event(Event::Note(format!(
            "the calibration text holds {found} windows of {} tokens, {} were asked for",
            calibration.seq_len, calibration.samples
        )));
    } else if found < job.settings.calibration.samples && !measured {
        let tokens = |windows: usize| windows * calibration.seq_len;
        job.decisions.push(format!(
            "calibrated on {} of the {} tokens asked for (--fit-tokens)",
            tokens(found),
            tokens(job.settings.calibration.samples)
        ));
    }
    Ok(text)
}

/// What `convert` would do. With `predict`, the model is surveyed for its predicted error too, which takes some seconds.
///
/// # Errors
/// Everything `convert` would refuse.
pub fn plan(
    source: &ModelSource,
    arch: &Architecture,
    settings: &ConvertSettings,
    predict: bool,
    observer: &dyn Observer,
) -> Result<Plan, ConvertError> {
    let mut job = Job::prepare(source, arch, settings)?;
    let CalibrationText { windows, longer } = text(&mut job, observer)?;
    let auto = matches!(settings.mla_layers, Some(MlaLayers::Auto(_)));
    let open =
        auto || job.splits.len() > 1 || weights::ranks_open(settings) || settings.method != Method::Exact && predict;
    let found = if open {
        survey(&mut job, &Device::open(settings.device)?, (&windows, longer), predict, observer)?
    } else {
        Survey::default()
    };
    super::plan::describe(&job, &windows, found.predicted_error)
}

/// Convert `source` into the folder `output`.
///
/// The folder appears, complete, in one rename; on any error it is as it was. A run that is stopped behind its first layer
/// leaves a staging folder, with which a run of the same settings goes on where they say [`Leftover::Resume`]: it writes
/// the same bytes.
///
/// [`Leftover::Resume`]: crate::write::Leftover::Resume
///
/// # Errors
/// [`ConvertError`].
pub fn convert(
    source: &ModelSource,
    arch: &Architecture,
    settings: &ConvertSettings,
    output: &Path,
    extras: Extras<'_>,
    observer: &dyn Observer,
) -> Result<ConversionReport, ConvertError> {
    let mut clock = Clock::new();
    let mut job = Job::prepare(source, arch, settings)?;
    let CalibrationText { windows, longer } = text(&mut job, observer)?;
    give_back();
    let spill = Need::of(&job, windows.iter().map(Vec::len).sum()).spill(settings.max_memory)?;
    let options = StagingOptions {
        overwrite: settings.overwrite,
        source: Some(source.dir.clone()),
        // Zeros that take no room in the source are skipped in the output too.
        needed_bytes: job
            .planned_tensors()
            .iter()
            .map(|t| t.shape.iter().product::<usize>() as u64 * t.dtype.size() as u64)
            .sum::<u64>()
            .saturating_sub(source.tensors.hole_bytes()),
        leftover: settings.leftover,
    };
    let mut staging = Staging::create(output, &options)?;
    let identity = checkpoint::identity(&job, &windows)?;
    staging.check_identity(&identity)?;
    let saved = staging.record().map(Saved::read).unwrap_or_default();
    clock.lap("prepare");
    if !source.files.iter().any(|f| f.name == "tokenizer.json") {
        observer.event(Event::Warning("the source has no tokenizer.json, so the output has none".into()));
    }
    let backend = Device::open(settings.device)?;
    let (found, start, shards) = match saved.settle(&mut job) {
        Some(found) => {
            let shards = ShardPlan::new(&job.planned_tensors(), settings.max_shard_bytes)?;
            let promised = saved.layers();
            let start = saved.start(&staging, &shards, stream_names(&job), arch.layers)?;
            let (left, of) = (start.layers.len(), arch.layers);
            if left < promised {
                observer.event(Event::Warning(format!(
                    "what the unfinished run saved of layer {} is damaged: going on behind layer {left} of {of}",
                    left + 1
                )));
            } else if left > 0 {
                observer.event(Event::Note(format!("resumed: {left} of {of} layers are there already")));
            }
            staging.open_journal(identity, start.entries)?;
            (found, start, shards)
        }
        None => {
            if settings.leftover == Leftover::Resume && staging.record().is_none() {
                observer.event(Event::Note("there is no unfinished run to resume: beginning anew".into()));
            }
            staging.open_journal(identity, 0)?;
            let found = survey(&mut job, &backend, (&windows, longer), false, observer)?;
            checkpoint::settled(&mut staging, &job, &found, observer)?;
            (found, Start::default(), ShardPlan::new(&job.planned_tensors(), settings.max_shard_bytes)?)
        }
    };
    for decision in &job.decisions {
        observer.event(Event::Note(decision.clone()));
    }
    clock.lap("survey");

    let windows = if settings.method == Method::AttentionAware { fit::in_front(windows) } else { windows };
    let run = Run { job: &job, backend: &backend, windows: &windows, found: &found, spill, observer };
    let writer = StagedWriter::resume(staging, shards, start.progress.clone())?;
    let mut sink = Sink { job: &job, writer, observer, scales: Vec::new() };
    let mut report = match run.emit(&mut sink, start, output, extras, &mut clock) {
        Ok(report) => report,
        Err(e) => {
            // What would end the same way again is not worth going on with.
            if !e.may_pass() {
                sink.writer.staging_mut().keep(false);
            }
            return Err(e);
        }
    };
    let published = sink.writer.finish()?;
    if let Some(left) = published.left_behind {
        observer.event(Event::Warning(format!("could not be removed: {}", left.display())));
    }
    clock.lap("publish");
    report.output = published.path;
    report.seconds = clock.finish();
    report.peak_rss_bytes = peak_rss_bytes();
    Ok(report)
}

fn pretty(value: &impl serde::Serialize) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// A conversion whose decisions are taken.
pub(super) struct Run<'a> {
    pub job: &'a Job<'a>,
    pub backend: &'a Device,
    pub windows: &'a [Vec<u32>],
    pub found: &'a Survey,
    /// Whether hidden states wait on the disk.
    pub spill: bool,
    pub observer: &'a dyn Observer,
}

impl Run<'_> {
    /// Writes every file of the output; only publishing is left.
    fn emit(
        &self,
        sink: &mut Sink<'_>,
        start: Start,
        output: &Path,
        extras: Extras<'_>,
        clock: &mut Clock,
    ) -> Result<ConversionReport, ConvertError> {
        let Run { job, windows, observer, .. } = *self;
        let (source, arch, settings) = (job.source, job.arch, job.settings);
        let emission = job.emission();
        if start.layers.is_empty() {
            // Tensors of layers are scanned when their layer is read, these here.
            job.check_finite(&arch.names.embed)?;
            sink.emit(&emission.first, &[])?;
        }
        let mut frequencies = start.layers.last().map(|l| l.frequencies.clone()).unwrap_or_default();
        let mut layers: Vec<LayerReport> = start.layers.iter().map(|l| l.report.clone()).collect();
        self.convert_layers(sink.writer.staging().root().to_owned(), start, |mla, gain, report, streams| {
            let layer = report.layer;
            let attention = mla.as_ref().map(|mla| job.spec.attention_tensors(arch, layer, mla, gain));
            sink.emit(&emission.layers[layer], &attention.unwrap_or_default())?;
            if let Some(mla) = mla {
                frequencies = mla.rope_freq;
            }
            let mark = sink.writer.mark()?;
            let finished = Finished { layer, report: report.clone(), frequencies: frequencies.clone(), mark, streams };
            layers.push(report);
            checkpoint::finished(sink.writer.staging_mut(), &finished, observer)
        })?;
        clock.lap("convert");

        let head = if arch.tied_head { &arch.names.embed } else { &arch.names.head };
        for name in [&arch.names.final_norm, head] {
            job.check_finite(name)?;
        }
        sink.emit(&emission.last, &[])?;
        source.check_unchanged()?;
        let rope = job.spec.rope(&frequencies, arch, &source.config, job.max_position);
        let config = job.spec.config(arch, &source.config, &rope, job.max_position);
        // What is published has to be readable: by the rules this tool reads models with.
        Architecture::from_config(&config)?;
        sink.writer.write_file("config.json", &pretty(&config))?;
        if job.spec.kind == TargetKind::HfRemote {
            sink.writer.write_file(REMOTE_FILE.0, REMOTE_FILE.1.as_bytes())?;
        }
        self.copy_side_files(sink)?;
        let count = job.mla_layers().len().max(1) as f64;
        let report = ConversionReport {
            schema_version: SCHEMA_VERSION,
            tool_version: env!("CARGO_PKG_VERSION").to_owned(),
            output: output.to_owned(),
            source: source.spec.clone(),
            source_revision: source.revision.clone(),
            source_fingerprint: source.fingerprint().into_iter().map(|f| (f.file, f.header_sha256)).collect(),
            method: settings.method.name().to_owned(),
            settings: settings.clone(),
            decisions: job.decisions.iter().cloned().chain(rope.note.clone()).collect(),
            target: job.spec.kind,
            geometry: job.spec.output(),
            cache_values_per_token_per_layer: job.cache_values(),
            source_cache_values_per_token_per_layer: arch.cache_values(),
            cache_values_per_token: job.cache_values_per_token(),
            mla_layers: job.mla_layers(),
            rope_frequencies: rope.frequencies.clone(),
            predicted_error: layers.iter().map(|l| l.predicted_error).sum::<f64>() / count,
            layers,
            calibration_tokens: windows.iter().map(Vec::len).sum(),
            peak_rss_bytes: peak_rss_bytes(),
            seconds: BTreeMap::new(),
        };
        for (name, bytes) in extras(&report) {
            sink.writer.write_file(&name, &bytes)?;
        }
        sink.writer.write_file("conversion.json", &pretty(&report.reproducible()))?;
        Ok(report)
    }
}

/// Largest tokenizer that is looked into.
const MAX_TOKENIZER_BYTES: u64 = 48 << 20;

impl Run<'_> {
    /// Files of the source beside its weights, those of the tokenizer fitted to the output's class.
    fn copy_side_files(&self, sink: &mut Sink<'_>) -> Result<(), ConvertError> {
        let Run { job, observer, .. } = *self;
        let files = &job.source.files;
        let read = |name: &str| {
            let file = files.iter().find(|f| f.name == name && f.size <= MAX_TOKENIZER_BYTES)?;
            fs_err::read(&file.path).ok()
        };
        let model_type = job.source.config.get("model_type").and_then(serde_json::Value::as_str).unwrap_or_default();
        let remote = job.spec.kind == TargetKind::HfRemote;
        let fitted = read("tokenizer.json").map_or_else(TokenizerFiles::default, |tokenizer| {
            tokenizer_files(model_type, remote, read("tokenizer_config.json").as_deref(), &tokenizer)
        });
        if let Some(note) = fitted.note {
            observer.event(Event::Note(note));
        }
        for file in files.iter().filter(|f| !fitted.files.iter().any(|(name, _)| *name == f.name)) {
            sink.writer.copy_file(&file.name, &file.path)?;
        }
        for (name, bytes) in &fitted.files {
            sink.writer.write_file(name, bytes)?;
        }
        Ok(())
    }
}

/// Wall time by phase.
struct Clock {
    start: Instant,
    last: Instant,
    laps: BTreeMap<String, f64>,
}

impl Clock {
    fn new() -> Self {
        let now = Instant::now();
        Self { start: now, last: now, laps: BTreeMap::new() }
    }

    fn lap(&mut self, phase: &str) {
        let now = Instant::now();
        self.laps.insert(phase.to_owned(), (now - self.last).as_secs_f64());
        self.last = now;
    }

    fn finish(mut self) -> BTreeMap<String, f64> {
        self.laps.insert("total".to_owned(), self.start.elapsed().as_secs_f64());
        self.laps
    }
}

/// Peak resident memory of this process in bytes; 0 where the system does not tell.
pub fn peak_rss_bytes() -> u64 {
    let status = fs_err::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM:"));
    line.and_then(|l| l.split_whitespace().nth(1)).and_then(|kb| kb.parse::<u64>().ok()).unwrap_or(0) * 1024
}
