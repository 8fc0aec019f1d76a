//! The operations a device has to offer.

use std::ops::Range;

use ndarray::{Array2, ArrayView2};

use super::{Cpu, HostWeight, Rotation, RuntimeError};
use crate::arch::Activation;

/// Up to this many rows, gathering them one by one on a device beats the way to the host and back.
const FEW_ROWS: usize = 16;

/// Columns of a matrix that belong to heads: head `h` owns columns `start + h stride .. start + h stride + width`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadColumns {
    /// First column of head 0.
    pub start: usize,
    /// Distance between heads; 0 when all heads share the columns.
    pub stride: usize,
    /// Columns per head.
    pub width: usize,
}

impl HeadColumns {
    /// Heads that lie side by side from column 0.
    pub fn dense(width: usize) -> Self {
        Self { start: 0, stride: width, width }
    }

    /// Columns of head `h`.
    pub fn of(&self, h: usize) -> Range<usize> {
        let first = self.start + h * self.stride;
        first..first + self.width
    }
}

/// A piece of every head, for [`Backend::gather_heads`].
#[derive(Debug)]
pub struct HeadPart<'a, T> {
    /// Where it is read from, `[T, columns]`.
    pub from: &'a T,
    /// Which columns.
    pub columns: HeadColumns,
}

/// A linear layer: its weight `W`, and matrices `T`.
#[derive(Debug)]
pub struct LinearWeights<'a, W, T> {
    /// `[out, in]`.
    pub weight: &'a W,
    /// `[1, out]`.
    pub bias: Option<&'a T>,
}

impl<W, T> LinearWeights<'_, W, T> {
    /// The same on other kinds of weights and matrices.
    pub fn map<'b, V, U>(
        &'b self,
        weight: impl Fn(&'b W) -> &'b V,
        bias: impl Fn(&'b T) -> &'b U,
    ) -> LinearWeights<'b, V, U> {
        LinearWeights { weight: weight(self.weight), bias: self.bias.map(bias) }
    }
}

/// An MLP `down(act(gate x) * up x)`, or `down(act(up x))` without a gate.
#[derive(Debug)]
pub struct MlpWeights<'a, W, T> {
    /// `[I, D]`.
    pub gate: Option<LinearWeights<'a, W, T>>,
    /// `[I, D]`.
    pub up: LinearWeights<'a, W, T>,
    /// `[D, I]`.
    pub down: LinearWeights<'a, W, T>,
    /// `act`.
    pub activation: Activation,
}

/// Geometry of one attention call. Query head `h` reads KV head `h / (heads / kv_heads)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads; queries lie side by side, `[rows, heads * keys.width]`.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Columns of the key of each KV head.
    pub keys: HeadColumns,
    /// Columns of the value of each KV head. May overlap the keys: absorbed MLA reads both from the latent.
    pub values: HeadColumns,
    /// What multiplies `<q, k>`.
    pub scale: f64,
    /// Query at position `i` sees keys `i - sliding_window + 1 ..= i`, where given.
    pub sliding_window: Option<usize>,
}

/// Rows of one sequence. The last query stands at the last key: query `i` of `n` sees the first
/// `keys.len() - n + i + 1` keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Rows of the queries.
    pub queries: Range<usize>,
    /// Rows of the keys and values.
    pub keys: Range<usize>,
}

impl Span {
    /// Spans of windows that lie under each other and attend to themselves.
    pub fn of_windows(windows: &[usize]) -> Vec<Span> {
        let mut first = 0;
        let span = |&length: &usize| {
            let rows = first..first + length;
            first += length;
            Span { queries: rows.clone(), keys: rows }
        };
        windows.iter().map(span).collect()
    }
}

/// [`Backend::absorb`] by the operations that every device has.
pub(super) fn absorb_in_steps<B: Backend + ?Sized>(
    b: &B,
    x: &B::Tensor,
    weight: &B::Weight,
    of: HeadColumns,
    heads: usize,
) -> B::Tensor {
    let (each, r) = (b.shape(x).1 / heads, b.weight_shape(weight).1);
    let plain = HeadColumns { start: 0, stride: each, width: of.width };
    let tail = HeadColumns { start: of.width, stride: each, width: each - of.width };
    let absorbed = match of.width == each {
        true => b.head_linear(x, weight, of, heads, true),
        false => {
            let plain = b.gather_heads(&[HeadPart { from: x, columns: plain }], heads);
            b.head_linear(&plain, weight, of, heads, true)
        }
    };
    let parts = [HeadPart { from: &absorbed, columns: HeadColumns::dense(r) }, HeadPart { from: x, columns: tail }];
    b.gather_heads(&parts, heads)
}

/// [`Backend::mlp`] by the operations that every device has.
pub(super) fn mlp_in_steps<B: Backend + ?Sized>(
    b: &B,
    x: &B::Tensor,
    mlp: &MlpWeights<'_, B::Weight, B::Tensor>,
) -> Result<B::Tensor, RuntimeError> {
    Ok(b.linear(&b.mlp_activated(x, mlp)?, mlp.down.weight, mlp.down.bias))
}

/// A device that holds matrices of f32 and computes on them.
///
/// Matrices are row-major `[rows, columns]`; weights of linear layers are `[out, in]`; vectors are `[1, n]`. Operations
/// may run asynchronously, so failures of the device surface in [`Backend::download`]. Shapes are checked by the callers
/// in this module; a mismatch is a bug and may panic.
pub trait Backend: Sync {
    /// A matrix on the device.
    type Tensor: Send + Sync;

    /// The weight of a linear layer on the device, which may hold it in a narrower dtype that has every value.
    type Weight: Send + Sync;

    /// Name for messages, such as `cpu`.
    fn name(&self) -> &str;

    /// Move a host matrix to the device.
    fn upload(&self, host: Array2<f32>) -> Self::Tensor;

    /// Copy a host matrix to the device.
    fn upload_view(&self, host: ArrayView2<'_, f32>) -> Self::Tensor {
        self.upload(host.to_owned())
    }

    /// Move the weight of a linear layer to the device.
    fn upload_weight(&self, host: HostWeight) -> Self::Weight;

    /// `(out, in)` of a weight.
    fn weight_shape(&self, weight: &Self::Weight) -> (usize, usize);

    /// Whether it computes with weights where they lie in host memory, so that they need not be read before.
    fn takes_weights_in_place(&self) -> bool {
        false
    }

    /// Move a matrix back to the host.
    ///
    /// # Errors
    /// [`RuntimeError::Device`] when this or an earlier operation failed.
    fn download(&self, tensor: Self::Tensor) -> Result<Array2<f32>, RuntimeError>;

    /// `(rows, columns)`.
    fn shape(&self, tensor: &Self::Tensor) -> (usize, usize);

    /// A matrix of zeros.
    fn zeros(&self, rows: usize, columns: usize) -> Self::Tensor;

    /// Overwrite row `to[i]` of `into` by row `i` of `rows`.
    fn write_rows(&self, into: &mut Self::Tensor, to: &[usize], rows: &Self::Tensor);

    /// Rows of a matrix.
    fn rows(&self, x: &Self::Tensor, rows: Range<usize>) -> Self::Tensor;

    /// `x W^T + bias`: `x [T, in]`, `weight [out, in]`, `bias [1, out]` to `[T, out]`.
    fn linear(&self, x: &Self::Tensor, weight: &Self::Weight, bias: Option<&Self::Tensor>) -> Self::Tensor;

    /// A small linear layer per head, its weight being rows `of(h)` of `weight [rows, r]`.
    ///
    /// `absorb` false: `x [T, heads r]` to `[T, heads width]`, each head by `W_h^T`. True: `x [T, heads width]` to
    /// `[T, heads r]`, each head by `W_h`.
    fn head_linear(
        &self,
        x: &Self::Tensor,
        weight: &Self::Weight,
        of: HeadColumns,
        heads: usize,
        absorb: bool,
    ) -> Self::Tensor;

    /// Queries for a latent: the first `of.width` columns of each head of `x [T, heads (width + tail)]` by `W_h`, rows `of(h)`
    /// of `weight [rows, r]`, with the head's other columns after them: `[T, heads (r + tail)]`.
    fn absorb(&self, x: &Self::Tensor, weight: &Self::Weight, of: HeadColumns, heads: usize) -> Self::Tensor {
        absorb_in_steps(self, x, weight, of, heads)
    }

    /// `x / sqrt(mean(x^2) + eps) * gain` per row; `gain [1, columns]`.
    fn rms_norm(&self, x: &Self::Tensor, gain: &Self::Tensor, eps: f64) -> Self::Tensor;

    /// Turn the given columns of each head in place. Row `t` stands at `positions[t]`.
    fn rope(&self, x: &mut Self::Tensor, rotation: &Rotation, positions: &[usize], columns: HeadColumns, heads: usize);

    /// New matrix `[T, heads * sum of widths]` with the parts of each head side by side.
    fn gather_heads(&self, parts: &[HeadPart<'_, Self::Tensor>], heads: usize) -> Self::Tensor;

    /// Causal softmax attention within each span, `[rows of q, heads * values.width]`. Memory beyond the result is
    /// bounded by tiles of scores, never all of them.
    fn attention(
        &self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        shape: &AttentionShape,
        spans: &[Span],
    ) -> Self::Tensor;

    /// `silu(gate) * up`, element by element.
    fn silu_mul(&self, gate: Self::Tensor, up: &Self::Tensor) -> Self::Tensor;

    /// `x += y`.
    fn add(&self, x: &mut Self::Tensor, y: &Self::Tensor);

    /// A whole MLP of `x [T, D]`.
    ///
    /// # Errors
    /// As [`Backend::download`].
    fn mlp(
        &self,
        x: &Self::Tensor,
        mlp: &MlpWeights<'_, Self::Weight, Self::Tensor>,
    ) -> Result<Self::Tensor, RuntimeError> {
        mlp_in_steps(self, x, mlp)
    }

    /// What `down` of an MLP gets, `act(gate x) * up x` or `act(up x)`, `[T, I]`.
    ///
    /// # Errors
    /// As [`Backend::download`].
    fn mlp_activated(
        &self,
        x: &Self::Tensor,
        mlp: &MlpWeights<'_, Self::Weight, Self::Tensor>,
    ) -> Result<Self::Tensor, RuntimeError> {
        let up = self.linear(x, mlp.up.weight, mlp.up.bias);
        match &mlp.gate {
            Some(gate) => self.gated(self.linear(x, gate.weight, gate.bias), &up, mlp.activation),
            None => self.activated(up, mlp.activation),
        }
    }

    // What only some families need. A device that does not offer these computes them on the host.

    /// A copy of a matrix on the host.
    ///
    /// # Errors
    /// As [`Backend::download`].
    fn copy_to_host(&self, x: &Self::Tensor) -> Result<Array2<f32>, RuntimeError> {
        self.download(self.rows(x, 0..self.shape(x).0))
    }

    /// `act(gate) * up`, element by element.
    ///
    /// # Errors
    /// As [`Backend::download`].
    fn gated(
        &self,
        gate: Self::Tensor,
        up: &Self::Tensor,
        activation: Activation,
    ) -> Result<Self::Tensor, RuntimeError> {
        if activation == Activation::Silu {
            return Ok(self.silu_mul(gate, up));
        }
        Ok(self.upload(Cpu.gated(self.download(gate)?, &self.copy_to_host(up)?, activation)?))
    }

    /// `act(x)`, element by element.
    ///
    /// # Errors
    /// As [`Backend::download`].
    fn activated(&self, x: Self::Tensor, activation: Activation) -> Result<Self::Tensor, RuntimeError> {
        Ok(self.upload(Cpu.activated(self.download(x)?, activation)?))
    }

    /// RMSNorm of the given columns of each head by itself, in place; `gain [1, width]` serves all heads.
    ///
    /// # Errors
    /// As [`Backend::download`].
    fn rms_norm_heads(
        &self,
        x: &mut Self::Tensor,
        gain: &Self::Tensor,
        eps: f64,
        columns: HeadColumns,
        heads: usize,
    ) -> Result<(), RuntimeError> {
        let mut host = self.copy_to_host(x)?;
        Cpu.rms_norm_heads(&mut host, &self.copy_to_host(gain)?, eps, columns, heads)?;
        *x = self.upload(host);
        Ok(())
    }

    /// [`Backend::attention`] with capped scores, `cap tanh(scale <q, k> / cap)`.
    ///
    /// # Errors
    /// As [`Backend::download`].
    fn capped_attention(
        &self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        shape: &AttentionShape,
        cap: f64,
        spans: &[Span],
    ) -> Result<Self::Tensor, RuntimeError> {
        let (q, k, v) = (self.copy_to_host(q)?, self.copy_to_host(k)?, self.copy_to_host(v)?);
        Ok(self.upload(Cpu.capped_attention(&q, &k, &v, shape, cap, spans)?))
    }

    /// `cap tanh(x / cap)`, element by element.
    ///
    /// # Errors
    /// As [`Backend::download`].
    fn softcap(&self, x: Self::Tensor, cap: f64) -> Result<Self::Tensor, RuntimeError> {
        Ok(self.upload(Cpu.softcap(self.download(x)?, cap)?))
    }

    /// The given rows of `x`, in that order.
    ///
    /// # Errors
    /// As [`Backend::download`].
    fn gather_rows(&self, x: &Self::Tensor, rows: &[usize]) -> Result<Self::Tensor, RuntimeError> {
        if rows.len() > FEW_ROWS {
            return Ok(self.upload(self.copy_to_host(x)?.select(ndarray::Axis(0), rows)));
        }
        let mut out = self.zeros(rows.len(), self.shape(x).1);
        for (to, &from) in rows.iter().enumerate() {
            self.write_rows(&mut out, &[to], &self.rows(x, from..from + 1));
        }
        Ok(out)
    }

    /// `into[rows[i]] += weights[i] * y[i]`; a row may occur once.
    ///
    /// # Errors
    /// As [`Backend::download`].
    fn scatter_add_rows(
        &self,
        into: &mut Self::Tensor,
        rows: &[usize],
        weights: &[f32],
        y: &Self::Tensor,
    ) -> Result<(), RuntimeError> {
        let mut host = self.copy_to_host(into)?;
        Cpu.scatter_add_rows(&mut host, rows, weights, &self.copy_to_host(y)?)?;
        *into = self.upload(host);
        Ok(())
    }
}
