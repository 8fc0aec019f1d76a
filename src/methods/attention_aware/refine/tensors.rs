//! The trainable tensors of a layer, and their gradients, in one shape.

use ndarray::{Array1, Array2};

use crate::gradient::Real;
use crate::mla::{MlaLayer, Query};

/// Number of tensors in [`Tensors`].
pub(super) const COUNT: usize = 11;
/// Index of the output bias in [`Tensors::parts`].
pub(super) const WO_BIAS: usize = 10;
const LAYOUT: &str = "constructed in standard layout";

/// Shapes and meanings are those of [`MlaLayer`]; a bias that does not exist is empty. All in standard layout.
#[derive(Debug, Clone)]
pub(super) struct Tensors<T> {
    pub q_nope: Array2<T>,
    pub q_rope: Array2<T>,
    pub latent: Array2<T>,
    pub k_rope: Array2<T>,
    pub k_up: Array2<T>,
    pub v_up: Array2<T>,
    pub wo: Array2<T>,
    pub q_nope_bias: Array1<T>,
    pub q_rope_bias: Array1<T>,
    pub k_rope_bias: Array1<T>,
    pub wo_bias: Array1<T>,
}

fn matrix<T: Real>(a: &Array2<f64>) -> Array2<T> {
    // `mapv` would keep a column-major layout.
    Array2::from_shape_fn(a.dim(), |index| T::from_f64(a[index]))
}

fn vector<T: Real>(a: Option<&Array1<f64>>) -> Array1<T> {
    a.map_or_else(|| Array1::zeros(0), |a| a.mapv(T::from_f64))
}

fn wide<T: Real>(a: &Array2<T>) -> Array2<f64> {
    a.mapv(T::to_f64)
}

fn wide_bias<T: Real>(a: &Array1<T>) -> Option<Array1<f64>> {
    (!a.is_empty()).then(|| a.mapv(T::to_f64))
}

impl<T: Real> Tensors<T> {
    /// The tensors of `layer`. With `bias` there is an output bias, zero where the layer has none.
    pub fn new(layer: &MlaLayer, bias: bool) -> Self {
        let mut wo_bias = vector(layer.wo_bias.as_ref());
        if bias && wo_bias.is_empty() {
            wo_bias = Array1::zeros(layer.hidden());
        }
        Self {
            q_nope: matrix(&layer.query.nope),
            q_rope: matrix(&layer.query.rope),
            latent: matrix(&layer.latent),
            k_rope: matrix(&layer.k_rope),
            k_up: matrix(&layer.k_up),
            v_up: matrix(&layer.v_up),
            wo: matrix(&layer.wo),
            q_nope_bias: vector(layer.query.nope_bias.as_ref()),
            q_rope_bias: vector(layer.query.rope_bias.as_ref()),
            k_rope_bias: vector(layer.k_rope_bias.as_ref()),
            wo_bias,
        }
    }

    /// `layer` with these tensors.
    pub fn to_layer(&self, layer: &MlaLayer) -> MlaLayer {
        MlaLayer {
            heads: layer.heads,
            query: Query {
                down: layer.query.down.clone(),
                nope: wide(&self.q_nope),
                nope_bias: wide_bias(&self.q_nope_bias),
                rope: wide(&self.q_rope),
                rope_bias: wide_bias(&self.q_rope_bias),
            },
            latent: wide(&self.latent),
            k_rope: wide(&self.k_rope),
            k_rope_bias: wide_bias(&self.k_rope_bias),
            k_up: wide(&self.k_up),
            v_up: wide(&self.v_up),
            wo: wide(&self.wo),
            wo_bias: wide_bias(&self.wo_bias),
            rope_freq: layer.rope_freq.clone(),
            score_scale: layer.score_scale,
        }
    }

    /// The elements of every tensor, always in the same order.
    pub fn parts(&self) -> [&[T]; COUNT] {
        [
            self.q_nope.as_slice().expect(LAYOUT),
            self.q_rope.as_slice().expect(LAYOUT),
            self.latent.as_slice().expect(LAYOUT),
            self.k_rope.as_slice().expect(LAYOUT),
            self.k_up.as_slice().expect(LAYOUT),
            self.v_up.as_slice().expect(LAYOUT),
            self.wo.as_slice().expect(LAYOUT),
            self.q_nope_bias.as_slice().expect(LAYOUT),
            self.q_rope_bias.as_slice().expect(LAYOUT),
            self.k_rope_bias.as_slice().expect(LAYOUT),
            self.wo_bias.as_slice().expect(LAYOUT),
        ]
    }

    /// As [`Tensors::parts`], to write.
    pub fn parts_mut(&mut self) -> [&mut [T]; COUNT] {
        [
            self.q_nope.as_slice_mut().expect(LAYOUT),
            self.q_rope.as_slice_mut().expect(LAYOUT),
            self.latent.as_slice_mut().expect(LAYOUT),
            self.k_rope.as_slice_mut().expect(LAYOUT),
            self.k_up.as_slice_mut().expect(LAYOUT),
            self.v_up.as_slice_mut().expect(LAYOUT),
            self.wo.as_slice_mut().expect(LAYOUT),
            self.q_nope_bias.as_slice_mut().expect(LAYOUT),
            self.q_rope_bias.as_slice_mut().expect(LAYOUT),
            self.k_rope_bias.as_slice_mut().expect(LAYOUT),
            self.wo_bias.as_slice_mut().expect(LAYOUT),
        ]
    }
}
