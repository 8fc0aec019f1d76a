//! One decoder layer of the student, forwards and backwards.
//!
//! With `N` an RMSNorm, `A` latent attention with the output projection and `F` the MLP:
//!
//! ```text
//! y = x + N_ao(A(N_in(x)))        z = y + N_mo(F(N_post(y)))
//! ```
//!
//! Norms that a family has not are left out. Of a forward pass only `x`, `y` and the heads' outputs are kept; everything else
//! that gradients need is computed again when the layer's turn comes.

use faer::Accum;
use ndarray::{Array1, Array2};

use super::tensors::{Role, Tensors, Weights};
use crate::arch::Activation;
use crate::gradient::{
    Heads, Projected, Real, activated, activated_backward, column_sums, product, product_into, rms_norm,
    rms_norm_backward, turn_windows,
};
use crate::runtime::Rotation;

/// What of a layer is no weight.
#[derive(Debug, Clone, Copy)]
pub(super) struct LayerShape {
    pub heads: Heads,
    /// Epsilon of the norms on the residual stream.
    pub norm_eps: f64,
    /// Epsilon of the norms of latents.
    pub latent_eps: f64,
    pub activation: Activation,
}

/// What a forward pass keeps of a layer for the backward pass, `[T, D]` and `[T, H d_V]`.
#[derive(Debug)]
pub(super) struct Kept<T> {
    /// `x`.
    input: Array2<T>,
    /// `y`.
    middle: Array2<T>,
    /// Head outputs.
    heads: Array2<T>,
}

/// One layer at work on windows of tokens that lie under each other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layer<'a, T> {
    pub shape: LayerShape,
    pub weights: Weights<'a, T>,
    /// Over the longest window.
    pub rotation: &'a Rotation,
    pub windows: &'a [usize],
}

/// Queries, keys and values, and what they were made from.
struct Attended<T> {
    /// The query latent before its norm, and after.
    query: Option<(Array2<T>, Array2<T>)>,
    /// The latent before its norm.
    raw: Array2<T>,
    /// And after, where there is one.
    normed: Option<Array2<T>>,
    projected: Projected<T>,
}

impl<T> Attended<T> {
    fn latent(&self) -> &Array2<T> {
        self.normed.as_ref().unwrap_or(&self.raw)
    }
}

/// `to += from`, which has the same shape.
fn add<T: Real>(to: &mut Array2<T>, from: &Array2<T>) {
    ndarray::Zip::from(to).and(from).par_for_each(|to, from| *to += *from);
}

impl<T: Real> Layer<'_, T> {
    /// The layer's output; what is kept goes to `keep`.
    pub fn forward(&self, input: Array2<T>, keep: Option<&mut Vec<Kept<T>>>) -> Array2<T> {
        let x = self.normed(&input, Role::InputGain);
        let projected = self.attended(x.as_ref().unwrap_or(&input)).projected;
        let heads = self.shape.heads.forward(&projected, self.windows);
        let out = self.linear(&heads, Role::Output, Role::OutputBias);
        let mut middle = self.normed(&out, Role::AttentionOutGain).unwrap_or(out);
        add(&mut middle, &input);
        let x = self.normed(&middle, Role::PostGain);
        let (gate, up) = self.gate_and_up(x.as_ref().unwrap_or(&middle));
        let inner = activated(gate.as_ref(), &up, self.shape.activation);
        let out = self.linear(&inner, Role::Down, Role::DownBias);
        let mut out = self.normed(&out, Role::MlpOutGain).unwrap_or(out);
        add(&mut out, &middle);
        if let Some(keep) = keep {
            keep.push(Kept { input, middle, heads });
        }
        out
    }

    /// The gradient by the layer's input, from `gradient` by its output. Gradients by the tensors that are in `sums` are added
    /// to them.
    pub fn backward(&self, kept: &Kept<T>, gradient: Array2<T>, sums: &mut Tensors<T>) -> Array2<T> {
        let mut d = gradient;
        let through = self.mlp_backward(&kept.middle, &d, sums);
        add(&mut d, &through);
        let through = self.attention_backward(kept, &d, sums);
        add(&mut d, &through);
        d
    }

    fn mlp_backward(&self, middle: &Array2<T>, gradient: &Array2<T>, sums: &mut Tensors<T>) -> Array2<T> {
        let normed = self.normed(middle, Role::PostGain);
        let x = normed.as_ref().unwrap_or(middle);
        let (mut gate, mut up) = self.gate_and_up(x);
        // Only trained weights and a norm behind the MLP need what it gives.
        let behind = self.weights.has(Role::MlpOutGain);
        let inner = (behind || sums.has(Role::Down)).then(|| activated(gate.as_ref(), &up, self.shape.activation));
        let out = inner.as_ref().filter(|_| behind).map(|inner| self.linear(inner, Role::Down, Role::DownBias));
        let d_out = out.and_then(|out| self.norm_backward(&out, Role::MlpOutGain, gradient, sums));
        let d_out = d_out.as_ref().unwrap_or(gradient);
        if let Some(inner) = &inner {
            self.add_gradients(sums, (Role::Down, Role::DownBias), d_out, inner);
        }
        drop(inner);
        let d_inner = product(d_out.view(), self.weights.get(Role::Down).view());
        activated_backward(gate.as_mut(), &mut up, &d_inner, self.shape.activation);
        drop(d_inner);
        let mut d_x = product(up.view(), self.weights.get(Role::Up).view());
        self.add_gradients(sums, (Role::Up, Role::UpBias), &up, x);
        if let Some(gate) = &gate {
            product_into(&mut d_x, Accum::Add, gate.view(), self.weights.get(Role::Gate).view());
            self.add_gradients(sums, (Role::Gate, Role::GateBias), gate, x);
        }
        self.norm_backward(middle, Role::PostGain, &d_x, sums).unwrap_or(d_x)
    }

    fn attention_backward(&self, kept: &Kept<T>, gradient: &Array2<T>, sums: &mut Tensors<T>) -> Array2<T> {
        let normed = self.normed(&kept.input, Role::InputGain);
        let x = normed.as_ref().unwrap_or(&kept.input);
        let seen = self.attended(x);
        let d_out = self.weights.has(Role::AttentionOutGain).then(|| {
            let out = self.linear(&kept.heads, Role::Output, Role::OutputBias);
            self.norm_backward(&out, Role::AttentionOutGain, gradient, sums)
        });
        let d_out = d_out.flatten();
        let d_out = d_out.as_ref().unwrap_or(gradient);
        self.add_gradients(sums, (Role::Output, Role::OutputBias), d_out, &kept.heads);
        let d_heads = product(d_out.view(), self.weights.get(Role::Output).view());
        let mut d = self.shape.heads.backward(&seen.projected, &kept.heads, &d_heads, self.windows);
        drop(d_heads);
        turn_windows(self.rotation, &mut d.q_rope, self.windows, true);
        turn_windows(self.rotation, &mut d.k_rope, self.windows, true);
        let mut d_x = self.keys_backward(&seen, x, &d, sums);
        self.queries_backward(&seen, x, &d, &mut d_x, sums);
        self.norm_backward(&kept.input, Role::InputGain, &d_x, sums).unwrap_or(d_x)
    }

    /// The gradient by the normed input through keys and values.
    fn keys_backward(&self, seen: &Attended<T>, x: &Array2<T>, d: &Projected<T>, sums: &mut Tensors<T>) -> Array2<T> {
        let w = &self.weights;
        self.add_weight(sums, Role::KeyUp, &d.k_nope, seen.latent());
        self.add_weight(sums, Role::ValueUp, &d.values, seen.latent());
        let mut d_latent = product(d.k_nope.view(), w.get(Role::KeyUp).view());
        product_into(&mut d_latent, Accum::Add, d.values.view(), w.get(Role::ValueUp).view());
        if let Some(gain) = w.vector(Role::LatentGain) {
            let (raw, of_gain) = rms_norm_backward(&seen.raw, gain, self.shape.latent_eps, &d_latent);
            add_vector(sums, Role::LatentGain, &of_gain);
            d_latent = raw;
        }
        self.add_gradients(sums, (Role::Latent, Role::LatentBias), &d_latent, x);
        self.add_gradients(sums, (Role::KeyRope, Role::KeyRopeBias), &d.k_rope, x);
        let mut d_x = product(d_latent.view(), w.get(Role::Latent).view());
        product_into(&mut d_x, Accum::Add, d.k_rope.view(), w.get(Role::KeyRope).view());
        d_x
    }

    /// Add the gradient by the normed input through queries.
    fn queries_backward(
        &self,
        seen: &Attended<T>,
        x: &Array2<T>,
        d: &Projected<T>,
        d_x: &mut Array2<T>,
        sums: &mut Tensors<T>,
    ) {
        let w = &self.weights;
        let input = seen.query.as_ref().map_or(x, |(_, normed)| normed);
        self.add_gradients(sums, (Role::QueryNope, Role::QueryNopeBias), &d.q_nope, input);
        self.add_gradients(sums, (Role::QueryRope, Role::QueryRopeBias), &d.q_rope, input);
        let Some((raw, _)) = &seen.query else {
            product_into(d_x, Accum::Add, d.q_nope.view(), w.get(Role::QueryNope).view());
            product_into(d_x, Accum::Add, d.q_rope.view(), w.get(Role::QueryRope).view());
            return;
        };
        let mut d_query = product(d.q_nope.view(), w.get(Role::QueryNope).view());
        product_into(&mut d_query, Accum::Add, d.q_rope.view(), w.get(Role::QueryRope).view());
        if let Some(gain) = w.vector(Role::QueryGain) {
            let (through, of_gain) = rms_norm_backward(raw, gain, self.shape.latent_eps, &d_query);
            add_vector(sums, Role::QueryGain, &of_gain);
            d_query = through;
        }
        self.add_gradients(sums, (Role::QueryDown, Role::QueryDownBias), &d_query, x);
        product_into(d_x, Accum::Add, d_query.view(), w.get(Role::QueryDown).view());
    }

    /// Queries, keys and values of the normed input.
    fn attended(&self, x: &Array2<T>) -> Attended<T> {
        let eps = self.shape.latent_eps;
        let query = self.weights.has(Role::QueryDown).then(|| {
            let raw = self.linear(x, Role::QueryDown, Role::QueryDownBias);
            let normed = self.weights.vector(Role::QueryGain).map(|gain| rms_norm(&raw, gain, eps));
            match normed {
                Some(normed) => (raw, normed),
                None => (Array2::zeros((0, 0)), raw),
            }
        });
        let input = query.as_ref().map_or(x, |(_, normed)| normed);
        let mut q_rope = self.linear(input, Role::QueryRope, Role::QueryRopeBias);
        let q_nope = self.linear(input, Role::QueryNope, Role::QueryNopeBias);
        let mut k_rope = self.linear(x, Role::KeyRope, Role::KeyRopeBias);
        turn_windows(self.rotation, &mut q_rope, self.windows, false);
        turn_windows(self.rotation, &mut k_rope, self.windows, false);
        let raw = self.linear(x, Role::Latent, Role::LatentBias);
        let normed = self.weights.vector(Role::LatentGain).map(|gain| rms_norm(&raw, gain, eps));
        let latent = normed.as_ref().unwrap_or(&raw);
        let k_nope = product(latent.view(), self.weights.get(Role::KeyUp).t());
        let values = product(latent.view(), self.weights.get(Role::ValueUp).t());
        Attended { query, raw, normed, projected: Projected { q_nope, q_rope, k_nope, k_rope, values } }
    }

    fn gate_and_up(&self, x: &Array2<T>) -> (Option<Array2<T>>, Array2<T>) {
        let gate = self.weights.has(Role::Gate).then(|| self.linear(x, Role::Gate, Role::GateBias));
        (gate, self.linear(x, Role::Up, Role::UpBias))
    }

    fn linear(&self, x: &Array2<T>, weight: Role, bias: Role) -> Array2<T> {
        let mut out = product(x.view(), self.weights.get(weight).t());
        if self.weights.has(bias) {
            out += &self.weights.get(bias).row(0);
        }
        out
    }

    /// RMSNorm, where the layer has it.
    fn normed(&self, x: &Array2<T>, gain: Role) -> Option<Array2<T>> {
        self.weights.vector(gain).map(|gain| rms_norm(x, gain, self.shape.norm_eps))
    }

    /// The gradient by what goes into a norm, where the layer has it.
    fn norm_backward(&self, x: &Array2<T>, role: Role, d: &Array2<T>, sums: &mut Tensors<T>) -> Option<Array2<T>> {
        let gain = self.weights.vector(role)?;
        let (d, of_gain) = rms_norm_backward(x, gain, self.shape.norm_eps, d);
        add_vector(sums, role, &of_gain);
        Some(d)
    }

    /// Gradients by a weight and its bias, from `d` by their output.
    fn add_gradients(&self, sums: &mut Tensors<T>, (weight, bias): (Role, Role), d: &Array2<T>, x: &Array2<T>) {
        self.add_weight(sums, weight, d, x);
        if sums.has(bias) {
            add_vector(sums, bias, &column_sums(d));
        }
    }

    fn add_weight(&self, sums: &mut Tensors<T>, weight: Role, d: &Array2<T>, x: &Array2<T>) {
        if sums.has(weight) {
            product_into(&mut sums[weight], Accum::Add, d.t(), x.view());
        }
    }
}

fn add_vector<T: Real>(sums: &mut Tensors<T>, role: Role, d: &Array1<T>) {
    if sums.has(role) {
        let mut row = sums[role].row_mut(0);
        row += d;
    }
}
