//! Decoding with a cache, on a model that is held in memory.

use ndarray::{Array2, s};

use super::attention::{Cache, LatentPath, Step};
use super::model::check_finite;
use super::{Backend, Head, Layer, Model, Rotation, RuntimeError, Span};
use crate::arch::Rope;
use crate::source::MappedBytes;

/// Up to this many new rows of a sequence, MLA attends to the latent itself; above, expanding keys and values is cheaper.
const ABSORB_ROWS: usize = 8;
/// New rows of all sequences that go through the layers at once: bounds the MLP's intermediate and what is expanded.
pub(super) const PIECE: usize = 2048;

/// How `rows` new rows of a sequence read an MLA cache.
pub(super) fn latent_path(rows: usize) -> LatentPath {
    if rows > ABSORB_ROWS { LatentPath::Expanded } else { LatentPath::Absorbed }
}

/// All layers of a model on a backend.
#[derive(Debug)]
pub struct Resident<'a, B: Backend> {
    model: Model<'a, B>,
    layers: Vec<Layer<'a, B>>,
    head: Head<'a, B>,
    /// The embedding where it is used in place: its file stays mapped.
    _embedding: Option<MappedBytes>,
    /// Rotary embeddings of the layers, each once, and which of them each layer has.
    ropes: Vec<Rope>,
    rope_of: Vec<usize>,
}

impl<'a, B: Backend> Resident<'a, B> {
    /// Load every layer and the head.
    ///
    /// # Errors
    /// [`RuntimeError::Source`], [`RuntimeError::Shape`].
    pub fn load(model: Model<'a, B>) -> Result<Self, RuntimeError> {
        let layers = (0..model.architecture().layers).map(|i| model.held_layer(i)).collect::<Result<Vec<_>, _>>()?;
        let mut ropes: Vec<Rope> = Vec::new();
        let rope_of = layers.iter().map(|layer: &Layer<'_, B>| {
            ropes.iter().position(|r| r == layer.rope()).unwrap_or_else(|| {
                ropes.push(layer.rope().clone());
                ropes.len() - 1
            })
        });
        let rope_of = rope_of.collect();
        Ok(Self { layers, head: model.head()?, _embedding: model.embedding()?, model, ropes, rope_of })
    }

    /// The model it was loaded from.
    pub fn model(&self) -> &Model<'a, B> {
        &self.model
    }

    /// All layers.
    pub(super) fn layers(&self) -> &[Layer<'a, B>] {
        &self.layers
    }

    /// The final norm and the output head.
    pub(super) fn head(&self) -> &Head<'a, B> {
        &self.head
    }

    /// Logits of every token of every window, `[T, V]`, without a cache.
    ///
    /// # Errors
    /// As [`Model::final_hidden`].
    pub fn logits(&self, windows: &[Vec<u32>]) -> Result<Array2<f32>, RuntimeError> {
        let (mut hidden, lengths) = self.model.start(windows)?;
        for (index, layer) in self.layers.iter().enumerate() {
            layer.forward(&mut hidden, &lengths)?;
            self.model.check_layer(index, hidden.view())?;
        }
        self.head.logits(hidden.view())
    }
}

/// What a [`Session`] has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionSize {
    /// Sequences decoded side by side.
    pub sequences: usize,
    /// Tokens of each sequence.
    pub capacity: usize,
    /// Allow more positions than the model was made for.
    pub beyond_context: bool,
}

/// Sequences being decoded side by side. The cache of an MLA layer holds `r + d_R` values per token, that of a GQA layer
/// `2 g d`.
pub struct Session<'r, 'a, B: Backend> {
    resident: &'r Resident<'a, B>,
    /// Sequence `s` owns rows `s capacity ..`.
    caches: Vec<Cache<B::Tensor>>,
    capacity: usize,
    /// Tokens of each sequence in the cache.
    lengths: Vec<usize>,
}

impl<B: Backend> std::fmt::Debug for Session<'_, '_, B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("lengths", &self.lengths).field("capacity", &self.capacity).finish()
    }
}

/// New rows of a session on their way through the layers.
struct Piece {
    tokens: Vec<u32>,
    positions: Vec<usize>,
    slots: Vec<usize>,
    spans: Vec<Span>,
    /// One for each rotary embedding that layers have.
    rotations: Vec<Rotation>,
    path: LatentPath,
    /// Sequences whose last token is among these, and its row.
    ends: Vec<(usize, usize)>,
}

impl Piece {
    /// For layers with the rotary embedding `rope`.
    fn step(&self, rope: usize) -> Step<'_> {
        Step {
            rotation: &self.rotations[rope],
            positions: &self.positions,
            slots: &self.slots,
            spans: &self.spans,
            path: self.path,
        }
    }
}

impl<'r, 'a, B: Backend> Session<'r, 'a, B> {
    /// One sequence of up to `capacity` tokens. A model whose frequencies change with the length of a sequence takes those of
    /// the capacity, since cached keys are rotated already.
    ///
    /// # Errors
    /// [`RuntimeError::ContextTooLong`] when the model has fewer positions.
    pub fn new(resident: &'r Resident<'a, B>, capacity: usize) -> Result<Self, RuntimeError> {
        Self::with(resident, SessionSize { sequences: 1, capacity, beyond_context: false })
    }

    /// Allocate caches.
    ///
    /// # Errors
    /// [`RuntimeError::ContextTooLong`] when the model has fewer positions, unless that is allowed;
    /// [`RuntimeError::NoTokens`] for no sequence.
    pub fn with(resident: &'r Resident<'a, B>, size: SessionSize) -> Result<Self, RuntimeError> {
        let max = resident.model.architecture().max_position;
        if size.capacity > max && !size.beyond_context {
            return Err(RuntimeError::ContextTooLong { length: size.capacity, max });
        }
        if size.sequences == 0 {
            return Err(RuntimeError::NoTokens);
        }
        let rows = size.sequences.checked_mul(size.capacity).ok_or(RuntimeError::NoTokens)?;
        let caches = resident.layers.iter().map(|layer| layer.cache(rows)).collect();
        Ok(Self { resident, caches, capacity: size.capacity, lengths: vec![0; size.sequences] })
    }

    /// Tokens in the cache, of the longest sequence.
    pub fn len(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }

    /// Whether nothing was fed yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of the allocated caches of all layers and sequences.
    pub fn cache_bytes(&self) -> usize {
        self.caches.iter().map(|cache| cache.bytes(self.resident.model.backend())).sum()
    }

    /// Forget everything from position `length` on.
    pub fn truncate(&mut self, length: usize) {
        for own in &mut self.lengths {
            *own = length.min(*own);
        }
    }

    /// Feed tokens to the only sequence; the logits `[V]` that follow the last of them.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<Vec<f32>, RuntimeError> {
        Ok(self.feed(&[tokens])?.into_raw_vec_and_offset().0)
    }

    /// Feed one token to the only sequence; the logits `[V]` that follow it.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn step(&mut self, token: u32) -> Result<Vec<f32>, RuntimeError> {
        self.prefill(&[token])
    }

    /// Feed tokens to every sequence, some hundreds or one; the logits `[sequences, V]` that follow the last of each.
    ///
    /// # Errors
    /// [`RuntimeError::Sequences`] for another number of sequences, [`RuntimeError::NoTokens`] for an empty one,
    /// [`RuntimeError::ContextTooLong`] when the capacity is used up, [`RuntimeError::Token`],
    /// [`RuntimeError::NotFinite`]; as [`Model::check_files`].
    pub fn feed(&mut self, tokens: &[&[u32]]) -> Result<Array2<f32>, RuntimeError> {
        if tokens.len() != self.lengths.len() {
            return Err(RuntimeError::Sequences { expected: self.lengths.len(), found: tokens.len() });
        }
        for (own, new) in self.lengths.iter().zip(tokens) {
            if new.is_empty() {
                return Err(RuntimeError::NoTokens);
            }
            if own + new.len() > self.capacity {
                return Err(RuntimeError::ContextTooLong { length: own + new.len(), max: self.capacity });
            }
        }
        let mut logits = Array2::zeros((tokens.len(), self.resident.model.architecture().vocab));
        let longest = tokens.iter().map(|new| new.len()).max().unwrap_or(0);
        let rows = (PIECE / tokens.len()).max(1);
        for first in (0..longest).step_by(rows) {
            let piece = self.piece(tokens, first, rows);
            let found = self.advance(&piece)?;
            for (row, (sequence, _)) in found.rows().into_iter().zip(&piece.ends) {
                logits.row_mut(*sequence).assign(&row);
            }
        }
        Ok(logits)
    }

    /// Tokens `first..first + rows` of what is fed to each sequence, as far as there are.
    fn piece(&self, tokens: &[&[u32]], first: usize, rows: usize) -> Piece {
        let mut piece = Piece {
            tokens: Vec::new(),
            positions: Vec::new(),
            slots: Vec::new(),
            spans: Vec::new(),
            rotations: Vec::new(),
            path: LatentPath::Absorbed,
            ends: Vec::new(),
        };
        for (sequence, (new, &length)) in tokens.iter().zip(&self.lengths).enumerate() {
            let part = new.get(first..new.len().min(first + rows)).unwrap_or_default();
            if part.is_empty() {
                continue;
            }
            let (row, slot) = (piece.tokens.len(), sequence * self.capacity);
            piece.tokens.extend_from_slice(part);
            piece.positions.extend(length..length + part.len());
            piece.slots.extend(slot + length..slot + length + part.len());
            piece.spans.push(Span { queries: row..row + part.len(), keys: slot..slot + length + part.len() });
            if latent_path(part.len()) == LatentPath::Expanded {
                piece.path = LatentPath::Expanded;
            }
            if first + part.len() == new.len() {
                piece.ends.push((sequence, row + part.len() - 1));
            }
        }
        let start = piece.positions.iter().copied().min().unwrap_or(0);
        let end = piece.positions.iter().copied().max().map_or(0, |last| last + 1);
        let of = |rope: &Rope| Rotation::for_length(rope, start..end, self.capacity);
        piece.rotations = self.resident.ropes.iter().map(of).collect();
        piece
    }

    /// Run one piece; the logits after its ends, `[ends, V]`.
    fn advance(&mut self, piece: &Piece) -> Result<Array2<f32>, RuntimeError> {
        let Resident { model, layers, head, rope_of, .. } = self.resident;
        let b = model.backend();
        model.check_files()?;
        let mut hidden = b.upload(model.embed(&piece.tokens)?);
        for ((layer, cache), rope) in layers.iter().zip(&mut self.caches).zip(rope_of) {
            layer.decode(&mut hidden, cache, &piece.step(*rope))?;
        }
        let last: Vec<usize> = piece.ends.iter().map(|end| end.1).collect();
        let logits = match last.is_empty() {
            // Nothing is read, but a device may only fail when it is asked.
            true => b.download(b.rows(&hidden, 0..1)).map(|row| row.slice(s![..0, ..]).to_owned()),
            false => b.download(head.on_device(&b.gather_rows(&hidden, &last)?)?),
        }?;
        // Before anything is made of the figures: files that changed explain any.
        model.check_files()?;
        if check_finite(logits.view(), String::new).is_err() {
            return Err(self.first_bad_layer(piece)?);
        }
        for span in &piece.spans {
            self.lengths[span.keys.start / self.capacity] = span.keys.len();
        }
        Ok(logits)
    }

    /// Run the same tokens again, looking at every layer. The rows they write are those they wrote before.
    fn first_bad_layer(&mut self, piece: &Piece) -> Result<RuntimeError, RuntimeError> {
        let Resident { model, layers, rope_of, .. } = self.resident;
        let b = model.backend();
        let mut hidden = model.embed(&piece.tokens)?;
        check_finite(hidden.view(), || "the embedding".into())?;
        for (index, (layer, cache)) in layers.iter().zip(&mut self.caches).enumerate() {
            let mut x = b.upload(hidden);
            layer.decode(&mut x, cache, &piece.step(rope_of[index]))?;
            hidden = b.download(x)?;
            check_finite(hidden.view(), || format!("layer {index}"))?;
        }
        Ok(RuntimeError::NotFinite { place: "the output head".into() })
    }
}
