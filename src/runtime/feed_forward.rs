//! What follows attention in a layer: an MLP, or a mixture of experts.

use super::attention::{Projection, vector_of};
use super::router::{choose, sigmoid};
use super::tensors::{ExpertTensors, FeedForwardTensors, MlpTensors};
use super::{Backend, HostWeight, MlpWeights, RuntimeError};
use crate::arch::{Activation, Architecture, MlpKind, Moe};

/// MLP `down(act(gate x) * up x)`, or `down(act(up x))` without a gate.
pub(super) struct Mlp<B: Backend> {
    gate: Option<Projection<B>>,
    up: Projection<B>,
    pub(super) down: Projection<B>,
    activation: Activation,
}

impl<B: Backend> Mlp<B> {
    fn new(
        backend: &B,
        tensors: MlpTensors<HostWeight>,
        hidden: usize,
        width: usize,
        activation: Activation,
    ) -> Result<Self, RuntimeError> {
        let gate = match tensors.gate {
            Some(gate) => Some(Projection::new(backend, "gate", gate, width, hidden)?),
            None => None,
        };
        Ok(Self {
            gate,
            up: Projection::new(backend, "up", tensors.up, width, hidden)?,
            down: Projection::new(backend, "down", tensors.down, hidden, width)?,
            activation,
        })
    }

    fn weights(&self) -> MlpWeights<'_, B::Weight, B::Tensor> {
        MlpWeights {
            gate: self.gate.as_ref().map(Projection::weights),
            up: self.up.weights(),
            down: self.down.weights(),
            activation: self.activation,
        }
    }

    /// `act(gate x) * up x`, or `act(up x)`, `[T, I]`.
    pub(super) fn activated(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor, RuntimeError> {
        b.mlp_activated(x, &self.weights())
    }

    fn apply(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor, RuntimeError> {
        b.mlp(x, &self.weights())
    }
}

/// Reads the weights of one routed expert.
pub(super) type ExpertLoader<'a> =
    Box<dyn Fn(usize) -> Result<MlpTensors<HostWeight>, RuntimeError> + Send + Sync + 'a>;

/// Where the routed experts are.
enum Routed<'a, B: Backend> {
    Held(Vec<Mlp<B>>),
    /// Read when a token goes to them, and dropped again.
    Streamed(ExpertLoader<'a>),
}

/// A mixture of experts.
pub(super) struct Experts<'a, B: Backend> {
    shape: Moe,
    hidden: usize,
    activation: Activation,
    router: Projection<B>,
    choice_bias: Vec<f32>,
    experts: Routed<'a, B>,
    shared: Option<Mlp<B>>,
    shared_router: Option<Projection<B>>,
}

/// MLP or experts of one layer.
pub(super) enum FeedForward<'a, B: Backend> {
    Dense(Mlp<B>),
    Experts(Box<Experts<'a, B>>),
}

impl<'a, B: Backend> FeedForward<'a, B> {
    /// With a `loader`, the routed experts are read through it as they are needed; the tensors then hold none.
    pub(super) fn new(
        backend: &B,
        arch: &Architecture,
        tensors: FeedForwardTensors<HostWeight>,
        loader: Option<ExpertLoader<'a>>,
    ) -> Result<Self, RuntimeError> {
        let (d, act) = (arch.hidden, arch.activation);
        match (tensors, &arch.moe) {
            (FeedForwardTensors::Dense(mlp), _) => {
                if mlp.gate.is_some() != (arch.mlp == MlpKind::Gated) {
                    return Err(match arch.mlp {
                        MlpKind::Gated => RuntimeError::Variant { expected: "gated MLP", found: "MLP without a gate" },
                        MlpKind::Plain => RuntimeError::Variant { expected: "MLP without a gate", found: "gated MLP" },
                    });
                }
                Ok(Self::Dense(Mlp::new(backend, *mlp, d, arch.intermediate, act)?))
            }
            (FeedForwardTensors::Experts(t), Some(moe)) => {
                Ok(Self::Experts(Box::new(Experts::new(backend, moe, *t, loader, (d, act))?)))
            }
            (FeedForwardTensors::Experts(_), None) => {
                Err(RuntimeError::Variant { expected: "dense", found: "experts" })
            }
        }
    }

    /// `x [T, D]`, normed, to `[T, D]`.
    pub(super) fn apply(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor, RuntimeError> {
        match self {
            Self::Dense(mlp) => mlp.apply(b, x),
            Self::Experts(experts) => experts.apply(b, x),
        }
    }
}

impl<'a, B: Backend> Experts<'a, B> {
    fn new(
        backend: &B,
        moe: &Moe,
        t: ExpertTensors<HostWeight>,
        loader: Option<ExpertLoader<'a>>,
        (hidden, activation): (usize, Activation),
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
            hidden,
            activation,
            router: Projection::new(backend, "router", t.router, moe.experts, hidden)?,
            choice_bias: match t.choice_bias {
                Some(bias) => vector_of("router_bias", bias, moe.experts)?,
                None => vec![0.0; moe.experts],
            },
            experts: match loader {
                Some(loader) => Routed::Streamed(loader),
                None => Routed::Held(t.experts.into_iter().map(mlp).collect::<Result<_, _>>()?),
            },
            shared,
            shared_router,
        })
    }

    fn apply(&self, b: &B, x: &B::Tensor) -> Result<B::Tensor, RuntimeError> {
        let (rows, columns) = b.shape(x);
        let mut out = b.zeros(rows, columns);
        let chosen = choose(&self.shape, &self.choice_bias, &b.download(self.router.apply(b, x))?);
        for (expert, tokens) in chosen.iter().enumerate() {
            if tokens.is_empty() {
                continue;
            }
            let (rows, weights): (Vec<usize>, Vec<f32>) = tokens.iter().copied().unzip();
            let y = self.routed(b, expert, &b.gather_rows(x, &rows)?)?;
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

    /// One expert's output for the tokens that go to it.
    fn routed(&self, b: &B, expert: usize, x: &B::Tensor) -> Result<B::Tensor, RuntimeError> {
        match &self.experts {
            Routed::Held(experts) => match experts.get(expert) {
                Some(mlp) => mlp.apply(b, x),
                None => Err(RuntimeError::Shape {
                    role: "experts",
                    expected: vec![self.shape.experts],
                    found: vec![experts.len()],
                }),
            },
            Routed::Streamed(load) => {
                Mlp::new(b, load(expert)?, self.hidden, self.shape.width, self.activation)?.apply(b, x)
            }
        }
    }
}
