//! The calibration tokens on their way through the layers, each converted on the way.

use std::collections::BTreeMap;
use std::path::Path;

use ndarray::Array2;

use super::journal::Start;
use super::run::Run;
use crate::arch::load_attention_source;
use crate::error::ConvertError;
use crate::methods::{LayerInput, LayerOutput, LayerReport, LayerTokens, SourceStream};
use crate::mla::MlaLayer;
use crate::observe::Event;
use crate::plan::give_back;
use crate::stream::{Keep, Parked, SourceLayer, SourcePass, StateFile, Stream, input_gain};

/// Name of the source's hidden states.
const SOURCE: &str = "source";
/// Name of the converted model's.
const CONVERTED: &str = "converted";

/// Where streams are saved, by name.
type SavedStreams = BTreeMap<String, StateFile>;

/// Hidden states between layers.
struct Streams {
    source: Option<Parked>,
    converted: Option<Parked>,
}

/// A layer that is done.
pub(super) struct Done {
    /// The converted layer; none where the source's attention is kept.
    pub layer: Option<MlaLayer>,
    /// Gain of its input norm, `[D]`.
    pub gain: Vec<f64>,
    /// Its figures.
    pub report: LayerReport,
    /// Where the hidden states at the input of the next layer are.
    pub streams: SavedStreams,
}

/// A layer at work: its weights, and what goes on from it.
struct Step<'a, 'b> {
    index: usize,
    source: &'a SourceLayer<'b>,
    saved: SavedStreams,
}

impl Run<'_> {
    /// Names of the streams of hidden states that the method calibrates on.
    pub(super) fn stream_names(&self) -> Vec<&'static str> {
        let streams = self.checked.case.settings.method.streams();
        let source = (!matches!(streams.source, SourceStream::None)).then_some(SOURCE);
        source.into_iter().chain(streams.converted.then_some(CONVERTED)).collect()
    }

    /// Run the calibration tokens through the layers that are left and convert each on the way, handing it to `done`.
    pub(super) fn convert_layers(
        &self,
        folder: &Path,
        start: &Start,
        mut done: impl FnMut(Done) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        let arch = self.checked.case.arch;
        self.observer.event(Event::Phase { name: "convert", steps: Some(arch.layers as u64) });
        let mut streams = self.streams(folder, start.layers.len(), &start.streams)?;
        for index in start.layers.len()..arch.layers {
            for name in arch.layer_tensor_names(index) {
                self.checked.check_finite(&name)?;
            }
            let tokens = streams.source.as_ref().map_or(0, Parked::tokens);
            let Streams { source, converted } = &mut streams;
            let layer = match source {
                None => self.without_tokens(index)?,
                Some(source) if self.blueprint.spec.keeps(index) => self.kept(index, source, converted.as_mut())?,
                Some(source) => self.with_tokens(index, source, converted.as_mut())?,
            };
            done(layer)?;
            give_back();
            self.observer.event(Event::Step { done: index as u64 + 1, tokens: (tokens * (index + 1)) as u64 });
        }
        Ok(())
    }

    /// The streams at the input of layer `first`: embedded, or as an earlier run left them.
    fn streams(&self, folder: &Path, first: usize, saved: &SavedStreams) -> Result<Streams, ConvertError> {
        let mut streams = Streams { source: None, converted: None };
        if self.is_after_last(first) {
            return Ok(streams);
        }
        for name in self.stream_names() {
            let parked = match saved.get(name) {
                Some(file) => Parked::saved(name, folder, self.windows.iter().map(Vec::len).collect(), file.clone()),
                None => Parked::new(name, folder, Stream::start(&self.checked.model(), self.device, self.windows)?),
            };
            *(if name == SOURCE { &mut streams.source } else { &mut streams.converted }) = Some(parked);
        }
        if first == 0 && self.spill {
            for stream in [&mut streams.source, &mut streams.converted].into_iter().flatten() {
                self.save(stream, 0, &mut SavedStreams::new())?;
            }
        }
        Ok(streams)
    }

    /// Whether `layer` is one past the last layer.
    fn is_after_last(&self, layer: usize) -> bool {
        layer == self.checked.case.arch.layers
    }

    /// Saves a stream as the input of layer `layer`, and drops it from memory if it is to wait on the disk.
    fn save(&self, stream: &mut Parked, layer: usize, saved: &mut SavedStreams) -> Result<(), ConvertError> {
        let file = stream.save(layer)?;
        saved.insert(stream.name().to_owned(), file);
        stream.release(self.spill);
        Ok(())
    }

    /// Advances a stream through a layer whose attention gives `output`; nothing where it is the last.
    fn advance(&self, step: &mut Step<'_, '_>, stream: &mut Parked, output: &Array2<f32>) -> Result<(), ConvertError> {
        if self.is_after_last(step.index + 1) {
            return Ok(());
        }
        step.source.advance(stream.change()?, output)?;
        self.save(stream, step.index + 1, &mut step.saved)
    }

    /// One layer of a method that needs no tokens.
    fn without_tokens(&self, index: usize) -> Result<Done, ConvertError> {
        let case = &self.checked.case;
        let attention = load_attention_source(case.source, case.arch, index)?;
        let gain = input_gain(&self.checked.model(), index)?;
        let input = LayerInput { index, attention: &attention, tokens: None };
        let out = case.settings.method.layer(&self.blueprint.made(case), &input)?;
        Ok(Done { layer: Some(out.layer), gain, report: out.figures, streams: SavedStreams::new() })
    }

    /// One layer that keeps the source's attention.
    fn kept(&self, index: usize, stream: &mut Parked, converted: Option<&mut Parked>) -> Result<Done, ConvertError> {
        let source = SourceLayer::load(&self.checked.model(), self.device, index)?;
        let mut step = Step { index, source: &source, saved: SavedStreams::new() };
        if !self.is_after_last(index + 1) {
            for stream in [Some(stream), converted].into_iter().flatten() {
                let output = source.attend(stream.stream()?, Keep::default())?.output;
                self.advance(&mut step, stream, &output)?;
            }
        }
        let (report, streams) = (LayerReport { layer: index, kept: true, ..LayerReport::default() }, step.saved);
        Ok(Done { layer: None, gain: source.gain, report, streams })
    }

    /// One layer on calibration tokens.
    fn with_tokens(
        &self,
        index: usize,
        stream: &mut Parked,
        mut converted: Option<&mut Parked>,
    ) -> Result<Done, ConvertError> {
        let case = &self.checked.case;
        let method = &case.settings.method;
        let mut source = SourceLayer::load(&self.checked.model(), self.device, index)?;
        let (pass, own) = match method.streams().source {
            SourceStream::Pass(keep) => (Some(source.attend(stream.stream()?, keep)?), Array2::default((0, 0))),
            SourceStream::None | SourceStream::Inputs => {
                (None, source.layer.attention_input(stream.stream()?.hidden.view())?)
            }
        };
        let of_source = pass.as_ref().map_or(own.view(), |pass| pass.x.view());
        let explained = source.linearise(index, of_source)?;
        stream.release(self.spill);
        let of_converted = match &mut converted {
            Some(c) => {
                let x = source.layer.attention_input(c.stream()?.hidden.view())?;
                c.release(self.spill);
                Some(x)
            }
            None => None,
        };
        let windows = stream.windows().to_vec();
        let mut step = Step { index, source: &source, saved: SavedStreams::new() };
        let tokens = LayerTokens {
            layer: &source,
            pass: pass.as_ref(),
            x: of_converted.as_ref().map_or(of_source, |x| x.view()),
            windows: &windows,
        };
        let input = LayerInput { index, attention: &source.attention, tokens: Some(tokens) };
        let made = self.blueprint.made(case);
        let convert = || method.layer(&made, &input);
        // The source's stream needs nothing of the conversion, whose decompositions leave threads idle. What waits on the disk
        // is not read back before there is room for it.
        let overlapped = pass.is_some() && !self.spill;
        let mut out = match &pass {
            Some(pass) if overlapped => {
                let (out, advanced) = rayon::join(convert, || self.advance(&mut step, stream, &pass.output));
                advanced?;
                out?
            }
            _ => convert()?,
        };
        out.figures.notes.extend(explained.map(|e| e.note()));
        drop(of_converted);
        drop(own);
        // The other parts of the pass are as large as a stream.
        let output = pass.map(|SourcePass { output, .. }| output);
        let LayerOutput { layer, figures, next, converted: made } = out;
        if let Some(output) = output.or(next).filter(|_| !overlapped) {
            self.advance(&mut step, stream, &output)?;
        }
        if let (Some(c), Some(output)) = (converted, made) {
            self.advance(&mut step, c, &output)?;
        }
        let streams = step.saved;
        Ok(Done { layer: Some(layer), gain: source.gain, report: figures, streams })
    }
}
