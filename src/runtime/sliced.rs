//! A decoder layer run by `T` ranks that share its latent out: prompts whole, later tokens sliced.

use ndarray::{Array2, ArrayView2, Axis, s};

use super::attention::{RankTensors, Ranks};
use super::{Backend, Layer, Rotation, RuntimeError, Span};

impl<B: Backend> Layer<'_, B> {
    /// Put the ranks of this layer on its backend. With `shared_rms` every rank norms its slice by the whole latent's root
    /// mean square, else by the slice's own.
    ///
    /// # Errors
    /// [`RuntimeError::Shape`] for weights of another width, [`RuntimeError::Variant`] for a GQA layer.
    pub fn ranks(&self, tensors: Vec<RankTensors>, shared_rms: bool) -> Result<Ranks<B>, RuntimeError> {
        self.attention.ranks(self.backend, tensors, shared_rms)
    }

    /// The whole layer in place: `hidden [T, D]`. In each window the first `prefill` tokens attend as the layer does, those
    /// after them as the ranks decode, one softmax per rank over everything before. With the hidden states of a decoded
    /// text this is what decoding it token by token computes, all tokens at once ([`Layer::decode_sliced`]).
    ///
    /// # Errors
    /// As [`Layer::forward`]; [`RuntimeError::Variant`] for a GQA layer.
    pub fn forward_sliced(
        &self,
        hidden: &mut Array2<f32>,
        windows: &[usize],
        prefill: usize,
        ranks: &Ranks<B>,
    ) -> Result<(), RuntimeError> {
        let x = self.attention_input(hidden.view())?;
        let mut heads = Array2::zeros((x.nrows(), self.attention.heads_width()));
        let mut first = 0;
        for length in windows {
            // One window at a time: nothing is shared between them but weights.
            let rows = first..first + length;
            let of = self.sliced_heads(x.slice(s![rows.clone(), ..]), prefill, ranks)?;
            heads.slice_mut(s![rows.clone(), ..]).assign(&of);
            first = rows.end;
        }
        let output = self.output_projection(heads.view())?;
        self.add_attention(hidden, output.view())?;
        *hidden += &self.mlp_output(hidden.view())?;
        Ok(())
    }

    /// What each rank pools for the tokens after the prompt of one window, `hidden [T, D]`: `[T - prefill, H r / T]` per rank, head
    /// by head. The ranks' values of it, summed, are the head outputs of [`Layer::forward_sliced`].
    ///
    /// # Errors
    /// As [`Layer::forward_sliced`].
    pub fn pooled_sliced(
        &self,
        hidden: ArrayView2<'_, f32>,
        prefill: usize,
        ranks: &Ranks<B>,
    ) -> Result<Vec<Array2<f32>>, RuntimeError> {
        let (b, x) = (self.backend, self.attention_input(hidden)?);
        let (length, prompt) = (x.nrows(), prefill.min(x.nrows()));
        let rotation = Rotation::new(self.rope(), 0..length);
        let positions: Vec<usize> = (0..length).collect();
        let all = self.attention.latent_rows(b, &b.upload(x), &rotation, &positions, ranks)?;
        let caches = self.attention.sliced_rows(b, &all, ranks)?;
        let spans = [Span { queries: 0..length - prompt, keys: 0..length }];
        let pooled = self.attention.pool_sliced(b, &all, &positions[prompt..], &caches, ranks, &spans)?;
        pooled.into_iter().map(|p| b.download(p)).collect()
    }

    /// Head outputs of one window `x [T, D]`.
    fn sliced_heads(
        &self,
        x: ArrayView2<'_, f32>,
        prefill: usize,
        ranks: &Ranks<B>,
    ) -> Result<Array2<f32>, RuntimeError> {
        let (b, length) = (self.backend, x.nrows());
        let prompt = prefill.min(length);
        let rotation = Rotation::new(self.rope(), 0..length);
        let positions: Vec<usize> = (0..length).collect();
        let all = self.attention.latent_rows(b, &b.upload_view(x), &rotation, &positions, ranks)?;
        let mut parts = Vec::new();
        if prompt > 0 {
            let spans = [Span { queries: 0..prompt, keys: 0..prompt }];
            parts.push(b.download(self.attention.attend_whole(b, &all, &positions[..prompt], &spans)?)?);
        }
        if prompt < length {
            let caches = self.attention.sliced_rows(b, &all, ranks)?;
            let spans = [Span { queries: 0..length - prompt, keys: 0..length }];
            let rows = &positions[prompt..];
            parts.push(b.download(self.attention.attend_sliced(b, &all, rows, &caches, ranks, &spans)?)?);
        }
        let views: Vec<_> = parts.iter().map(|p| p.view()).collect();
        ndarray::concatenate(Axis(0), &views).map_err(|_| RuntimeError::NoTokens)
    }

    /// The whole layer in place on one window `[T, D]`, as ranks decode it: `prefill` tokens at once, the rest one by one
    /// over a cache per rank. Returns the bytes allocated for one rank's cache.
    ///
    /// # Errors
    /// As [`Layer::forward_sliced`].
    pub fn decode_sliced(
        &self,
        hidden: &mut Array2<f32>,
        prefill: usize,
        ranks: &Ranks<B>,
    ) -> Result<usize, RuntimeError> {
        let (b, length) = (self.backend, hidden.nrows());
        let prompt = prefill.min(length);
        let mut caches: Vec<B::Tensor> = Vec::new();
        let mut first = 0;
        while first < length {
            let rows = if first < prompt { 0..prompt } else { first..first + 1 };
            let mut part = hidden.slice(s![rows.clone(), ..]).to_owned();
            let x = b.upload(self.attention_input(part.view())?);
            let rotation = Rotation::for_length(self.rope(), rows.clone(), length);
            let positions: Vec<usize> = rows.clone().collect();
            let all = self.attention.latent_rows(b, &x, &rotation, &positions, ranks)?;
            let new = self.attention.sliced_rows(b, &all, ranks)?;
            if caches.is_empty() {
                caches = new.iter().map(|rows| b.zeros(length, b.shape(rows).1)).collect();
            }
            for (cache, new) in caches.iter_mut().zip(&new) {
                b.write_rows(cache, &positions, new);
            }
            let own: Vec<usize> = (0..positions.len()).collect();
            let heads = if first < prompt {
                self.attention.attend_whole(b, &all, &own, &[Span { queries: rows.clone(), keys: rows.clone() }])?
            } else {
                let spans = [Span { queries: 0..1, keys: 0..rows.end }];
                self.attention.attend_sliced(b, &all, &own, &caches, ranks, &spans)?
            };
            let output = self.output_projection(b.download(heads)?.view())?;
            self.add_attention(&mut part, output.view())?;
            part += &self.mlp_output(part.view())?;
            hidden.slice_mut(s![rows.clone(), ..]).assign(&part);
            first = rows.end;
        }
        Ok(caches.first().map_or(0, |c| {
            let (rows, columns) = b.shape(c);
            rows * columns * size_of::<f32>()
        }))
    }
}
