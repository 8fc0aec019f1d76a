//! One decoder layer, fed and read as host arrays.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};

use super::attention::{AttentionBlock, Cache, CompressedPrompt, LatentPath, Step, vector};
use super::feed_forward::{ExpertLoader, FeedForward};
use super::tensors::LayerTensors;
use super::{Backend, Cpu, HeadColumns, HeadPart, HostWeight, Qkv, RawKv, Rotation, RuntimeError, Span};
use crate::arch::{Architecture, Rope};

/// Tokens that are worked on at once: bounds the MLP's intermediate and the expanded keys and values.
pub(crate) const CHUNK: usize = 4096;

/// The MLP of a layer with what passed through it.
#[derive(Debug, Clone, PartialEq)]
pub struct MlpTrace {
    /// Normed input, `[T, D]`.
    pub input: Array2<f32>,
    /// `act(gate) * up` (or `act(up)`), `[T, I]`: the input of `down`. `[T, 0]` in a layer of experts.
    pub activated: Array2<f32>,
    /// Output, `[T, D]`, to be added to the hidden state.
    pub output: Array2<f32>,
}

/// One decoder layer on a backend.
///
/// Methods take activations `[T, D]` of windows that lie under each other, with their lengths in `windows`.
pub struct Layer<'b, B: Backend> {
    pub(super) backend: &'b B,
    hidden: usize,
    norm_eps: f64,
    rope: Rope,
    input_norm: Option<B::Tensor>,
    pub(super) attention: AttentionBlock<B>,
    attention_out_norm: Option<B::Tensor>,
    post_norm: Option<B::Tensor>,
    mlp: FeedForward<'b, B>,
    mlp_out_norm: Option<B::Tensor>,
}

impl<B: Backend> std::fmt::Debug for Layer<'_, B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layer").field("backend", &self.backend.name()).field("hidden", &self.hidden).finish()
    }
}

impl<'b, B: Backend> Layer<'b, B> {
    /// Put weights on a backend. Geometry, RoPE and epsilons come from `arch`; its tensor names are not used.
    ///
    /// # Errors
    /// [`RuntimeError::Shape`] or [`RuntimeError::Variant`] when weights and architecture disagree.
    pub fn new(backend: &'b B, arch: &Architecture, tensors: LayerTensors) -> Result<Self, RuntimeError> {
        Self::with_loader(backend, arch, tensors.map(HostWeight::from), None)
    }

    /// As [`Layer::new`]; with a `loader`, the routed experts are read through it whenever tokens go to them.
    pub(super) fn with_loader(
        backend: &'b B,
        arch: &Architecture,
        tensors: LayerTensors<HostWeight>,
        loader: Option<ExpertLoader<'b>>,
    ) -> Result<Self, RuntimeError> {
        let d = arch.hidden;
        let norm = |role: &'static str, gain: Option<Vec<f32>>| match gain {
            None => Ok(None),
            Some(gain) => vector(backend, role, gain, d).map(Some),
        };
        let some = |gain: Vec<f32>| (!gain.is_empty()).then_some(gain);
        let attention = AttentionBlock::new(backend, arch, tensors.attention, &tensors.extras)?;
        Ok(Self {
            backend,
            hidden: d,
            norm_eps: arch.norm_eps,
            rope: arch.rope.clone(),
            input_norm: norm("input_norm", some(tensors.input_norm))?,
            attention,
            attention_out_norm: norm("attention_out_norm", tensors.extras.attention_out_norm)?,
            post_norm: norm("post_norm", some(tensors.post_norm))?,
            mlp: FeedForward::new(backend, arch, tensors.mlp, loader)?,
            mlp_out_norm: norm("mlp_out_norm", tensors.extras.mlp_out_norm)?,
        })
    }

    /// The attention's input: RMSNorm of `hidden [T, D]`, or itself where the family norms only what comes out.
    ///
    /// # Errors
    /// [`RuntimeError::Width`]; [`RuntimeError::Device`] as in every method here.
    pub fn attention_input(&self, hidden: ArrayView2<'_, f32>) -> Result<Array2<f32>, RuntimeError> {
        self.check(hidden, self.hidden, None)?;
        if self.input_norm.is_none() {
            return Ok(hidden.to_owned());
        }
        self.by_rows(hidden, |x| Ok(self.normed(x, &self.input_norm)))
    }

    /// Attention of `x [T, D]` ([`Layer::attention_input`]) with the output projection: `[T, D]`, to be added to the
    /// hidden state by [`Layer::add_attention`].
    ///
    /// # Errors
    /// [`RuntimeError::Width`], [`RuntimeError::Windows`].
    pub fn attention_output(&self, x: ArrayView2<'_, f32>, windows: &[usize]) -> Result<Array2<f32>, RuntimeError> {
        self.check(x, self.hidden, Some(windows))?;
        self.by_windows(x, windows, |x, windows| Ok(self.attention.output(self.backend, &self.heads(&x, windows)?)))
    }

    /// Add an attention output to the hidden state, through the norm that some families put between.
    ///
    /// # Errors
    /// [`RuntimeError::Width`].
    pub fn add_attention(&self, hidden: &mut Array2<f32>, output: ArrayView2<'_, f32>) -> Result<(), RuntimeError> {
        self.check(output, self.hidden, None)?;
        match &self.attention_out_norm {
            None => add(hidden.view_mut(), output),
            Some(_) => {
                let output = self.by_rows(output, |x| Ok(self.normed(x, &self.attention_out_norm)))?;
                add(hidden.view_mut(), output.view());
            }
        }
        Ok(())
    }

    /// Head outputs before the output projection, `[T, H d_V]`.
    ///
    /// # Errors
    /// As [`Layer::attention_output`].
    pub fn attention_heads(&self, x: ArrayView2<'_, f32>, windows: &[usize]) -> Result<Array2<f32>, RuntimeError> {
        self.check(x, self.hidden, Some(windows))?;
        self.by_windows(x, windows, |x, windows| self.heads(&x, windows))
    }

    /// The output projection of head outputs `[T, H d_V]`, bias included: `[T, D]`.
    ///
    /// # Errors
    /// [`RuntimeError::Width`].
    pub fn output_projection(&self, heads: ArrayView2<'_, f32>) -> Result<Array2<f32>, RuntimeError> {
        self.check(heads, self.attention.heads_width(), None)?;
        self.by_rows(heads, |x| Ok(self.attention.output(self.backend, &x)))
    }

    /// Queries, keys and values after RoPE, for statistics. Not chunked: holds all `T` rows.
    ///
    /// # Errors
    /// As [`Layer::attention_output`].
    pub fn project_qkv(&self, x: ArrayView2<'_, f32>, windows: &[usize]) -> Result<Qkv, RuntimeError> {
        self.check(x, self.hidden, Some(windows))?;
        let b = self.backend;
        let (rotation, positions) = self.rotation(windows);
        let all = self.attention.expand(b, &b.upload_view(x), &rotation, &positions)?;
        let shape = all.shape;
        let dense = shape.values == HeadColumns::dense(shape.values.width);
        let v = match dense {
            true => all.v,
            false => b.gather_heads(&[HeadPart { from: &all.v, columns: shape.values }], shape.kv_heads),
        };
        Ok(Qkv {
            q: b.download(all.q)?,
            k: b.download(all.k)?,
            v: b.download(v)?,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            qk_dim: shape.keys.width,
            v_dim: shape.values.width,
            scale: shape.scale,
            sliding_window: shape.sliding_window,
            score_softcap: self.attention.cap(),
        })
    }

    /// Keys and values before RoPE, or latents before their norm, of `x [T, D]` ([`Layer::attention_input`]). Not chunked:
    /// holds all `T` rows.
    ///
    /// # Errors
    /// [`RuntimeError::Width`].
    pub fn raw_kv(&self, x: ArrayView2<'_, f32>) -> Result<RawKv, RuntimeError> {
        self.check(x, self.hidden, None)?;
        self.attention.raw(self.backend, &self.backend.upload_view(x))
    }

    /// What MLA caches for `x [T, D]` ([`Layer::attention_input`]): `[T, r + d_R]`, the normed latent times its gain, then
    /// the rotated shared key. Not chunked.
    ///
    /// # Errors
    /// As [`Layer::attention_output`]; [`RuntimeError::Variant`] for a GQA layer.
    pub fn latents(&self, x: ArrayView2<'_, f32>, windows: &[usize]) -> Result<Array2<f32>, RuntimeError> {
        self.check(x, self.hidden, Some(windows))?;
        let (rotation, positions) = self.rotation(windows);
        self.backend.download(self.attention.latents(
            self.backend,
            &self.backend.upload_view(x),
            &rotation,
            &positions,
        )?)
    }

    /// Norm and MLP of the hidden state after attention: `[T, D]`, to be added to it.
    ///
    /// # Errors
    /// [`RuntimeError::Width`].
    pub fn mlp_output(&self, hidden: ArrayView2<'_, f32>) -> Result<Array2<f32>, RuntimeError> {
        self.check(hidden, self.hidden, None)?;
        self.by_rows(hidden, |x| self.mlp(&x))
    }

    /// Add [`Layer::mlp_output`] of the hidden state to it.
    ///
    /// # Errors
    /// [`RuntimeError::Width`].
    pub fn add_mlp(&self, hidden: &mut Array2<f32>) -> Result<(), RuntimeError> {
        self.check(hidden.view(), self.hidden, None)?;
        for rows in hidden.axis_chunks_iter_mut(Axis(0), CHUNK) {
            let output = self.backend.download(self.mlp(&self.backend.upload_view(rows.view()))?)?;
            add(rows, output.view());
        }
        Ok(())
    }

    /// As [`Layer::mlp_output`], with the normed input and the activated intermediate. Holds all `T` rows of both.
    ///
    /// # Errors
    /// [`RuntimeError::Width`].
    pub fn mlp_trace(&self, hidden: ArrayView2<'_, f32>) -> Result<MlpTrace, RuntimeError> {
        self.check(hidden, self.hidden, None)?;
        let b = self.backend;
        let input = self.normed(b.upload_view(hidden), &self.post_norm);
        let (activated, output) = match &self.mlp {
            FeedForward::Dense(mlp) => {
                let activated = mlp.activated(b, &input)?;
                let output = mlp.down.apply(b, &activated);
                (b.download(activated)?, output)
            }
            FeedForward::Experts(_) => (Array2::zeros((hidden.nrows(), 0)), self.mlp.apply(b, &input)?),
        };
        let output = b.download(self.normed(output, &self.mlp_out_norm))?;
        Ok(MlpTrace { input: b.download(input)?, activated, output })
    }

    /// The whole layer in place: `hidden [T, D]`.
    ///
    /// # Errors
    /// [`RuntimeError::Width`], [`RuntimeError::Windows`].
    pub fn forward(&self, hidden: &mut Array2<f32>, windows: &[usize]) -> Result<(), RuntimeError> {
        self.check(hidden.view(), self.hidden, Some(windows))?;
        let b = self.backend;
        let mut first = 0;
        for windows in groups(windows, &self.rope) {
            let rows = windows.iter().sum::<usize>();
            let mut part = hidden.slice_mut(s![first..first + rows, ..]);
            let mut x = b.upload_view(part.view());
            let heads = self.behind_norm(&x, &self.input_norm, |x| self.heads(x, windows))?;
            self.add_output(&mut x, self.attention.output(b, &heads));
            // Groups of windows may exceed CHUNK when a single window does.
            if rows <= CHUNK {
                let out = self.mlp(&x)?;
                b.add(&mut x, &out);
                part.assign(&b.download(x)?);
            } else {
                let x = b.download(x)?;
                part.assign(&x);
                part += &self.mlp_output(x.view())?;
            }
            first += rows;
        }
        Ok(())
    }

    /// The whole layer in place on one window `[T, D]`, token by token over a cache, as decoding does.
    ///
    /// # Errors
    /// [`RuntimeError::Width`].
    pub fn forward_cached(&self, hidden: &mut Array2<f32>) -> Result<(), RuntimeError> {
        self.check(hidden.view(), self.hidden, None)?;
        let mut cache = self.cache(hidden.nrows());
        for t in 0..hidden.nrows() {
            let rotation = Rotation::for_length(&self.rope, t..t + 1, hidden.nrows());
            let spans = [Span { queries: 0..1, keys: 0..t + 1 }];
            let step =
                Step { rotation: &rotation, positions: &[t], slots: &[t], spans: &spans, path: LatentPath::Absorbed };
            let mut x = self.backend.upload_view(hidden.slice(s![t..t + 1, ..]));
            self.decode(&mut x, &mut cache, &step)?;
            hidden.slice_mut(s![t..t + 1, ..]).assign(&self.backend.download(x)?);
        }
        Ok(())
    }

    /// An empty cache for `capacity` positions.
    pub(super) fn cache(&self, capacity: usize) -> Cache<B::Tensor> {
        self.attention.cache(self.backend, capacity)
    }

    /// Bytes of an exact cache for `tokens` positions: allocated, measured and dropped.
    pub(crate) fn cache_bytes(&self, tokens: usize) -> usize {
        self.cache(tokens).bytes(self.backend)
    }

    /// Rotary embedding of this layer.
    pub(super) fn rope(&self) -> &Rope {
        &self.rope
    }

    /// The whole layer on new rows of a session, in place on the device.
    pub(super) fn decode(
        &self,
        x: &mut B::Tensor,
        cache: &mut Cache<B::Tensor>,
        step: &Step<'_>,
    ) -> Result<(), RuntimeError> {
        let b = self.backend;
        let heads = self.behind_norm(x, &self.input_norm, |x| self.attention.decode(b, x, cache, step))?;
        self.add_output(x, self.attention.output(b, &heads));
        let out = self.mlp(x)?;
        b.add(x, &out);
        Ok(())
    }

    fn heads(&self, x: &B::Tensor, windows: &[usize]) -> Result<B::Tensor, RuntimeError> {
        let (rotation, positions) = self.rotation(windows);
        let all = self.attention.expand(self.backend, x, &rotation, &positions)?;
        self.attention.attend(self.backend, &all, &Span::of_windows(windows))
    }

    fn add_output(&self, x: &mut B::Tensor, output: B::Tensor) {
        self.backend.add(x, &self.normed(output, &self.attention_out_norm));
    }

    /// RMSNorm where there is a gain; `x` itself where there is none.
    fn normed(&self, x: B::Tensor, gain: &Option<B::Tensor>) -> B::Tensor {
        match gain {
            Some(gain) => self.backend.rms_norm(&x, gain, self.norm_eps),
            None => x,
        }
    }

    /// What `f` makes of `x` after a norm, where there is a gain, or of `x` itself.
    fn behind_norm<R>(&self, x: &B::Tensor, gain: &Option<B::Tensor>, f: impl FnOnce(&B::Tensor) -> R) -> R {
        match gain {
            Some(gain) => f(&self.backend.rms_norm(x, gain, self.norm_eps)),
            None => f(x),
        }
    }

    fn mlp(&self, x: &B::Tensor) -> Result<B::Tensor, RuntimeError> {
        let out = self.behind_norm(x, &self.post_norm, |x| self.mlp.apply(self.backend, x))?;
        Ok(self.normed(out, &self.mlp_out_norm))
    }

    fn rotation(&self, windows: &[usize]) -> (Rotation, Vec<usize>) {
        let longest = windows.iter().copied().max().unwrap_or(0);
        let positions = windows.iter().flat_map(|&n| 0..n).collect();
        (Rotation::new(&self.rope, 0..longest), positions)
    }

    fn check(&self, x: ArrayView2<'_, f32>, width: usize, windows: Option<&[usize]>) -> Result<(), RuntimeError> {
        if x.ncols() != width {
            return Err(RuntimeError::Width { expected: width, found: x.ncols() });
        }
        let total = windows.map_or(x.nrows(), |w| w.iter().sum());
        if total != x.nrows() {
            return Err(RuntimeError::Windows { windows: total, rows: x.nrows() });
        }
        Ok(())
    }

    fn by_rows(
        &self,
        x: ArrayView2<'_, f32>,
        f: impl Fn(B::Tensor) -> Result<B::Tensor, RuntimeError>,
    ) -> Result<Array2<f32>, RuntimeError> {
        let chunk = |x| self.backend.download(f(self.backend.upload_view(x))?);
        join(x.axis_chunks_iter(Axis(0), CHUNK).map(chunk).collect::<Result<_, _>>()?)
    }

    fn by_windows(
        &self,
        x: ArrayView2<'_, f32>,
        windows: &[usize],
        f: impl Fn(B::Tensor, &[usize]) -> Result<B::Tensor, RuntimeError>,
    ) -> Result<Array2<f32>, RuntimeError> {
        let mut parts = Vec::new();
        let mut first = 0;
        for group in groups(windows, &self.rope) {
            let rows = group.iter().sum::<usize>();
            let x = self.backend.upload_view(x.slice(s![first..first + rows, ..]));
            parts.push(self.backend.download(f(x, group)?)?);
            first += rows;
        }
        join(parts)
    }
}

impl Layer<'_, Cpu> {
    /// The whole layer in place on rows at `positions` of one sequence, after a compressed prompt; `tail` holds the rows
    /// from there on, and gets the new ones. The rotation covers every position from 0 on.
    pub(super) fn decode_compressed(
        &self,
        x: &mut Array2<f32>,
        prompt: &CompressedPrompt<'_>,
        tail: &mut Cache<Array2<f32>>,
        at: (&Rotation, Range<usize>),
    ) -> Result<(), RuntimeError> {
        let heads = self.behind_norm(x, &self.input_norm, |x| self.attention.decode_compressed(x, prompt, tail, at))?;
        self.add_output(x, self.attention.output(self.backend, &heads));
        let out = self.mlp(x)?;
        self.backend.add(x, &out);
        Ok(())
    }
}

/// Runs of windows of at most [`CHUNK`] tokens together, one window at least, that share their frequencies.
fn groups<'w>(windows: &'w [usize], rope: &Rope) -> Vec<&'w [usize]> {
    let mut out = Vec::new();
    let (mut first, mut tokens) = (0, 0);
    let long = |length: usize| rope.long.as_ref().is_some_and(|l| length > l.original);
    for (i, &length) in windows.iter().enumerate() {
        if i > first && (tokens + length > CHUNK || long(length) != long(windows[first])) {
            out.push(&windows[first..i]);
            (first, tokens) = (i, 0);
        }
        tokens += length;
    }
    if first < windows.len() {
        out.push(&windows[first..]);
    }
    out
}

fn join(mut parts: Vec<Array2<f32>>) -> Result<Array2<f32>, RuntimeError> {
    if parts.len() == 1 {
        return Ok(parts.remove(0));
    }
    let columns = parts.first().ok_or(RuntimeError::NoTokens)?.ncols();
    let mut out = Array2::zeros((parts.iter().map(Array2::nrows).sum(), columns));
    let mut rest = out.view_mut();
    for part in parts {
        let (to, tail) = rest.split_at(Axis(0), part.nrows());
        ndarray::Zip::from(to).and(&part).par_for_each(|to, from| *to = *from);
        rest = tail;
    }
    Ok(out)
}

/// `to += from`, on all threads.
fn add(to: ArrayViewMut2<'_, f32>, from: ArrayView2<'_, f32>) {
    ndarray::Zip::from(to).and(from).par_for_each(|to, from| *to += from);
}
