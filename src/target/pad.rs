//! Zero-padding to the shapes that kernels are compiled for. Exact: padded rows and columns are zero, and the score scale
//! follows the width.

use ndarray::{Array1, Array2, s};

use crate::arch::base_power;
use crate::mla::{Geometry, MlaLayer};

/// Head shapes `(nope, rope, v)` of vLLM's prefill kernels that a dense GQA model can be padded to, smallest first.
const HEADS: [(usize, usize, usize); 3] = [(64, 64, 128), (128, 64, 128), (192, 64, 256)];
/// Latent widths of the decode kernels, with 64 rotated values: 320 and 576 cached.
const LATENTS: [usize; 2] = [256, 512];

/// The smallest kernel shape that holds `g`, or `None` where none does. On a stock grid the padded rotated width has to hold
/// the narrower one's frequencies.
pub fn kernel_shape(g: &Geometry, stock_grid: bool) -> Option<Geometry> {
    let (nope, rope, v) = HEADS
        .into_iter()
        .find(|(n, r, v)| g.qk_nope_head_dim <= *n && g.qk_rope_head_dim <= *r && g.v_head_dim <= *v)?;
    let rank = LATENTS.into_iter().find(|r| g.kv_lora_rank <= *r)?;
    (!stock_grid || rope.is_multiple_of(g.qk_rope_head_dim)).then_some(Geometry {
        kv_lora_rank: rank,
        qk_nope_head_dim: nope,
        qk_rope_head_dim: rope,
        v_head_dim: v,
        ..*g
    })
}

/// Slot of the wider rotated part that slot `p` of `from` becomes: frequency `theta^(-2p / d_R)` keeps its place on the
/// wider grid, where that is a refinement.
fn slot(p: usize, from: usize, to: usize) -> usize {
    if to.is_multiple_of(from) { p * (to / from) } else { p }
}

/// `mla` with the widths of `to`. Pairs that are added have the frequencies of the plain grid of base `theta`.
pub fn pad(mla: &MlaLayer, to: &Geometry, theta: f64) -> MlaLayer {
    let heads = mla.heads;
    let (nope, rope, value) = (mla.nope_dim(), mla.rope_dim(), mla.value_dim());
    let rotated = |i: usize| 2 * slot(i / 2, rope, to.qk_rope_head_dim) + i % 2;
    let plain = |i: usize| i;
    let rank = to.kv_lora_rank;
    let widen = |m: &Array2<f64>| {
        let mut out = Array2::zeros((m.nrows(), rank));
        out.slice_mut(s![.., ..m.ncols()]).assign(m);
        out
    };
    let mut latent = Array2::zeros((rank, mla.hidden()));
    latent.slice_mut(s![..mla.rank(), ..]).assign(&mla.latent);
    let wo = rows(&mla.wo.t().to_owned(), heads, value, to.v_head_dim, plain).t().to_owned();
    let rope_freq = frequencies(&mla.rope_freq, to.qk_rope_head_dim, theta);
    let mut out = mla.clone();
    out.query.nope = rows(&mla.query.nope, heads, nope, to.qk_nope_head_dim, plain);
    out.query.rope = rows(&mla.query.rope, heads, rope, to.qk_rope_head_dim, rotated);
    let entries = |b: &Option<Array1<f64>>, from: usize, width: usize, place: &dyn Fn(usize) -> usize, heads: usize| {
        b.as_ref().map(|b| {
            let mut out = Array1::zeros(heads * width);
            for (i, v) in b.iter().enumerate() {
                out[i / from * width + place(i % from)] = *v;
            }
            out
        })
    };
    out.query.nope_bias = entries(&mla.query.nope_bias, nope.max(1), to.qk_nope_head_dim, &plain, heads);
    out.query.rope_bias = entries(&mla.query.rope_bias, rope, to.qk_rope_head_dim, &rotated, heads);
    out.k_rope = rows(&mla.k_rope, 1, rope, to.qk_rope_head_dim, rotated);
    out.k_rope_bias = entries(&mla.k_rope_bias, rope, to.qk_rope_head_dim, &rotated, 1);
    out.k_up = widen(&rows(&mla.k_up, heads, nope, to.qk_nope_head_dim, plain));
    out.v_up = widen(&rows(&mla.v_up, heads, value, to.v_head_dim, plain));
    out.latent = latent;
    out.wo = wo;
    out.rope_freq = rope_freq;
    out
}

/// Radians per token of each slot of a rotated width of `wide`, from those of a narrower one.
pub fn frequencies(narrow: &[f64], wide: usize, theta: f64) -> Vec<f64> {
    let mut out: Vec<f64> = (0..wide / 2).map(|p| f64::from(1.0 / base_power(theta, wide, p))).collect();
    for (p, f) in narrow.iter().enumerate() {
        out[slot(p, 2 * narrow.len(), wide)] = *f;
    }
    out
}

/// The rows of each of `heads` blocks of `from` rows at `place` in blocks of `to` rows.
fn rows(m: &Array2<f64>, heads: usize, from: usize, to: usize, place: impl Fn(usize) -> usize) -> Array2<f64> {
    let mut out = Array2::zeros((heads * to, m.ncols()));
    for h in 0..heads {
        for i in 0..from {
            out.row_mut(h * to + place(i)).assign(&m.row(h * from + i));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_grow_to_the_next_kernel() {
        let g = |r, n, d, v| Geometry {
            kv_lora_rank: r,
            q_lora_rank: None,
            qk_nope_head_dim: n,
            qk_rope_head_dim: d,
            v_head_dim: v,
        };
        assert_eq!(kernel_shape(&g(128, 64, 32, 64), true), Some(g(256, 64, 64, 128)));
        assert_eq!(kernel_shape(&g(400, 96, 64, 96), true), Some(g(512, 128, 64, 128)));
        assert_eq!(kernel_shape(&g(600, 64, 64, 64), false), None);
        assert_eq!(kernel_shape(&g(128, 64, 48, 64), true), None);
        assert_eq!(kernel_shape(&g(128, 64, 48, 64), false), Some(g(256, 64, 64, 128)));
    }
}
