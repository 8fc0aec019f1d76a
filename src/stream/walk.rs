//! The source's forward pass over a few windows, layer by layer, as surveys look at it.

use super::{Keep, SourceLayer, SourceModel, SourcePass, Stream};
use crate::error::ConvertError;
use crate::observe::{Event, Observer};
use crate::runtime::Device;

/// One layer of a walk: itself, and its attention on every list of windows.
#[derive(Clone, Copy)]
pub struct Visit<'a, 'b> {
    /// Layer index.
    pub index: usize,
    /// The layer; norms of queries and keys that the output has no place for are linear maps already.
    pub layer: &'a SourceLayer<'b>,
    /// What it does on the windows that are fitted on.
    pub pass: &'a SourcePass,
    /// Those windows at its input.
    pub stream: &'a Stream,
    /// The same for lists of windows that nothing is fitted on.
    pub others: &'a [(SourcePass, &'a Stream)],
}

/// A few windows of calibration text and the model to run on them.
#[derive(Clone, Copy)]
pub struct Walk<'a> {
    /// The model.
    pub model: SourceModel<'a>,
    /// Where it runs.
    pub device: &'a Device,
    /// Windows to fit on.
    pub windows: &'a [Vec<u32>],
    /// Windows that nothing is fitted on; empty where there are too few in all.
    pub held_out: &'a [Vec<u32>],
    /// One window longer than all that are fitted on, where the text has one.
    pub longer: Option<&'a Vec<u32>>,
    /// Told about every layer.
    pub observer: &'a dyn Observer,
}

impl Walk<'_> {
    /// Run the source over [`Walk::windows`], handing each layer to `visit`. Phase reported: `survey`.
    ///
    /// # Errors
    /// Layers that cannot be read or run; what `visit` returns.
    pub fn layers(
        &self,
        keep: Keep,
        visit: impl FnMut(Visit<'_, '_>) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        self.layers_beside(&[], keep, visit)
    }

    /// As [`Walk::layers`], with other lists of windows beside them, which nothing is fitted on.
    ///
    /// # Errors
    /// As [`Walk::layers`].
    pub fn layers_beside(
        &self,
        beside: &[&[Vec<u32>]],
        keep: Keep,
        mut visit: impl FnMut(Visit<'_, '_>) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        let (model, layers) = (&self.model, self.model.arch.layers);
        let start = |windows: &[Vec<u32>]| Stream::start(model, self.device, windows);
        let mut stream = start(self.windows)?;
        let mut others = beside.iter().map(|windows| start(windows)).collect::<Result<Vec<_>, _>>()?;
        self.observer.event(Event::Phase { name: "survey", steps: Some(layers as u64) });
        for index in 0..layers {
            let mut layer = SourceLayer::load(model, self.device, index)?;
            let pass = layer.attend(&stream, keep)?;
            let passes = others.iter().map(|other| Ok((layer.attend(other, Keep::default())?, other)));
            let passes = passes.collect::<Result<Vec<_>, ConvertError>>()?;
            layer.linearise(index, pass.x.view())?;
            visit(Visit { index, layer: &layer, pass: &pass, stream: &stream, others: &passes })?;
            if index + 1 < layers {
                let outputs: Vec<_> = passes.into_iter().map(|(pass, _)| pass.output).collect();
                layer.advance(&mut stream, &pass.output)?;
                for (other, output) in others.iter_mut().zip(&outputs) {
                    layer.advance(other, output)?;
                }
            }
            let tokens = (stream.hidden.nrows() * (index + 1)) as u64;
            self.observer.event(Event::Step { done: index as u64 + 1, tokens });
        }
        Ok(())
    }
}
