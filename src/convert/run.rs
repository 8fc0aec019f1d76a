//! The conversion loop itself.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use super::aware::{Inputs, convert_layer};
use super::streams::{SourceLayer, Stream, first_windows};
use super::survey::{Survey, output_error, published_layer, survey};
use super::{ConversionReport, ConvertError, ConvertSettings, Job, LayerReport, Method, Plan, TargetKind};
use crate::arch::{Architecture, StoredPart};
use crate::calibrate::{Moments, calibration_windows, read_texts};
use crate::methods::{MlaLayer, exact};
use crate::observe::{Event, Observer};
use crate::refine::RefineSettings;
use crate::runtime::Device;
use crate::source::{Dtype, ModelSource};
use crate::target::{Emit, Origin, OutTensor, REMOTE_FILE, encode, fp8};
use crate::write::{ShardPlan, StagedWriter, Staging, StagingOptions};

/// Version of `conversion.json` and of the plan.
pub const SCHEMA_VERSION: u32 = 1;
/// Calibration windows on which a method without refits measures its error.
const MEASURED_WINDOWS: usize = 8;

/// Files beside the weights that the caller wants in the folder: name and a function of the report.
pub type Extras<'a> = &'a dyn Fn(&ConversionReport) -> Vec<(String, Vec<u8>)>;

/// Calibration windows as the settings ask, empty for a method that needs none.
fn windows(job: &Job<'_>, observer: &dyn Observer) -> Result<Vec<Vec<u32>>, ConvertError> {
    if job.settings.method == Method::Exact {
        return Ok(Vec::new());
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
    if calibration.samples == 0 {
        return Err(ConvertError::refused("--calib-samples 0 leaves nothing to calibrate on", "128 is the default"));
    }
    let (rope, rank) = job.splits[0];
    let needed = 4 * (rope + rank);
    let tokenizer = job.source.tokenizer()?;
    let texts = read_texts(&calibration.files)?;
    let why = format!(", four for each of the {} cached values", rope + rank);
    let windows = calibration_windows(&tokenizer, &texts, &calibration, needed, &why)?;
    if windows.len() < calibration.samples {
        observer.event(Event::Note(format!(
            "the calibration text holds {} windows of {} tokens, {} were asked for",
            windows.len(),
            calibration.seq_len,
            calibration.samples
        )));
    }
    Ok(windows)
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
    let windows = windows(&job, observer)?;
    let open = job.splits.len() > 1 || settings.method != Method::Exact && predict;
    let found = if open {
        survey(&mut job, &Device::open(settings.device)?, &windows, predict, observer)?
    } else {
        Survey::default()
    };
    let tokens: usize = windows.iter().map(Vec::len).sum();
    super::plan::describe(&job, tokens, found.predicted_error)
}

/// Convert `source` into the folder `output`.
///
/// The folder appears, complete, in one rename; on any error it is as it was.
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
    let windows = windows(&job, observer)?;
    let options = StagingOptions {
        overwrite: settings.overwrite,
        source: Some(source.dir.clone()),
        needed_bytes: job
            .planned_tensors()
            .iter()
            .map(|t| t.shape.iter().product::<usize>() as u64 * t.dtype.size() as u64)
            .sum(),
    };
    let staging = Staging::create(output, &options)?;
    clock.lap("prepare");
    let backend = Device::open(settings.device)?;
    let found = survey(&mut job, &backend, &windows, false, observer)?;
    if !source.files.iter().any(|f| f.name == "tokenizer.json") {
        observer.event(Event::Warning("the source has no tokenizer.json, so the output has none".into()));
    }
    for decision in &job.decisions {
        observer.event(Event::Note(decision.clone()));
    }
    clock.lap("survey");

    let shards = ShardPlan::new(&job.planned_tensors(), settings.max_shard_bytes)?;
    let mut sink = Sink { job: &job, writer: StagedWriter::new(staging, shards), scales: Vec::new() };
    // Tensors of layers are scanned when their layer is read, these here.
    job.check_finite(&arch.names.embed)?;
    let emission = job.emission();
    sink.emit(&emission.first, Vec::new())?;
    let mut layers = Vec::new();
    let mut frequencies = Vec::new();
    convert_layers(&job, &backend, &windows, &found, observer, |index, mla, gain, report| {
        sink.emit(&emission.layers[index], job.spec.attention_tensors(arch, index, &mla, gain))?;
        frequencies = mla.rope_freq;
        layers.push(report);
        Ok(())
    })?;
    clock.lap("convert");

    let head = if arch.tied_head { &arch.names.embed } else { &arch.names.head };
    for name in [&arch.names.final_norm, head] {
        job.check_finite(name)?;
    }
    sink.emit(&emission.last, Vec::new())?;
    source.check_unchanged()?;
    let rope = job.spec.rope(&frequencies, arch, &source.config, job.max_position);
    let config = job.spec.config(arch, &source.config, &rope, job.max_position);
    // What is published has to be readable: by the rules this tool reads models with.
    Architecture::from_config(&config)?;
    sink.writer.write_file("config.json", &pretty(&config))?;
    if job.spec.kind == TargetKind::HfRemote {
        sink.writer.write_file(REMOTE_FILE.0, REMOTE_FILE.1.as_bytes())?;
    }
    for file in &source.files {
        sink.writer.copy_file(&file.name, &file.path)?;
    }
    let count = layers.len().max(1) as f64;
    let mut report = ConversionReport {
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
    let published = sink.writer.finish()?;
    if let Some(left) = published.left_behind {
        observer.event(Event::Warning(format!("the replaced folder could not be removed: {}", left.display())));
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

/// Run the calibration tokens through the layers and convert each on the way.
fn convert_layers(
    job: &Job<'_>,
    backend: &Device,
    windows: &[Vec<u32>],
    found: &Survey,
    observer: &dyn Observer,
    mut done: impl FnMut(usize, MlaLayer, &[f64], LayerReport) -> Result<(), ConvertError>,
) -> Result<(), ConvertError> {
    let layers = job.arch.layers;
    observer.event(Event::Phase { name: "convert", steps: Some(layers as u64) });
    let aware = job.settings.method == Method::AttentionAware;
    let mut stream = match job.settings.method {
        Method::Exact => None,
        _ => Some(Stream::start(job, backend, windows)?),
    };
    let mut converted = match (&stream, aware && job.settings.steps.converted_stream) {
        (Some(s), true) => Some(Stream { hidden: s.hidden.clone(), windows: s.windows.clone() }),
        _ => None,
    };
    for index in 0..layers {
        for expected in job.arch.layer_tensor_names(index) {
            job.check_finite(&expected)?;
        }
        let last = index + 1 == layers;
        let mut source = SourceLayer::load(job, backend, index)?;
        let (layer, report) = match &mut stream {
            None => (
                exact::convert(&source.attention, job.spec.geometry.qk_nope_head_dim),
                LayerReport { layer: index, ..LayerReport::default() },
            ),
            Some(stream) if aware => {
                let pass = source.attend(stream, true)?;
                let explained = source.linearise(index, pass.x.view())?;
                let seen = match &converted {
                    Some(c) => Some(source.layer.attention_input(c.hidden.view())?),
                    None => None,
                };
                let inputs = Inputs {
                    index,
                    source: &source.attention,
                    pass: &pass,
                    x: seen.as_ref().unwrap_or(&pass.x),
                    windows: &stream.windows,
                    slots: &found.slots,
                    rank: job.spec.geometry.kv_lora_rank,
                    steps: job.settings.steps,
                    bias: job.spec.bias,
                    refine: RefineSettings {
                        steps: job.settings.refine,
                        seed: job.settings.calibration.seed,
                        ..RefineSettings::default()
                    },
                };
                let mut out = convert_layer(&inputs)?;
                out.report.notes.extend(explained.map(|e| e.note()));
                if !last {
                    source.advance(stream, &pass.output)?;
                    if let Some(c) = &mut converted {
                        source.advance(c, &out.output)?;
                    }
                }
                (out.layer, out.report)
            }
            Some(stream) => {
                // As published, keys and values are compressed on what reaches the layer behind layers that lost rotations
                // but are not compressed yet. One stream serves both steps.
                let x = source.layer.attention_input(stream.hidden.view())?;
                let explained = source.linearise(index, x.view())?;
                let mut moments = Moments::new(job.arch.hidden);
                moments.add(x.view());
                let out = published_layer(job, found.fold, &source.attention, &moments)
                    .map_err(ConvertError::layer(index))?;
                let error = {
                    let (x, lengths) = first_windows(&x, &stream.windows, MEASURED_WINDOWS);
                    output_error(
                        &out.layer,
                        source.attention.score_softcap,
                        x,
                        lengths,
                        &source.layer.attention_output(x, lengths)?,
                    )
                };
                if !last {
                    let output = source.behind_rotation(&out.rotated, &x, &stream.windows)?;
                    source.advance(stream, &output)?;
                }
                let report = LayerReport {
                    layer: index,
                    predicted_error: error,
                    measured_error: None,
                    rope_loss: out.rope_loss,
                    rank_loss: out.rank_loss,
                    notes: explained.map(|e| e.note()).into_iter().collect(),
                };
                (out.layer, report)
            }
        };
        done(index, layer, &source.gain, report)?;
        let tokens = stream.as_ref().map_or(0, |s| s.hidden.nrows() * (index + 1)) as u64;
        observer.event(Event::Step { done: index as u64 + 1, tokens });
    }
    Ok(())
}

/// Tensors on their way to the writer.
struct Sink<'a> {
    job: &'a Job<'a>,
    writer: StagedWriter,
    /// Block scales of the FP8 tensor that was written last, as stored.
    scales: Vec<u8>,
}

impl Sink<'_> {
    /// The dtype and name that come next in the plan.
    fn next(&self) -> Option<(String, Dtype)> {
        self.writer.next_tensor().map(|t| (t.name.clone(), t.dtype))
    }

    fn put(&mut self, values: &[f64], columns: usize) -> Result<(), ConvertError> {
        let Some((name, dtype)) = self.next() else { return Ok(()) };
        if values.iter().any(|v| !v.is_finite()) {
            return Err(ConvertError::Produced { name });
        }
        if dtype != Dtype::F8E4M3 {
            return Ok(self.writer.write_tensor(&name, &encode(values, dtype))?);
        }
        let (bytes, scales) = fp8::quantise(values, columns);
        self.writer.write_tensor(&name, &bytes)?;
        self.scales = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        Ok(())
    }

    /// Write a run of tensors. `attention` holds what [`Origin::Attention`] counts.
    fn emit(&mut self, list: &[Emit], attention: Vec<OutTensor>) -> Result<(), ConvertError> {
        let tensors = &self.job.source.tensors;
        for emit in list {
            let shape = &emit.planned.shape;
            let columns = shape.last().copied().unwrap_or(1);
            match &emit.from {
                Origin::Source { part, scale, offset } => {
                    let stored = StoredPart::find(tensors, part)?;
                    let same = *scale == 1.0 && *offset == 0.0 && stored.dtype() == emit.planned.dtype;
                    if same && stored.dtype() != Dtype::F8E4M3 {
                        self.writer.write_tensor(&emit.planned.name, stored.bytes())?;
                    } else {
                        let mut values = stored.to_f64();
                        values.iter_mut().for_each(|v| *v = *v * scale + offset);
                        self.put(&values, columns)?;
                    }
                    tensors.advise_dontneed(&part.name);
                }
                Origin::Attention(i) => {
                    if let Some(tensor) = attention.get(*i) {
                        self.put(&tensor.values, columns)?;
                    }
                }
                Origin::Spread { part, places, offset } => {
                    let stored = StoredPart::find(tensors, part)?.to_f64();
                    let value = |place: &Option<usize>| place.map_or(1.0, |i| stored[i] + offset);
                    self.put(&places.iter().map(value).collect::<Vec<f64>>(), columns)?;
                }
                Origin::Zero => self.put(&vec![0.0; shape.iter().product()], columns)?,
                Origin::Scales => {
                    let scales = std::mem::take(&mut self.scales);
                    self.writer.write_tensor(&emit.planned.name, &scales)?;
                }
            }
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
