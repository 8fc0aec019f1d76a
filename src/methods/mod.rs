//! Conversion methods: which maths, in what order, for one layer.
//!
//! A method turns an [`AttentionSource`] and the layer's statistics into an [`MlaLayer`](crate::mla::MlaLayer):
//! target-neutral, f64, with every fold except the target's own (norm scales, score scale, epsilon alignment), which
//! [`crate::target`] adds. Each method is a folder with one implementation of [`Method`], its settings, and the options that
//! set them; [`METHODS`] lists them, and nothing outside this folder knows one by name.

pub mod attention_aware;
pub mod care;
pub mod exact;
mod method;
pub mod mha2mla;
mod mla_layers;
pub mod options;
pub mod partial_rope;
mod registry;
pub mod setting_options;
mod settings;
pub mod transmla;
mod weight_methods;
pub mod widths;
pub mod x_ecomla;

use ndarray::Array1;

use crate::arch::AttentionSource;

pub use crate::mla::Split;
pub use method::{
    Candidates, Case, Choice, Cost, Entry, LayerInput, LayerOutput, LayerReport, LayerTokens, Made, Make, Method,
    SourceStream, Streams, Survey, SurveyResult, TextNeed, Work,
};
pub use mla_layers::{LayerCount, MlaLayers};
pub use registry::{DEMONSTRATED, METHODS, MethodChoice};
pub use settings::{Budget, ConvertSettings};

/// Windows on which methods without refits measure their error.
const MEASURED_WINDOWS: usize = 8;
/// Layers that are converted on trial, at most, evenly spread.
const TRIAL_LAYERS: usize = 8;

/// Layers that are converted on trial, of `layers`.
fn trial_layers(layers: usize) -> Vec<usize> {
    let count = layers.min(TRIAL_LAYERS);
    (0..count).map(|i| (2 * i + 1) * layers / (2 * count)).collect()
}

/// Index of the least error, the first of equals.
fn least(errors: &[f64]) -> usize {
    (0..errors.len()).fold(0, |best, i| if errors[i] < errors[best] { i } else { best })
}

/// The output bias that carries the value bias: `b_o + sum_h W_o,h b_v,gamma(h)` (softmax weights sum to one).
pub(crate) fn output_bias_with_values(source: &AttentionSource) -> Option<Array1<f64>> {
    let mut bias = source.bo.clone();
    if let Some(bv) = &source.bv {
        let (d, n) = (source.head_dim, source.group());
        let repeated = Array1::from_shape_fn(source.heads * d, |i| bv[(i / d / n) * d + i % d]);
        let carried = source.wo.dot(&repeated);
        bias = Some(bias.map_or(carried.clone(), |b| b + &carried));
    }
    bias
}
