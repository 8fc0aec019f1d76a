//! A model streamed from its checkpoint, one layer in memory at a time.

use ndarray::{Array2, ArrayView2};

use super::attention::{Projection, vector};
use super::feed_forward::ExpertLoader;
use super::tensors::{Loader, add_offset, load_weight};
use super::{Backend, Layer, RuntimeError};
use crate::arch::{Architecture, Part};
use crate::observe::{Event, Observer};
use crate::source::{MappedBytes, ModelSource, TensorDirectory, TensorView};

/// Routed experts of a layer beyond this many bytes in f32 are read as tokens go to them, one in memory at a time: a
/// layer of DeepSeek-V3 has 45 GB of them.
const HELD_EXPERTS: u64 = 2 << 30;

/// A checkpoint seen as a function of tokens. Loads what it needs when it needs it.
#[derive(Debug)]
pub struct Model<'a, B: Backend> {
    source: &'a ModelSource,
    arch: &'a Architecture,
    backend: &'a B,
    held_experts: u64,
    in_place: bool,
}

impl<B: Backend> Clone for Model<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Model<'_, B> {}

impl<'a, B: Backend> Model<'a, B> {
    /// Nothing is read yet. Weights are read from their files as f32 when they are needed; see [`Model::in_place`].
    pub fn new(source: &'a ModelSource, arch: &'a Architecture, backend: &'a B) -> Self {
        Self { source, arch, backend, held_experts: HELD_EXPERTS, in_place: false }
    }

    /// The same with weights used where they are: f32 and bf16 weights stay in read-only maps of their files, where the
    /// backend computes with them there (the processor does) and the files can be mapped. Loading then takes no time, and a
    /// model no memory but pages of the system's file cache. Results are the same, bit for bit.
    ///
    /// The files must not change while the model is used. If one does, an error says so ([`Model::check_files`]), and on
    /// Unix the first such model of a process sets up a handler of SIGBUS that survives files that get shorter.
    #[must_use]
    pub fn in_place(self) -> Self {
        Self { in_place: self.backend.takes_weights_in_place(), ..self }
    }

    /// Fail when a weight file that is used in place is no longer what it was when the model was opened. Whatever the library
    /// computes from whole models or checks by [`Model::check_layer`] was checked; to be called by who uses the
    /// methods of a [`Layer`] alone, before using what they returned.
    ///
    /// # Errors
    /// [`SourceError::Changed`](crate::source::SourceError::Changed).
    pub fn check_files(&self) -> Result<(), RuntimeError> {
        Ok(self.files().map_or(Ok(()), TensorDirectory::check_in_place)?)
    }

    /// The files, where weights are used in place.
    fn files(&self) -> Option<&'a TensorDirectory> {
        self.in_place.then_some(&self.source.tensors)
    }

    fn loader<'l>(&self, arch: &'l Architecture, layer: usize) -> Loader<'l>
    where
        'a: 'l,
    {
        Loader { source: self.source, arch, layer, in_place: self.in_place }
    }

    /// The same with another limit on the bytes (f32) that the routed experts of a layer may take; beyond it they are read
    /// one by one, as tokens go to them. The default is 2 GiB.
    #[must_use]
    pub fn with_held_experts(self, bytes: u64) -> Self {
        Self { held_experts: bytes, ..self }
    }

    /// The model's shape.
    pub fn architecture(&self) -> &'a Architecture {
        self.arch
    }

    /// Where it computes.
    pub fn backend(&self) -> &'a B {
        self.backend
    }

    /// Rows of the embedding, `[T, D]`. Reads only those rows.
    ///
    /// # Errors
    /// [`RuntimeError::Token`] for an id outside the vocabulary, [`RuntimeError::Source`].
    pub fn embed(&self, tokens: &[u32]) -> Result<Array2<f32>, RuntimeError> {
        let (vocab, d) = (self.arch.vocab, self.arch.hidden);
        let (stored, name) = (&self.source.tensors, &self.arch.names.embed);
        if let Some(info) = stored.get(name)
            && info.shape != [vocab, d]
        {
            return Err(RuntimeError::Shape { role: "embed", expected: vec![vocab, d], found: info.shape.clone() });
        }
        let table = self.embedding()?.zip(stored.get(name));
        let mut out = Array2::zeros((tokens.len(), d));
        for (mut row, &token) in out.rows_mut().into_iter().zip(tokens) {
            let index = token as usize;
            if index >= vocab {
                return Err(RuntimeError::Token { token, vocab });
            }
            let values = match &table {
                Some((bytes, info)) => {
                    let width = bytes.len() / vocab;
                    let bytes = bytes[index * width..][..width].into();
                    TensorView { name, dtype: info.dtype, shape: &info.shape[1..], bytes }.to_f32()
                }
                None => stored.row(name, index)?.to_f32(),
            };
            row.iter_mut().zip(values).for_each(|(x, y)| *x = y);
        }
        let factor = self.arch.multipliers.embedding as f32;
        if factor != 1.0 {
            out *= factor;
        }
        Ok(out)
    }

    /// The embedding in place, where weights are used so and it can be.
    pub(super) fn embedding(&self) -> Result<Option<MappedBytes>, RuntimeError> {
        match self.in_place {
            true => Ok(self.source.tensors.in_place(&self.arch.names.embed, None)?),
            false => Ok(None),
        }
    }

    /// Load one layer for streaming: routed experts that are too large to hold stay in their files until a token goes to
    /// them.
    ///
    /// # Errors
    /// [`RuntimeError::Source`], [`RuntimeError::Shape`].
    pub fn layer(&self, index: usize) -> Result<Layer<'a, B>, RuntimeError> {
        let arch = self.arch;
        let bytes = match &arch.moe {
            // Three matrices of f32 each.
            Some(moe) if arch.is_sparse(index) => {
                (12 * moe.width as u64 * arch.hidden as u64).saturating_mul(moe.experts as u64)
            }
            _ => 0,
        };
        if bytes <= self.held_experts {
            return self.held_layer(index);
        }
        let experts = self.loader(arch, index);
        let loader: ExpertLoader<'a> = Box::new(move |expert| experts.routed_expert(expert));
        let own = arch.at_layer(index);
        let tensors = self.loader(&own, index).layer(false)?;
        Layer::with_loader(self.backend, &own, tensors, Some(loader))
    }

    /// Load one layer whole.
    ///
    /// # Errors
    /// [`RuntimeError::Source`], [`RuntimeError::Shape`].
    pub fn held_layer(&self, index: usize) -> Result<Layer<'a, B>, RuntimeError> {
        let own = self.arch.at_layer(index);
        let tensors = self.loader(&own, index).layer(true)?;
        Layer::with_loader(self.backend, &own, tensors, None)
    }

    /// Load the final norm and the output head.
    ///
    /// # Errors
    /// [`RuntimeError::Source`], [`RuntimeError::Shape`].
    pub fn head(&self) -> Result<Head<'a, B>, RuntimeError> {
        let names = &self.arch.names;
        let name = if self.arch.tied_head { &names.embed } else { &names.head };
        let (shape, part) = ((self.arch.vocab, self.arch.hidden), Part::whole(name.as_str()));
        let weight = load_weight(self.source, "head", &part, shape, self.in_place)?;
        let mut norm = self.source.tensors.view(&names.final_norm)?.to_f32();
        add_offset(self.arch, &mut norm);
        // The head is linear in the normed state, so a factor on logits may as well be in the gain.
        norm.iter_mut().for_each(|g| *g = (f64::from(*g) * self.arch.multipliers.logits) as f32);
        Ok(Head {
            backend: self.backend,
            files: self.files(),
            hidden: self.arch.hidden,
            norm_eps: self.arch.norm_eps,
            norm: vector(self.backend, "final_norm", norm, self.arch.hidden)?,
            weight: Projection::new(self.backend, "head", weight.into(), self.arch.vocab, self.arch.hidden)?,
            softcap: self.arch.logit_softcap,
        })
    }

    /// The residual stream after the last layer, before the final norm, `[T, D]`: windows under each other.
    ///
    /// Streams layer by layer: memory is `T D` floats and one layer. Reports one [`Event::Step`] per layer.
    ///
    /// # Errors
    /// [`RuntimeError::NotFinite`] naming the layer, [`RuntimeError::ContextTooLong`], [`RuntimeError::Token`],
    /// [`RuntimeError::NoTokens`].
    pub fn final_hidden(&self, windows: &[Vec<u32>], observer: &dyn Observer) -> Result<Array2<f32>, RuntimeError> {
        let (mut hidden, lengths) = self.start(windows)?;
        for index in 0..self.arch.layers {
            self.layer(index)?.forward(&mut hidden, &lengths)?;
            self.check_layer(index, hidden.view())?;
            observer.event(Event::Step { done: index as u64 + 1, tokens: hidden.nrows() as u64 });
        }
        Ok(hidden)
    }

    /// Fail when the output of layer `index` is not finite, or was computed from files that changed meanwhile.
    ///
    /// # Errors
    /// [`RuntimeError::NotFinite`] naming the layer; as [`Model::check_files`].
    pub fn check_layer(&self, index: usize, hidden: ArrayView2<'_, f32>) -> Result<(), RuntimeError> {
        self.check_files()?;
        check_finite(hidden, || format!("layer {index}"))
    }

    /// Embed windows and check them: the stream that enters layer 0, and the window lengths.
    ///
    /// # Errors
    /// As [`Model::final_hidden`].
    pub fn start(&self, windows: &[Vec<u32>]) -> Result<(Array2<f32>, Vec<usize>), RuntimeError> {
        let lengths: Vec<usize> = windows.iter().map(Vec::len).collect();
        let length = lengths.iter().copied().max().unwrap_or(0);
        if length == 0 {
            return Err(RuntimeError::NoTokens);
        }
        if length > self.arch.max_position {
            return Err(RuntimeError::ContextTooLong { length, max: self.arch.max_position });
        }
        let hidden = self.embed(&windows.concat())?;
        check_finite(hidden.view(), || "the embedding".into())?;
        Ok((hidden, lengths))
    }
}

/// The final norm and the output head.
pub struct Head<'b, B: Backend> {
    backend: &'b B,
    /// Where weights are used in place.
    files: Option<&'b TensorDirectory>,
    hidden: usize,
    norm_eps: f64,
    norm: B::Tensor,
    weight: Projection<B>,
    softcap: Option<f64>,
}

impl<B: Backend> std::fmt::Debug for Head<'_, B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Head").field("backend", &self.backend.name()).finish()
    }
}

impl<B: Backend> Head<'_, B> {
    /// Logits `[T, V]` of rows of [`Model::final_hidden`]; applies the final norm. Give it some hundred rows at a time.
    ///
    /// # Errors
    /// [`RuntimeError::Width`], [`RuntimeError::NotFinite`]; as [`Model::check_files`].
    pub fn logits(&self, rows: ArrayView2<'_, f32>) -> Result<Array2<f32>, RuntimeError> {
        if rows.ncols() != self.hidden {
            return Err(RuntimeError::Width { expected: self.hidden, found: rows.ncols() });
        }
        let logits = self.backend.download(self.on_device(&self.backend.upload_view(rows))?)?;
        self.files.map_or(Ok(()), TensorDirectory::check_in_place)?;
        check_finite(logits.view(), || "the output head".into())?;
        Ok(logits)
    }

    pub(super) fn on_device(&self, rows: &B::Tensor) -> Result<B::Tensor, RuntimeError> {
        let normed = self.backend.rms_norm(rows, &self.norm, self.norm_eps);
        let logits = self.weight.apply(self.backend, &normed);
        match self.softcap {
            None => Ok(logits),
            Some(cap) => self.backend.softcap(logits, cap),
        }
    }
}

/// Fail where an element is NaN or infinite.
pub(super) fn check_finite(x: ArrayView2<'_, f32>, place: impl Fn() -> String) -> Result<(), RuntimeError> {
    // No early exit within a row, so that it vectorises.
    let bad = |row: ndarray::ArrayView1<'_, f32>| row.iter().fold(false, |bad, x| bad | !x.is_finite());
    if x.rows().into_iter().any(bad) {
        return Err(RuntimeError::NotFinite { place: place() });
    }
    Ok(())
}
