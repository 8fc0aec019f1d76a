//! The calibration tokens on their way through the layers, each converted on the way.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ndarray::Array2;

use super::aware::{Inputs, convert_layer};
use super::checkpoint::Start;
use super::memory::give_back;
use super::run::Run;
use super::state::{Parked, StateFile};
use super::streams::{SourceLayer, SourcePass, Stream, first_windows, input_gain};
use super::survey::{output_error, published_layer};
use super::weights;
use super::{ConvertError, Job, LayerReport, Method};
use crate::arch::load_attention_source;
use crate::calibrate::Moments;
use crate::methods::{MlaLayer, exact};
use crate::observe::Event;
use crate::refine::RefineSettings;

/// Name of the source's hidden states.
const SOURCE: &str = "source";
/// Name of the converted model's.
const CONVERTED: &str = "converted";

/// Streams of hidden states that the method calibrates on.
pub(super) fn stream_names(job: &Job<'_>) -> &'static [&'static str] {
    match job.settings.method {
        Method::Exact => &[],
        Method::AttentionAware if job.settings.steps.converted_stream => &[SOURCE, CONVERTED],
        Method::AttentionAware | Method::Transmla | Method::Care | Method::XEcomla | Method::Mha2mla => &[SOURCE],
    }
}

/// Hidden states between layers.
struct Streams {
    source: Option<Parked>,
    converted: Option<Parked>,
}

/// A layer that is done, none where it is kept as it is; the gain of its input norm, and its figures.
type Done = (Option<MlaLayer>, Vec<f64>, LayerReport);

/// Where streams are saved, by name.
type SavedStreams = BTreeMap<String, StateFile>;

impl Run<'_> {
    /// Run the calibration tokens through the layers that are left and convert each on the way. `done` gets the layer, the
    /// gain of its input norm, its figures, and where the hidden states behind it are.
    pub(super) fn convert_layers(
        &self,
        folder: PathBuf,
        start: Start,
        mut done: impl FnMut(Option<MlaLayer>, &[f64], LayerReport, SavedStreams) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        let Run { job, observer, .. } = *self;
        let layers = job.arch.layers;
        let first = start.layers.len();
        observer.event(Event::Phase { name: "convert", steps: Some(layers as u64) });
        let mut streams = self.streams(&folder, first, &start.streams)?;
        for index in first..layers {
            for expected in job.arch.layer_tensor_names(index) {
                job.check_finite(&expected)?;
            }
            let tokens = streams.source.as_ref().map_or(0, Parked::tokens);
            let mut saved = SavedStreams::new();
            let (layer, gain, report) = match &mut streams.source {
                None => self.exact(index)?,
                Some(source) if job.spec.keeps(index) => {
                    self.kept(index, source, streams.converted.as_mut(), &mut saved)?
                }
                Some(source) if job.settings.method == Method::AttentionAware => {
                    self.attention_aware(index, source, streams.converted.as_mut(), &mut saved)?
                }
                Some(source) if job.settings.method.from_weights() => self.decomposed(index, source, &mut saved)?,
                Some(source) => self.published(index, source, &mut saved)?,
            };
            done(layer, &gain, report, saved)?;
            give_back();
            observer.event(Event::Step { done: index as u64 + 1, tokens: (tokens * (index + 1)) as u64 });
        }
        Ok(())
    }

    /// The streams at the input of layer `first`: embedded, or as an earlier run left them.
    fn streams(&self, folder: &Path, first: usize, saved: &SavedStreams) -> Result<Streams, ConvertError> {
        let mut streams = Streams { source: None, converted: None };
        if first == self.job.arch.layers {
            return Ok(streams);
        }
        for &name in stream_names(self.job) {
            let parked = match saved.get(name) {
                Some(file) => Parked::saved(name, folder, self.windows.iter().map(Vec::len).collect(), file.clone()),
                None => Parked::new(name, folder, Stream::start(self.job, self.backend, self.windows)?),
            };
            *(if name == SOURCE { &mut streams.source } else { &mut streams.converted }) = Some(parked);
        }
        if first == 0 && self.spill {
            for stream in [&mut streams.source, &mut streams.converted].into_iter().flatten() {
                self.settle(stream, 0, &mut SavedStreams::new())?;
            }
        }
        Ok(streams)
    }

    /// Whether nothing is behind a layer.
    fn is_last(&self, index: usize) -> bool {
        index + 1 == self.job.arch.layers
    }

    /// Saves a stream as the input of layer `layer`, and lets go of it if it is to wait on the disk.
    fn settle(&self, stream: &mut Parked, layer: usize, saved: &mut SavedStreams) -> Result<(), ConvertError> {
        let file = stream.save(layer)?;
        saved.insert(stream.name().to_owned(), file);
        stream.release(self.spill);
        Ok(())
    }

    /// Takes a stream behind layer `index`, whose attention gives `output`. Nothing is behind the last.
    fn behind(
        &self,
        index: usize,
        source: &SourceLayer<'_>,
        stream: &mut Parked,
        output: &Array2<f32>,
        saved: &mut SavedStreams,
    ) -> Result<(), ConvertError> {
        if self.is_last(index) {
            return Ok(());
        }
        source.advance(stream.change()?, output)?;
        self.settle(stream, index + 1, saved)
    }

    /// One layer that needs no tokens.
    fn exact(&self, index: usize) -> Result<Done, ConvertError> {
        let attention = load_attention_source(self.job.source, self.job.arch, index)?;
        let gain = input_gain(self.job, index)?;
        let layer = exact::convert(&attention, self.job.spec.geometry.qk_nope_head_dim);
        Ok((Some(layer), gain, LayerReport { layer: index, ..LayerReport::default() }))
    }

    /// One layer that keeps the source's attention.
    fn kept(
        &self,
        index: usize,
        stream: &mut Parked,
        converted: Option<&mut Parked>,
        saved: &mut SavedStreams,
    ) -> Result<Done, ConvertError> {
        let source = SourceLayer::load(self.job, self.backend, index)?;
        if !self.is_last(index) {
            for stream in [Some(stream), converted].into_iter().flatten() {
                let output = source.attend(stream.stream()?, false)?.output;
                self.behind(index, &source, stream, &output, saved)?;
            }
        }
        Ok((None, source.gain, LayerReport { layer: index, kept: true, ..LayerReport::default() }))
    }

    /// One layer by `attention-aware`.
    fn attention_aware(
        &self,
        index: usize,
        stream: &mut Parked,
        mut converted: Option<&mut Parked>,
        saved: &mut SavedStreams,
    ) -> Result<Done, ConvertError> {
        let Run { job, backend, found, spill, .. } = *self;
        let mut source = SourceLayer::load(job, backend, index)?;
        let pass = source.attend(stream.stream()?, true)?;
        let explained = source.linearise(index, pass.x.view())?;
        stream.release(spill);
        let seen = match &mut converted {
            Some(c) => {
                let x = source.layer.attention_input(c.stream()?.hidden.view())?;
                c.release(spill);
                Some(x)
            }
            None => None,
        };
        let windows = stream.windows().to_vec();
        let inputs = Inputs {
            index,
            source: &source.attention,
            target: &pass,
            x: seen.as_ref().map_or(pass.x.view(), |x| x.view()),
            windows: &windows,
            slots: &found.slots,
            rank: job.spec.geometry.kv_lora_rank,
            steps: job.settings.steps,
            bias: job.spec.bias,
            refine: RefineSettings {
                steps: job.settings.refine,
                seed: job.settings.calibration.seed,
                longest: RefineSettings::default().longest.max(job.settings.calibration.seq_len),
                ..RefineSettings::default()
            },
        };
        let mut out = if spill {
            // What waits on the disk is not read back before there is room for it.
            convert_layer(&inputs)?
        } else {
            // The source's stream needs nothing of the conversion, whose decompositions leave threads idle.
            let advance = || self.behind(index, &source, &mut *stream, &pass.output, &mut *saved);
            let (out, advanced) = rayon::join(|| convert_layer(&inputs), advance);
            advanced?;
            out?
        };
        out.report.notes.extend(explained.map(|e| e.note()));
        drop(seen);
        // The other parts of the pass are as large as a stream.
        let SourcePass { output, .. } = pass;
        if spill {
            self.behind(index, &source, stream, &output, saved)?;
        }
        drop(output);
        if let Some(c) = converted {
            self.behind(index, &source, c, &out.output, saved)?;
        }
        Ok((Some(out.layer), source.gain, out.report))
    }

    /// One layer by a method that factorises weights.
    fn decomposed(&self, index: usize, stream: &mut Parked, saved: &mut SavedStreams) -> Result<Done, ConvertError> {
        let mut source = SourceLayer::load(self.job, self.backend, index)?;
        let (layer, report, output) =
            weights::convert_on_stream(self.job, self.found, index, &mut source, stream.stream()?)?;
        stream.release(self.spill);
        self.behind(index, &source, stream, &output, saved)?;
        Ok((Some(layer), source.gain, report))
    }

    /// One layer by TransMLA or CARE. As published, keys and values are compressed on what reaches the layer behind layers
    /// that lost rotations but are not compressed yet. One stream serves both steps.
    fn published(&self, index: usize, stream: &mut Parked, saved: &mut SavedStreams) -> Result<Done, ConvertError> {
        let Run { job, backend, found, spill, .. } = *self;
        let mut source = SourceLayer::load(job, backend, index)?;
        let x = source.layer.attention_input(stream.stream()?.hidden.view())?;
        stream.release(spill);
        let explained = source.linearise(index, x.view())?;
        let mut moments = Moments::new(job.arch.hidden);
        moments.add(x.view());
        let out = published_layer(job, found.fold, &source.attention, &moments).map_err(ConvertError::layer(index))?;
        let error = {
            let (x, lengths) = first_windows(&x, stream.windows(), weights::MEASURED_WINDOWS);
            let want = source.layer.attention_output(x, lengths)?;
            output_error(&out.layer, source.attention.score_softcap, x, lengths, &want)
        };
        if !self.is_last(index) {
            let output = source.behind_rotation(&out.rotated, &x, stream.windows())?;
            drop(x);
            self.behind(index, &source, stream, &output, saved)?;
        }
        let report = LayerReport {
            layer: index,
            predicted_error: error,
            rope_loss: out.rope_loss,
            rank_loss: out.rank_loss,
            notes: explained.map(|e| e.note()).into_iter().collect(),
            ..LayerReport::default()
        };
        Ok((Some(out.layer), source.gain, report))
    }
}
