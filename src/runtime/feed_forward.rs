//! What follows attention in a layer: a gated MLP, or a mixture of experts.

use ndarray::Array2;

use super::attention::{Projection, vector_of};
use super::tensors::{ExpertTensors, FeedForwardTensors, MlpTensors};
use super::{Backend, RuntimeError};
use crate::arch::{Activation, Architecture, Moe, Scoring};

/// Gated MLP `down(act(gate x) * up x)`.
pub(super) struct Mlp<T> {
    gate: Projection<T>,
    up: Projection<T>,
    pub(super) down: Projection<T>,
    activation: Activation,
}

impl<T> Mlp<T> {
    fn new<B: Backend<Tensor = T>>(
        backend: &B,
        tensors: MlpTensors,
        hidden: usize,
        width: usize,
        activation: Activation,
    ) -> Result<Self, RuntimeError> {
        Ok(Self {
            gate: Projection::new(backend, "gate", tensors.gate, width, hidden)?,
            up: Projection::new(backend, "up", tensors.up, width, hidden)?,
            down: Projection::new(backend, "down", tensors.down, hidden, width)?,
            activation,
        })
    }

    /// `act(gate x) * up x`, `[T, I]`.
    pub(super) fn activated<B: Backend<Tensor = T>>(&self, b: &B, x: &T) -> Result<T, RuntimeError> {
        b.gated(self.gate.apply(b, x), &self.up.apply(b, x), self.activation)
    }

    fn apply<B: Backend<Tensor = T>>(&self, b: &B, x: &T) -> Result<T, RuntimeError> {
        Ok(self.down.apply(b, &self.activated(b, x)?))
    }
}

/// A mixture of experts.
pub(super) struct Experts<T> {
    shape: Moe,
    router: Projection<T>,
    choice_bias: Vec<f32>,
    experts: Vec<Mlp<T>>,
    shared: Option<Mlp<T>>,
    shared_router: Option<Projection<T>>,
}

/// MLP or experts of one layer.
pub(super) enum FeedForward<T> {
    Dense(Mlp<T>),
    Experts(Box<Experts<T>>),
}

impl<T> FeedForward<T> {
    pub(super) fn new<B: Backend<Tensor = T>>(
        backend: &B,
        arch: &Architecture,
        tensors: FeedForwardTensors,
    ) -> Result<Self, RuntimeError> {
        let (d, act) = (arch.hidden, arch.activation);
        match (tensors, &arch.moe) {
            (FeedForwardTensors::Dense(mlp), _) => Ok(Self::Dense(Mlp::new(backend, *mlp, d, arch.intermediate, act)?)),
            (FeedForwardTensors::Experts(t), Some(moe)) => {
                Ok(Self::Experts(Box::new(Experts::new(backend, moe, *t, d, act)?)))
            }
            (FeedForwardTensors::Experts(_), None) => {
                Err(RuntimeError::Variant { expected: "dense", found: "experts" })
            }
        }
    }

    /// `x [T, D]`, normed, to `[T, D]`.
    pub(super) fn apply<B: Backend<Tensor = T>>(&self, b: &B, x: &T) -> Result<T, RuntimeError> {
        match self {
            Self::Dense(mlp) => mlp.apply(b, x),
            Self::Experts(experts) => experts.apply(b, x),
        }
    }
}

impl<T> Experts<T> {
    fn new<B: Backend<Tensor = T>>(
        backend: &B,
        moe: &Moe,
        t: ExpertTensors,
        hidden: usize,
        activation: Activation,
    ) -> Result<Self, RuntimeError> {
        let shared = match (t.shared, moe.shared_width) {
            (Some(mlp), Some(width)) => Some(Mlp::new(backend, mlp, hidden, width, activation)?),
            _ => None,
        };
        let shared_router = match t.shared_router {
            Some(router) => Some(Projection::new(backend, "shared_router", router, 1, hidden)?),
            None => None,
        };
        let mlp = |mlp| Mlp::new(backend, mlp, hidden, moe.width, activation);
        Ok(Self {
            shape: moe.clone(),
            router: Projection::new(backend, "router", t.router, moe.experts, hidden)?,
            choice_bias: match t.choice_bias {
                Some(bias) => vector_of("router_bias", bias, moe.experts)?,
                None => vec![0.0; moe.experts],
            },
            experts: t.experts.into_iter().map(mlp).collect::<Result<_, _>>()?,
            shared,
            shared_router,
        })
    }

    fn apply<B: Backend<Tensor = T>>(&self, b: &B, x: &T) -> Result<T, RuntimeError> {
        let (rows, columns) = b.shape(x);
        let mut out = b.zeros(rows, columns);
        let chosen = self.choose(&b.download(self.router.apply(b, x))?);
        for (expert, tokens) in self.experts.iter().zip(&chosen) {
            if tokens.is_empty() {
                continue;
            }
            let (rows, weights): (Vec<usize>, Vec<f32>) = tokens.iter().copied().unzip();
            let y = expert.apply(b, &b.gather_rows(x, &rows)?)?;
            b.scatter_add_rows(&mut out, &rows, &weights, &y)?;
        }
        if let Some(shared) = &self.shared {
            let y = shared.apply(b, x)?;
            match &self.shared_router {
                None => b.add(&mut out, &y),
                Some(gate) => {
                    let gates = b.download(gate.apply(b, x))?;
                    let weights: Vec<f32> = gates.iter().map(|g| sigmoid(*g)).collect();
                    let all: Vec<usize> = (0..rows).collect();
                    b.scatter_add_rows(&mut out, &all, &weights, &y)?;
                }
            }
        }
        Ok(out)
    }

    /// For every expert the tokens that go to it, in order, with their weights. `logits [T, E]`. Of equal scores the
    /// expert with the lower index wins.
    fn choose(&self, logits: &Array2<f32>) -> Vec<Vec<(usize, f32)>> {
        let moe = &self.shape;
        let mut chosen = vec![Vec::new(); moe.experts];
        for (token, row) in logits.rows().into_iter().enumerate() {
            let scores: Vec<f64> = match moe.scoring {
                Scoring::Sigmoid => row.iter().map(|x| f64::from(sigmoid(*x))).collect(),
                Scoring::Softmax => {
                    let max = row.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
                    let e: Vec<f64> = row.iter().map(|x| f64::from(x - max).exp()).collect();
                    let sum: f64 = e.iter().sum();
                    e.into_iter().map(|x| x / sum).collect()
                }
            };
            let rank = |e: usize| scores[e] + f64::from(self.choice_bias[e]);
            let mut order: Vec<usize> = (0..moe.experts).collect();
            order.sort_by(|a, b| rank(*b).total_cmp(&rank(*a)).then(a.cmp(b)));
            order.truncate(moe.per_token);
            let total: f64 = order.iter().map(|e| scores[*e]).sum();
            for e in order {
                let weight = if moe.renormalise { scores[e] / total } else { scores[e] };
                chosen[e].push((token, (weight * moe.scale) as f32));
            }
        }
        chosen
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
