//! One sequence decoded after a compressed prompt.

use std::ops::Range;

use ndarray::{Array2, s};

use super::{GroupCache, XkvBytes, XkvSettings};
use crate::runtime::attention::Step;
use crate::runtime::generate::Decode;
use crate::runtime::model::check_finite;
use crate::runtime::session::{PIECE, latent_path};
use crate::runtime::{Cpu, Layer, RawKv, Resident, Rotation, RuntimeError, Span};

/// A sequence whose prompt is kept as factors shared by groups of layers.
///
/// The first call of [`XkvSession::prefill`] takes the prompt: exact attention, layer by layer; a layer's exact cache is
/// dropped when the layer is done, its rows when its group is compressed. What is fed later is decoded over the factors.
#[derive(Debug)]
pub struct XkvSession<'r, 'a> {
    resident: &'r Resident<'a, Cpu>,
    settings: XkvSettings,
    capacity: usize,
    /// Every position of the capacity: keys of the prompt are rotated when they are needed. One table for all layers.
    rotation: Rotation,
    groups: Vec<GroupCache>,
    /// Tokens fed.
    length: usize,
    exact: usize,
}

impl<'r, 'a> XkvSession<'r, 'a> {
    /// A sequence of up to `capacity` tokens. Nothing is allocated before the prompt is there.
    ///
    /// # Errors
    /// [`RuntimeError::ContextTooLong`] when the model has fewer positions, unless `beyond_context`; [`RuntimeError::Xkv`]
    /// for groups that the model cannot have.
    pub fn new(
        resident: &'r Resident<'a, Cpu>,
        settings: XkvSettings,
        capacity: usize,
        beyond_context: bool,
    ) -> Result<Self, RuntimeError> {
        let arch = resident.model().architecture();
        if capacity > arch.max_position && !beyond_context {
            return Err(RuntimeError::ContextTooLong { length: capacity, max: arch.max_position });
        }
        settings.check(arch, usize::MAX)?;
        let rotation = Rotation::for_length(&arch.rope, 0..capacity, capacity);
        Ok(Self { resident, settings, capacity, rotation, groups: Vec::new(), length: 0, exact: 0 })
    }

    /// Bytes of the prompt's caches: allocated for its factors, and for the exact caches that were dropped.
    pub fn prompt_bytes(&self) -> XkvBytes {
        XkvBytes { compressed: self.groups.iter().map(GroupCache::prompt_bytes).sum(), exact: self.exact }
    }

    /// Bytes of all allocated caches: the prompt's factors, and room for the tokens after it.
    pub fn cache_bytes(&self) -> usize {
        self.prompt_bytes().compressed + self.groups.iter().map(GroupCache::tail_bytes).sum::<usize>()
    }

    /// Feed tokens: the prompt by the first call, later ones after it. The logits `[V]` that follow the last of them.
    ///
    /// # Errors
    /// [`RuntimeError::Xkv`] for a prompt that is too short for the ranks, and as [`crate::runtime::Session::feed`].
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<Vec<f32>, RuntimeError> {
        if tokens.is_empty() {
            return Err(RuntimeError::NoTokens);
        }
        let end = self.length + tokens.len();
        if end > self.capacity {
            return Err(RuntimeError::ContextTooLong { length: end, max: self.capacity });
        }
        let hidden = self.resident.model().embed(tokens)?;
        check_finite(hidden.view(), || "the embedding".into())?;
        let hidden = match self.groups.is_empty() {
            true => self.compress(hidden)?,
            false => self.decode(hidden)?,
        };
        self.length = end;
        let last = hidden.slice(s![hidden.nrows() - 1.., ..]);
        Ok(self.resident.head().logits(last)?.into_raw_vec_and_offset().0)
    }

    /// Feed one token; the logits `[V]` that follow it.
    ///
    /// # Errors
    /// As [`XkvSession::prefill`].
    pub fn step(&mut self, token: u32) -> Result<Vec<f32>, RuntimeError> {
        self.prefill(&[token])
    }

    /// The prompt through all layers, exactly; what each group keeps of it.
    fn compress(&mut self, mut hidden: Array2<f32>) -> Result<Array2<f32>, RuntimeError> {
        let tokens = hidden.nrows();
        self.settings.check(self.resident.model().architecture(), tokens)?;
        let (mut groups, mut exact) = (Vec::new(), 0);
        for (n, layers) in self.resident.layers().chunks(self.settings.group).enumerate() {
            let first = n * self.settings.group;
            let mut raws = Vec::with_capacity(layers.len());
            for (index, layer) in layers.iter().enumerate() {
                let (raw, bytes) = exact_layer(layer, &mut hidden, &self.rotation)?;
                self.resident.model().check_layer(first + index, hidden.view())?;
                raws.push(raw);
                exact += bytes;
            }
            let layers: Vec<&Layer<'_, Cpu>> = layers.iter().collect();
            let capacity = self.capacity - tokens;
            groups.push(GroupCache::new(first, raws, &layers, &self.settings, &self.rotation, capacity)?);
        }
        (self.groups, self.exact) = (groups, exact);
        Ok(hidden)
    }

    fn decode(&mut self, mut hidden: Array2<f32>) -> Result<Array2<f32>, RuntimeError> {
        let positions = self.length..self.length + hidden.nrows();
        let of_group = self.resident.layers().chunks(self.settings.group);
        for (n, (group, layers)) in self.groups.iter_mut().zip(of_group).enumerate() {
            for (index, layer) in layers.iter().enumerate() {
                group.decode(index, layer, &mut hidden, (&self.rotation, positions.clone()))?;
                self.resident.model().check_layer(n * self.settings.group + index, hidden.view())?;
            }
        }
        Ok(hidden)
    }
}

impl Decode for XkvSession<'_, '_> {
    fn prefill(&mut self, tokens: &[u32]) -> Result<Vec<f32>, RuntimeError> {
        XkvSession::prefill(self, tokens)
    }

    fn step(&mut self, token: u32) -> Result<Vec<f32>, RuntimeError> {
        XkvSession::step(self, token)
    }
}

/// One layer on a whole prompt with a cache of its own, as a session runs it; the rows to compress, and the bytes of the
/// cache that is dropped here.
fn exact_layer(
    layer: &Layer<'_, Cpu>,
    hidden: &mut Array2<f32>,
    rotation: &Rotation,
) -> Result<(RawKv, usize), RuntimeError> {
    let raw = layer.raw_kv(layer.attention_input(hidden.view())?.view())?;
    let mut cache = layer.cache(hidden.nrows());
    for first in (0..hidden.nrows()).step_by(PIECE) {
        let rows: Range<usize> = first..hidden.nrows().min(first + PIECE);
        let positions: Vec<usize> = rows.clone().collect();
        let spans = [Span { queries: 0..rows.len(), keys: 0..rows.end }];
        let path = latent_path(rows.len());
        let step = Step { rotation, positions: &positions, slots: &positions, spans: &spans, path };
        let mut x = hidden.slice(s![rows.clone(), ..]).to_owned();
        layer.decode(&mut x, &mut cache, &step)?;
        hidden.slice_mut(s![rows, ..]).assign(&x);
    }
    Ok((raw, cache.bytes(&Cpu)))
}
