//! One conversion from its plan to the published folder.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use super::ConversionReport;
use super::journal::{self, Finished, Saved, Start};
use crate::arch::Architecture;
use crate::error::ConvertError;
use crate::methods::{ConvertSettings, LayerReport};
use crate::observe::{Event, Observer};
use crate::plan::{Blueprint, Checked, Need, SCHEMA_VERSION, emission, give_back, read_calibration, survey};
use crate::publish::{self, Config, Nothing, Place, Publisher};
use crate::runtime::Device;
use crate::source::{DtypeExt, ModelSource};
use crate::write::{Leftover, Staging};

/// Files beside the weights that the caller wants in the folder: name and a function of the report.
pub type Extras<'a> = publish::Extras<'a, ConversionReport>;

impl publish::Report for ConversionReport {
    const FILE: &'static str = "conversion.json";

    fn document(&self) -> Result<serde_json::Value, ConvertError> {
        Ok(self.reproducible())
    }
}

/// Convert `source` into the folder `output`.
///
/// The folder appears, complete, in one rename; on any error it is as it was. A run that is stopped after its first layer
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
    let mut checked = Checked::new(source, arch, settings)?;
    let (text, decision) = read_calibration(&checked, observer)?;
    checked.decisions.extend(decision);
    give_back();
    let spill = Need::of(&checked.case, checked.spec.geometry, &text.windows).spill(settings.max_memory)?;
    let planned = emission(arch, &checked.spec, &source.tensors).planned();
    let bytes = planned.iter().map(|t| t.shape.iter().product::<usize>() as u64 * t.dtype.byte_size() as u64).sum();
    let place = Place { output, overwrite: settings.overwrite, leftover: settings.leftover, bytes };
    let mut staging = publish::stage(source, &place)?;
    let identity = journal::identity(&checked.case, &text.windows)?;
    staging.check_identity(&identity)?;
    let saved = staging.record().map(Saved::read).unwrap_or_default();
    clock.lap("prepare");
    if !source.files.iter().any(|f| f.name == "tokenizer.json") {
        observer.event(Event::Warning("the source has no tokenizer.json, so the output has none".into()));
    }
    let device = Device::open(settings.device)?;
    let (blueprint, resumed) = match saved.plan() {
        Some(blueprint) => (blueprint, true),
        None => {
            if settings.leftover == Leftover::Resume && staging.record().is_none() {
                observer.event(Event::Note("there is no unfinished run to resume: beginning anew".into()));
            }
            staging.open_journal(identity.clone(), 0)?;
            let blueprint = survey(&checked, &text, false, &device, observer)?;
            journal::planned(&mut staging, &blueprint, observer)?;
            (blueprint, false)
        }
    };
    let windows = settings.method.order(text.windows);
    let run = Run { checked: &checked, blueprint: &blueprint, device: &device, windows: &windows, spill, observer };
    let emission = emission(arch, &blueprint.spec, &source.tensors);
    let shards = blueprint.shards(&emission.planned(), settings.max_shard_bytes)?;
    let start = if resumed {
        let start = run.start(saved, &staging, &shards)?;
        staging.open_journal(identity, start.entries)?;
        start
    } else {
        Start::default()
    };
    for decision in &blueprint.decisions {
        observer.event(Event::Note(decision.clone()));
    }
    clock.lap("survey");

    let mut publisher = Publisher::resume(source, staging, shards, start.progress.clone(), observer)?;
    let emitted = run.emit(&mut publisher, &emission, &start, &mut clock);
    let mut report = match emitted.and_then(|emitted| run.describe(&mut publisher, emitted, output, extras)) {
        Ok(report) => report,
        Err(e) => {
            // What would end the same way again is not worth going on with.
            if !e.may_pass() {
                publisher.staging_mut().keep(false);
            }
            return Err(e);
        }
    };
    report.output = publisher.finish()?;
    clock.lap("publish");
    report.seconds = clock.finish();
    report.peak_rss_bytes = peak_rss_bytes();
    Ok(report)
}

/// A conversion whose decisions are taken.
pub(super) struct Run<'a> {
    pub checked: &'a Checked<'a>,
    pub blueprint: &'a Blueprint,
    pub device: &'a Device,
    /// Calibration windows, in the method's order.
    pub windows: &'a [Vec<u32>],
    /// Whether hidden states wait on the disk.
    pub spill: bool,
    pub observer: &'a dyn Observer,
}

/// What the report needs to know of the layers that were written.
struct Emitted {
    layers: Vec<LayerReport>,
    /// Radians per token of each rotated slot.
    frequencies: Vec<f64>,
}

impl Run<'_> {
    /// Where an unfinished run is gone on with.
    fn start(&self, saved: Saved, staging: &Staging, shards: &crate::write::ShardPlan) -> Result<Start, ConvertError> {
        let (promised, of) = (saved.layers(), self.checked.case.arch.layers);
        let start = saved.start(staging, shards, &self.stream_names(), of)?;
        let left = start.layers.len();
        if left < promised {
            self.observer.event(Event::Warning(format!(
                "what the unfinished run saved of layer {} is damaged: going on after layer {left} of {of}",
                left + 1
            )));
        } else if left > 0 {
            self.observer.event(Event::Note(format!("resumed: {left} of {of} layers are there already")));
        }
        Ok(start)
    }

    /// Writes every weight.
    fn emit(
        &self,
        publisher: &mut Publisher<'_>,
        emission: &crate::target::Emission,
        start: &Start,
        clock: &mut Clock,
    ) -> Result<Emitted, ConvertError> {
        let arch = self.checked.case.arch;
        if start.layers.is_empty() {
            // Tensors of layers are scanned when their layer is read, these here.
            self.checked.check_finite(&arch.names.embed)?;
            publisher.write(&emission.first, &mut Nothing)?;
        }
        let mut frequencies = start.layers.last().map(|l| l.frequencies.clone()).unwrap_or_default();
        let mut layers: Vec<LayerReport> = start.layers.iter().map(|l| l.report.clone()).collect();
        let folder = publisher.staging().root().to_owned();
        self.convert_layers(&folder, start, |done| {
            let layer = done.report.layer;
            let attention =
                done.layer.as_ref().map(|mla| self.blueprint.spec.attention_tensors(arch, layer, mla, &done.gain));
            publisher.write(&emission.layers[layer], &mut attention.unwrap_or_default().as_slice())?;
            if let Some(mla) = done.layer {
                frequencies = mla.rope_freq;
            }
            let mark = publisher.mark()?;
            layers.push(done.report.clone());
            let finished =
                Finished { layer, report: done.report, frequencies: frequencies.clone(), mark, streams: done.streams };
            journal::finished(publisher.staging_mut(), &finished, self.observer)
        })?;
        clock.lap("convert");
        let head = if arch.tied_head { &arch.names.embed } else { &arch.names.head };
        for name in [&arch.names.final_norm, head] {
            self.checked.check_finite(name)?;
        }
        publisher.write(&emission.last, &mut Nothing)?;
        Ok(Emitted { layers, frequencies })
    }

    /// Writes every file beside the weights; only publishing is left.
    fn describe(
        &self,
        publisher: &mut Publisher<'_>,
        emitted: Emitted,
        output: &Path,
        extras: Extras<'_>,
    ) -> Result<ConversionReport, ConvertError> {
        let (blueprint, spec) = (self.blueprint, &self.blueprint.spec);
        let case = &self.checked.case;
        let (source, arch) = (case.source, case.arch);
        let rope = spec.rope(&emitted.frequencies, arch, &source.config, blueprint.max_position);
        let config = spec.config(arch, &source.config, &rope, blueprint.max_position);
        let tokenizer = publish::tokenizer_files(source, spec.class, self.observer);
        let class = spec.class.files().iter().map(|(name, text)| (*name, text.as_bytes()));
        let own: Vec<_> = class.chain(tokenizer.iter().map(|(name, text)| (name.as_str(), text.as_slice()))).collect();
        publisher.side_files(Config::Made(&config), &own)?;
        let mla_layers = blueprint.mla_layers(arch.layers);
        let count = mla_layers.len().max(1) as f64;
        let error = emitted.layers.iter().map(|l| l.calibration_error).sum::<f64>() / count;
        let report = ConversionReport {
            schema_version: SCHEMA_VERSION,
            tool_version: env!("CARGO_PKG_VERSION").to_owned(),
            output: output.to_owned(),
            source: source.spec.clone(),
            source_revision: source.revision.clone(),
            source_fingerprint: publish::fingerprint(source),
            method: case.settings.method.name().to_owned(),
            settings: case.settings.clone(),
            decisions: blueprint.decisions.iter().cloned().chain(rope.note.clone()).collect(),
            target: spec.class,
            geometry: spec.output(),
            latent_norm: spec.latent_norm,
            cache_values_per_token_per_layer: spec.cache_values(),
            source_cache_values_per_token_per_layer: arch.cache_values(),
            cache_values_per_token: blueprint.cache_values_per_token(arch),
            mla_layers,
            rope_frequencies: rope.frequencies.clone(),
            calibration_error: error,
            predicted_error: error,
            layers: emitted.layers,
            calibration_tokens: self.windows.iter().map(Vec::len).sum(),
            peak_rss_bytes: peak_rss_bytes(),
            seconds: BTreeMap::new(),
        };
        publisher.report(&report, extras)?;
        Ok(report)
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
