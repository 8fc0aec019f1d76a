//! The MLP of many tokens, panel by panel of its intermediate, which is never whole in memory.

use faer::Accum;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::elementwise;
use super::gemm::serial_linear;
use crate::runtime::{HostWeight, LinearWeights, MlpWeights};

/// From this many tokens on there are strips for every thread. Fixed, as is all that follows, so that sums are cut the same
/// way for any number of threads.
pub(crate) const LONG: usize = 2048;
/// Tokens per task.
const STRIP: usize = 128;
/// Columns of the intermediate at a time: what a task holds of it stays in a core's cache.
const PANEL: usize = 512;

/// `x [T, D]` through `mlp`, to `[T, D]`.
pub(super) fn mlp(x: ArrayView2<'_, f32>, mlp: &MlpWeights<'_, HostWeight, Array2<f32>>) -> Array2<f32> {
    let mut out = Array2::zeros((x.nrows(), mlp.down.weight.shape().0));
    let strips = out.axis_chunks_iter_mut(Axis(0), STRIP).into_par_iter().zip(x.axis_chunks_iter(Axis(0), STRIP));
    let room = || [(); 2].map(|()| Array2::zeros((STRIP, PANEL)));
    strips.for_each_init(room, |panels, (out, x)| strip(out, x, mlp, panels));
    out
}

/// One strip of tokens; `panels` are room for what the first products give, `[STRIP, PANEL]` each.
fn strip(
    mut out: ArrayViewMut2<'_, f32>,
    x: ArrayView2<'_, f32>,
    mlp: &MlpWeights<'_, HostWeight, Array2<f32>>,
    panels: &mut [Array2<f32>; 2],
) {
    let width = mlp.up.weight.shape().0;
    if let Some(bias) = mlp.down.bias {
        out += bias;
    }
    for start in (0..width).step_by(PANEL) {
        let columns = start..(start + PANEL).min(width);
        let [mut first, mut second] = panels.each_mut().map(|p| p.slice_mut(s![..x.nrows(), ..columns.len()]));
        match &mlp.gate {
            Some(gate) => {
                project(first.view_mut(), x, gate, columns.clone());
                project(second.view_mut(), x, &mlp.up, columns.clone());
                for (mut gate, up) in first.rows_mut().into_iter().zip(second.rows()) {
                    if let (Some(gate), Some(up)) = (gate.as_slice_mut(), up.as_slice()) {
                        elementwise::gated(gate, up, mlp.activation);
                    }
                }
            }
            None => {
                project(first.view_mut(), x, &mlp.up, columns.clone());
                first.mapv_inplace(|v| elementwise::activate(v, mlp.activation));
            }
        }
        serial_linear(out.view_mut(), Accum::Add, first.view(), mlp.down.weight.view().columns(columns));
    }
}

/// Some outputs of a linear layer, into `panel` `[tokens, columns]`.
fn project(
    mut panel: ArrayViewMut2<'_, f32>,
    x: ArrayView2<'_, f32>,
    linear: &LinearWeights<'_, HostWeight, Array2<f32>>,
    columns: std::ops::Range<usize>,
) {
    serial_linear(panel.view_mut(), Accum::Replace, x, linear.weight.view().rows(columns.clone()));
    if let Some(bias) = linear.bias {
        panel += &bias.slice(s![.., columns]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Activation;
    use crate::runtime::{Backend, Cpu};

    fn data(rows: usize, columns: usize, seed: f32) -> Array2<f32> {
        Array2::from_shape_fn((rows, columns), |(i, j)| ((i * 5 + j * 11 + i * j) as f32 * 0.29 + seed).sin())
    }

    #[test]
    fn panels_give_what_whole_products_give() {
        let (d, i) = (24, PANEL + 40);
        let x = data(STRIP + 3, d, 0.1);
        let [gate, up, down] = [data(i, d, 0.2), data(i, d, 0.3), data(d, i, 0.4) / 20.0].map(HostWeight::from);
        let (b1, b2) = (data(1, i, 0.5), data(1, d, 0.6));
        for (gate, activation) in
            [(Some(&gate), Activation::Silu), (Some(&gate), Activation::GeluTanh), (None, Activation::Relu2)]
        {
            let weights = MlpWeights {
                gate: gate.map(|weight| LinearWeights { weight, bias: None }),
                up: LinearWeights { weight: &up, bias: Some(&b1) },
                down: LinearWeights { weight: &down, bias: Some(&b2) },
                activation,
            };
            let want = Cpu.mlp(&x, &weights).unwrap();
            let got = mlp(x.view(), &weights);
            let scale = want.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            let error = (&want - &got).iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            // Sums of `d` and of `i` terms in another order.
            assert!(scale > 0.5 && error <= (i as f32).sqrt() * 4.0 * f32::EPSILON * scale, "{error} of {scale}");
        }
    }
}
