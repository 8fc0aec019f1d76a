//! The weights of one student layer by role, and what is in the same shape: gradients, moments, averages.

use std::ops::{Index, IndexMut};

use ndarray::{Array2, Axis};

use crate::arch::MlaShape;
use crate::gradient::Real;
use crate::runtime::{
    AttentionTensors, FeedForwardTensors, LayerTensors, Linear, MlaTensors, MlpTensors, QueryTensors, RuntimeError,
};

/// What a tensor of a layer is. Rows of queries and of `kv_b_proj` are kept by what they are for, heads one after the other:
/// their sizes differ, and so do the steps they take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    /// `q_a_proj`, `[r_q, D]`.
    QueryDown,
    QueryDownBias,
    /// Gain of the query latent's norm, `[1, r_q]`.
    QueryGain,
    /// `[H d_N, D or r_q]`.
    QueryNope,
    QueryNopeBias,
    /// `[H d_R, D or r_q]`.
    QueryRope,
    QueryRopeBias,
    /// Rows of the latent, `[r, D]`.
    Latent,
    LatentBias,
    /// Gain of the latent's norm, `[1, r]`.
    LatentGain,
    /// Rows of the rotated key, `[d_R, D]`.
    KeyRope,
    KeyRopeBias,
    /// `[H d_N, r]`.
    KeyUp,
    /// `[H d_V, r]`.
    ValueUp,
    /// `[D, H d_V]`.
    Output,
    OutputBias,
    /// Gains of the norms on the residual stream and behind what is added to it, `[1, D]`, offsets included.
    InputGain,
    AttentionOutGain,
    PostGain,
    MlpOutGain,
    /// `[I, D]`.
    Gate,
    GateBias,
    /// `[I, D]`.
    Up,
    UpBias,
    /// `[D, I]`.
    Down,
    DownBias,
    /// Gain of the norm after the last layer, `[1, D]`: the only tensor there.
    FinalGain,
}

impl Role {
    /// Every role, in order.
    pub const ALL: [Role; COUNT] = {
        use Role::*;
        [
            QueryDown,
            QueryDownBias,
            QueryGain,
            QueryNope,
            QueryNopeBias,
            QueryRope,
            QueryRopeBias,
            Latent,
            LatentBias,
            LatentGain,
            KeyRope,
            KeyRopeBias,
            KeyUp,
            ValueUp,
            Output,
            OutputBias,
            InputGain,
            AttentionOutGain,
            PostGain,
            MlpOutGain,
            Gate,
            GateBias,
            Up,
            UpBias,
            Down,
            DownBias,
            FinalGain,
        ]
    };

    /// Whether it is a part of the MLP.
    pub fn is_mlp(self) -> bool {
        use Role::*;
        matches!(self, Gate | GateBias | Up | UpBias | Down | DownBias)
    }

    /// Whether it is the gain of a norm.
    pub fn is_gain(self) -> bool {
        use Role::*;
        matches!(self, QueryGain | LatentGain | InputGain | AttentionOutGain | PostGain | MlpOutGain | FinalGain)
    }

    /// Of a bias: the weight beside it.
    pub fn weight_of_bias(self) -> Option<Role> {
        use Role::*;
        Some(match self {
            QueryDownBias => QueryDown,
            QueryNopeBias => QueryNope,
            QueryRopeBias => QueryRope,
            LatentBias => Latent,
            KeyRopeBias => KeyRope,
            OutputBias => Output,
            GateBias => Gate,
            UpBias => Up,
            DownBias => Down,
            _ => return None,
        })
    }
}

/// Number of roles.
pub(super) const COUNT: usize = 27;

/// A tensor for each role, in standard layout; vectors are `[1, n]`. What a layer has not is `[0, 0]`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tensors<T>([Array2<T>; COUNT]);

impl<T> Index<Role> for Tensors<T> {
    type Output = Array2<T>;

    fn index(&self, role: Role) -> &Array2<T> {
        &self.0[role as usize]
    }
}

impl<T> IndexMut<Role> for Tensors<T> {
    fn index_mut(&mut self, role: Role) -> &mut Array2<T> {
        &mut self.0[role as usize]
    }
}

impl<T: Real> Tensors<T> {
    /// Nothing.
    pub fn none() -> Self {
        Self(std::array::from_fn(|_| Array2::zeros((0, 0))))
    }

    /// Zeros in the shapes of `other`.
    pub fn zeros_like(other: &Self) -> Self {
        Self(std::array::from_fn(|i| Array2::zeros(other.0[i].dim())))
    }

    /// Whether there is a tensor of this role.
    pub fn has(&self, role: Role) -> bool {
        !self[role].is_empty()
    }

    /// Only the tensors that `keep` says; the others are taken out of `self`'s copy.
    pub fn only(&self, keep: impl Fn(Role) -> bool) -> Self {
        let one = |i: usize| if keep(Role::ALL[i]) { self.0[i].clone() } else { Array2::zeros((0, 0)) };
        Self(std::array::from_fn(one))
    }

    /// The elements of all tensors, in order.
    pub fn parts(&self) -> impl Iterator<Item = &[T]> {
        self.0.iter().filter_map(|part| part.as_slice())
    }

    /// The same, to write.
    pub fn parts_mut(&mut self) -> impl Iterator<Item = &mut [T]> {
        self.0.iter_mut().filter_map(|part| part.as_slice_mut())
    }
}

/// What a layer computes with: tensors that are trained, and the others.
#[derive(Debug, Clone, Copy)]
pub(super) struct Weights<'a, T> {
    pub trained: &'a Tensors<T>,
    pub frozen: &'a Tensors<T>,
}

impl<'a, T: Real> Weights<'a, T> {
    /// The tensor of a role; empty where there is none.
    pub fn get(&self, role: Role) -> &'a Array2<T> {
        if self.trained.has(role) { &self.trained[role] } else { &self.frozen[role] }
    }

    /// A vector, where there is one.
    pub fn vector(&self, role: Role) -> Option<&'a [T]> {
        self.get(role).as_slice().filter(|v| !v.is_empty())
    }

    /// Whether there is such a tensor.
    pub fn has(&self, role: Role) -> bool {
        !self.get(role).is_empty()
    }
}

/// Rows `first..first + width` of every head of `stride` rows.
fn rows_of(heads: usize, stride: usize, first: usize, width: usize) -> Vec<usize> {
    (0..heads).flat_map(|h| h * stride + first..h * stride + first + width).collect()
}

fn vector(values: Vec<f32>) -> Array2<f32> {
    let n = values.len();
    if n == 0 { Array2::zeros((0, 0)) } else { Array2::from_shape_fn((1, n), |(_, i)| values[i]) }
}

/// Rows of the two kinds that a matrix holds head by head.
#[derive(Debug, Clone, Copy)]
pub(super) struct ByHead {
    heads: usize,
    first: usize,
    second: usize,
}

impl ByHead {
    /// Of queries: `[nope | rope]`.
    pub fn queries(heads: usize, shape: &MlaShape) -> Self {
        Self { heads, first: shape.qk_nope_head_dim, second: shape.qk_rope_head_dim }
    }

    /// Of `kv_b_proj`: `[key | value]`.
    pub fn keys_and_values(heads: usize, shape: &MlaShape) -> Self {
        Self { heads, first: shape.qk_nope_head_dim, second: shape.v_head_dim }
    }

    /// Rows of both kinds apart.
    fn split(self, weight: &Array2<f32>) -> [Array2<f32>; 2] {
        let stride = self.first + self.second;
        [(0, self.first), (self.first, self.second)]
            .map(|(first, width)| weight.select(Axis(0), &rows_of(self.heads, stride, first, width)))
    }

    /// The inverse of [`ByHead::split`]; vectors are `[n, 1]` here.
    pub fn join(self, first: &Array2<f32>, second: &Array2<f32>) -> Array2<f32> {
        let stride = self.first + self.second;
        let columns = first.ncols().max(second.ncols());
        let mut out = Array2::zeros((self.heads * stride, columns));
        for (part, at, width) in [(first, 0, self.first), (second, self.first, self.second)] {
            for (row, to) in part.rows().into_iter().zip(rows_of(self.heads, stride, at, width)) {
                out.row_mut(to).assign(&row);
            }
        }
        out
    }
}

impl Tensors<f32> {
    /// The weights of an MLA layer with a plain MLP.
    ///
    /// # Errors
    /// [`RuntimeError::Variant`] for any other layer.
    pub fn of(layer: LayerTensors, heads: usize, shape: &MlaShape) -> Result<Self, RuntimeError> {
        let mut out = Self::none();
        let AttentionTensors::Mla(attention) = layer.attention else {
            return Err(RuntimeError::Variant { expected: "mla", found: "gqa" });
        };
        let FeedForwardTensors::Dense(mlp) = layer.mlp else {
            return Err(RuntimeError::Variant { expected: "dense", found: "experts" });
        };
        out[Role::InputGain] = vector(layer.input_norm);
        out[Role::PostGain] = vector(layer.post_norm);
        out[Role::AttentionOutGain] = vector(layer.extras.attention_out_norm.unwrap_or_default());
        out[Role::MlpOutGain] = vector(layer.extras.mlp_out_norm.unwrap_or_default());
        out.attention(attention, heads, shape);
        out.mlp(*mlp);
        Ok(out)
    }

    fn linear(&mut self, linear: Linear, weight: Role, bias: Role) {
        self[weight] = linear.weight;
        self[bias] = vector(linear.bias.unwrap_or_default());
    }

    fn attention(&mut self, t: MlaTensors, heads: usize, shape: &MlaShape) {
        use Role::*;
        let queries = match t.query {
            QueryTensors::Direct(linear) => linear,
            QueryTensors::LowRank { a, norm, b } => {
                self.linear(a, QueryDown, QueryDownBias);
                self[QueryGain] = vector(norm);
                b
            }
        };
        let by_head = ByHead::queries(heads, shape);
        [self[QueryNope], self[QueryRope]] = by_head.split(&queries.weight);
        if let Some(bias) = queries.bias {
            let [nope, rope] = by_head.split(&vector(bias).reversed_axes());
            (self[QueryNopeBias], self[QueryRopeBias]) = (row(nope), row(rope));
        }
        let rank = shape.kv_lora_rank;
        let (latent, key) = t.kv_a.weight.view().split_at(Axis(0), rank);
        (self[Latent], self[KeyRope]) = (latent.to_owned(), key.to_owned());
        if let Some(bias) = t.kv_a.bias {
            (self[LatentBias], self[KeyRopeBias]) = (vector(bias[..rank].to_vec()), vector(bias[rank..].to_vec()));
        }
        self[LatentGain] = vector(t.kv_a_norm);
        [self[KeyUp], self[ValueUp]] = ByHead::keys_and_values(heads, shape).split(&t.kv_b.weight);
        self.linear(t.o, Output, OutputBias);
    }

    fn mlp(&mut self, mlp: MlpTensors) {
        if let Some(gate) = mlp.gate {
            self.linear(gate, Role::Gate, Role::GateBias);
        }
        self.linear(mlp.up, Role::Up, Role::UpBias);
        self.linear(mlp.down, Role::Down, Role::DownBias);
    }
}

/// A column as a row, in standard layout.
fn row(column: Array2<f32>) -> Array2<f32> {
    vector(column.iter().copied().collect())
}
