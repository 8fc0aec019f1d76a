//! Decoding with a cache, on a model that is held in memory.

use ndarray::{Array2, s};

use super::attention::{Cache, LatentPath, Step};
use super::model::check_finite;
use super::{Backend, Head, Layer, Model, Rotation, RuntimeError};

/// Up to this many new rows, MLA attends to the latent itself; above, expanding keys and values is cheaper.
const ABSORB_ROWS: usize = 8;

/// All layers of a model on a backend.
#[derive(Debug)]
pub struct Resident<'a, B: Backend> {
    model: Model<'a, B>,
    layers: Vec<Layer<'a, B>>,
    head: Head<'a, B>,
}

impl<'a, B: Backend> Resident<'a, B> {
    /// Load every layer and the head.
    ///
    /// # Errors
    /// [`RuntimeError::Source`], [`RuntimeError::Shape`].
    pub fn load(model: Model<'a, B>) -> Result<Self, RuntimeError> {
        let layers = (0..model.architecture().layers).map(|i| model.layer(i)).collect::<Result<_, _>>()?;
        Ok(Self { layers, head: model.head()?, model })
    }

    /// The model it was loaded from.
    pub fn model(&self) -> &Model<'a, B> {
        &self.model
    }

    /// Logits of every token of every window, `[T, V]`, without a cache.
    ///
    /// # Errors
    /// As [`Model::final_hidden`].
    pub fn logits(&self, windows: &[Vec<u32>]) -> Result<Array2<f32>, RuntimeError> {
        let (mut hidden, lengths) = self.model.start(windows)?;
        for (index, layer) in self.layers.iter().enumerate() {
            layer.forward(&mut hidden, &lengths)?;
            check_finite(hidden.view(), || format!("layer {index}"))?;
        }
        self.head.logits(hidden.view())
    }
}

/// One sequence being decoded. The cache of an MLA layer holds `r + d_R` values per token, that of a GQA layer `2 g d`.
pub struct Session<'r, 'a, B: Backend> {
    resident: &'r Resident<'a, B>,
    caches: Vec<Cache<B::Tensor>>,
    capacity: usize,
    length: usize,
}

impl<B: Backend> std::fmt::Debug for Session<'_, '_, B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("length", &self.length).field("capacity", &self.capacity).finish()
    }
}

impl<'r, 'a, B: Backend> Session<'r, 'a, B> {
    /// Allocate caches for `capacity` tokens. A model whose frequencies change with the length of a sequence takes those
    /// of the capacity, since cached keys are rotated already.
    ///
    /// # Errors
    /// [`RuntimeError::ContextTooLong`] when the model has fewer positions.
    pub fn new(resident: &'r Resident<'a, B>, capacity: usize) -> Result<Self, RuntimeError> {
        let max = resident.model.architecture().max_position;
        if capacity > max {
            return Err(RuntimeError::ContextTooLong { length: capacity, max });
        }
        let caches = resident.layers.iter().map(|layer| layer.cache(capacity)).collect();
        Ok(Self { resident, caches, capacity, length: 0 })
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing was fed yet.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Bytes of the allocated caches of all layers.
    pub fn cache_bytes(&self) -> usize {
        self.caches.iter().map(|cache| cache.bytes(self.resident.model.backend())).sum()
    }

    /// Forget everything from position `length` on.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }

    /// Feed tokens; the logits `[V]` that follow the last of them.
    ///
    /// # Errors
    /// [`RuntimeError::NoTokens`], [`RuntimeError::ContextTooLong`] when the capacity is used up,
    /// [`RuntimeError::Token`], [`RuntimeError::NotFinite`].
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<Vec<f32>, RuntimeError> {
        let path = if tokens.len() <= ABSORB_ROWS { LatentPath::Absorbed } else { LatentPath::Expanded };
        self.advance(tokens, path)
    }

    /// Feed one token; the logits `[V]` that follow it.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn step(&mut self, token: u32) -> Result<Vec<f32>, RuntimeError> {
        self.advance(&[token], LatentPath::Absorbed)
    }

    pub(super) fn advance(&mut self, tokens: &[u32], path: LatentPath) -> Result<Vec<f32>, RuntimeError> {
        let Resident { model, layers, head } = self.resident;
        let (start, end) = (self.length, self.length + tokens.len());
        if tokens.is_empty() {
            return Err(RuntimeError::NoTokens);
        }
        if end > self.capacity {
            return Err(RuntimeError::ContextTooLong { length: end, max: self.capacity });
        }
        let b = model.backend();
        let positions: Vec<usize> = (start..end).collect();
        let rotation = layers.first().map(|layer| Rotation::for_length(layer.rope(), start..end, self.capacity));
        let mut hidden = b.upload(model.embed(tokens)?);
        if let Some(rotation) = &rotation {
            let step = Step { start, rotation, positions: &positions, path };
            for (layer, cache) in layers.iter().zip(&mut self.caches) {
                layer.decode(&mut hidden, cache, &step)?;
            }
        }
        let last = b.rows(&hidden, tokens.len() - 1..tokens.len());
        let logits = b.download(head.on_device(&last)?)?;
        if check_finite(logits.view(), String::new).is_err() {
            return Err(self.first_bad_layer(tokens, path)?);
        }
        self.length = end;
        Ok(logits.slice(s![0, ..]).to_vec())
    }

    /// Run the same tokens again, looking at every layer. The rows they write are those they wrote before.
    fn first_bad_layer(&mut self, tokens: &[u32], path: LatentPath) -> Result<RuntimeError, RuntimeError> {
        let Resident { model, layers, .. } = self.resident;
        let b = model.backend();
        let positions: Vec<usize> = (self.length..self.length + tokens.len()).collect();
        let mut hidden = model.embed(tokens)?;
        check_finite(hidden.view(), || "the embedding".into())?;
        for (index, (layer, cache)) in layers.iter().zip(&mut self.caches).enumerate() {
            let end = self.length + tokens.len();
            let rotation = Rotation::for_length(layer.rope(), self.length..end, self.capacity);
            let step = Step { start: self.length, rotation: &rotation, positions: &positions, path };
            let mut x = b.upload(hidden);
            layer.decode(&mut x, cache, &step)?;
            hidden = b.download(x)?;
            check_finite(hidden.view(), || format!("layer {index}"))?;
        }
        Ok(RuntimeError::NotFinite { place: "the output head".into() })
    }
}
