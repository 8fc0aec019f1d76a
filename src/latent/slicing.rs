//! What each of `T` ranks holds of a layer (docs/maths.md, 12).

use std::ops::Range;

use ndarray::{Array1, Array2, Axis, s};
use serde::Serialize;

use super::{LatentMoments, LatentTransform, LatentWeights};
use crate::arch::MlaShape;
use crate::runtime::{AttentionTensors, MlaTensors, RankTensors};
use crate::target::LATENT_EPS;

/// How the latents of a model are shared out over the ranks of a tensor-parallel group.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Sharing {
    /// Ranks `T`; it divides the latent.
    pub ranks: usize,
    /// Whether every rank knows the whole latent's root mean square.
    pub shared_rms: bool,
    /// Factor on the part of a rank's scores that comes from its slice; 1 is the slice's own share.
    pub logit_scale: f64,
}

impl Sharing {
    /// Coordinates of rank `t` of a latent of `rank` values.
    pub fn columns(&self, rank: usize, t: usize) -> Range<usize> {
        let width = rank / self.ranks;
        t * width..(t + 1) * width
    }
}

/// The factors `a_t` that make a slice normed by its own root mean square as large as one normed by the whole latent's.
///
/// `a_t^2 = 1 - nu + nu rho_t`, with `nu = E|n|^2 / r` (1 for a norm at work, 0 for one that its epsilon dominates) and
/// `rho_t` the mean square of the slice relative to that of the whole.
pub fn rms_corrections(moments: &LatentMoments, ranks: usize) -> Vec<f64> {
    let energy = moments.second.diag();
    let (r, nu) = (energy.len(), energy.mean().unwrap_or(0.0));
    let width = r / ranks;
    let correction = |t: usize| {
        let own = energy.slice(s![t * width..(t + 1) * width]).mean().unwrap_or(0.0);
        let rho = if nu > 0.0 { own / nu } else { 1.0 };
        (1.0 - nu.min(1.0) + nu.min(1.0) * rho).max(0.0).sqrt()
    };
    (0..ranks).map(correction).collect()
}

impl LatentMoments {
    /// The moments of the same latents, rotated by `transform`.
    pub fn transformed(&self, transform: &LatentTransform) -> Self {
        let mut mean = self.mean.clone().insert_axis(Axis(0));
        transform.apply(mean.view_mut());
        let both = |m: &Array2<f64>| {
            let mut m = m.clone();
            transform.apply(m.view_mut());
            let mut m = m.reversed_axes().as_standard_layout().into_owned();
            transform.apply(m.view_mut());
            m
        };
        let reads = {
            let mut m = self.reads.clone();
            transform.apply_dual(m.view_mut());
            let mut m = m.reversed_axes().as_standard_layout().into_owned();
            transform.apply_dual(m.view_mut());
            m
        };
        Self { mean: mean.remove_axis(Axis(0)), second: both(&self.second), covariance: both(&self.covariance), reads }
    }
}

impl LatentWeights {
    /// The weights of a layer as the runtime holds it, without a constant in the latent ([`LatentWeights::fold_constant`]);
    /// `None` for a GQA layer.
    pub fn of(tensors: &AttentionTensors) -> Option<Self> {
        let AttentionTensors::Mla(t) = tensors else { return None };
        let wide = |v: &[f32]| Array1::from_iter(v.iter().map(|x| f64::from(*x)));
        let mut weights = Self {
            kv_a: t.kv_a.weight.mapv(f64::from),
            bias: t.kv_a.bias.as_deref().map(wide),
            gain: (!t.kv_a_norm.is_empty()).then(|| wide(&t.kv_a_norm)),
            kv_b: t.kv_b.weight.mapv(f64::from),
        };
        weights.fold_constant(LATENT_EPS);
        Some(weights)
    }

    /// Put these weights into a layer of the runtime.
    pub fn install(&self, t: &mut MlaTensors) {
        let narrow = |v: &Array1<f64>| v.iter().map(|x| *x as f32).collect::<Vec<f32>>();
        t.kv_a.weight = self.kv_a.mapv(|x| x as f32);
        t.kv_a.bias = self.bias.as_ref().map(narrow);
        t.kv_a_norm = self.gain.as_ref().map(narrow).unwrap_or_default();
        t.kv_b.weight = self.kv_b.mapv(|x| x as f32);
    }

    /// What the ranks hold. `moments` are those of these weights' latents; without them a slice that is normed by itself is not
    /// corrected in size.
    ///
    /// # Panics
    /// If the ranks do not divide the latent.
    pub fn ranks(&self, shape: &MlaShape, sharing: &Sharing, moments: Option<&LatentMoments>) -> Vec<RankTensors> {
        (0..sharing.ranks).map(|t| self.of_rank(shape, sharing, moments, t)).collect()
    }

    /// What rank `t` of [`LatentWeights::ranks`] holds.
    ///
    /// # Panics
    /// As there, and if there is no such rank.
    pub fn of_rank(
        &self,
        shape: &MlaShape,
        sharing: &Sharing,
        moments: Option<&LatentMoments>,
        t: usize,
    ) -> RankTensors {
        let r = self.rank();
        assert!(sharing.ranks > 0 && r.is_multiple_of(sharing.ranks), "ranks divide the latent");
        assert!(t < sharing.ranks, "rank {t} of {}", sharing.ranks);
        let correction = match moments {
            Some(moments) if !sharing.shared_rms && self.gain.is_some() => rms_corrections(moments, sharing.ranks)[t],
            _ => 1.0,
        };
        let columns = sharing.columns(r, t);
        let mut kv_b = self.kv_b.slice(s![.., columns.clone()]).to_owned();
        if sharing.logit_scale != 1.0 {
            let head = shape.qk_nope_head_dim + shape.v_head_dim;
            for (_, mut row) in
                kv_b.rows_mut().into_iter().enumerate().filter(|(i, _)| i % head < shape.qk_nope_head_dim)
            {
                row *= sharing.logit_scale;
            }
        }
        let own = |gain: &Array1<f64>| gain.slice(s![columns.clone()]).mapv(|g| (g * correction) as f32).to_vec();
        RankTensors {
            gain: self.gain.as_ref().map(own).unwrap_or_default(),
            kv_b: kv_b.mapv(|x| x as f32),
            columns: columns.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::factor::linalg::matmul;

    fn shape(rank: usize) -> MlaShape {
        MlaShape {
            kv_lora_rank: rank,
            q_lora_rank: None,
            qk_nope_head_dim: 3,
            qk_rope_head_dim: 2,
            v_head_dim: 2,
            bias: false,
            query_bias: false,
            latent_norm: true,
            latent_eps: 1e-6,
            norm_width: 2,
            score_scale: 1.0,
        }
    }

    fn sample(rows: usize, columns: usize, seed: usize) -> Array2<f64> {
        Array2::from_shape_fn((rows, columns), |(i, j)| {
            ((i * 37 + j * 101 + i * j * 7 + seed) % 97) as f64 / 48.5 - 1.0
        })
    }

    fn weights(rank: usize) -> LatentWeights {
        LatentWeights {
            kv_a: sample(rank + 2, 9, 1),
            bias: None,
            gain: Some(Array1::from_shape_fn(rank, |i| 1.0 + i as f64 * 0.1)),
            kv_b: sample(2 * 5, rank, 2),
        }
    }

    fn moments(rank: usize) -> LatentMoments {
        let n = sample(200, rank, 5);
        LatentMoments {
            mean: n.mean_axis(Axis(0)).unwrap(),
            second: matmul(&n.t(), &n) / 200.0,
            covariance: matmul(&n.t(), &n) / 200.0,
            reads: Array2::eye(rank),
        }
    }

    #[test]
    fn slices_side_by_side_are_the_whole() {
        let (w, m) = (weights(12), moments(12));
        for ranks in [1, 2, 3, 4, 6, 12] {
            let sharing = Sharing { ranks, shared_rms: true, logit_scale: 1.0 };
            let parts = w.ranks(&shape(12), &sharing, Some(&m));
            let views: Vec<_> = parts.iter().map(|p| p.kv_b.view()).collect();
            assert_eq!(ndarray::concatenate(Axis(1), &views).unwrap(), w.kv_b.mapv(|x| x as f32));
            assert_eq!(parts.iter().flat_map(|p| p.columns.clone()).collect::<Vec<_>>(), (0..12).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_logit_scale_is_on_keys_alone() {
        let w = weights(12);
        let sharing = Sharing { ranks: 3, shared_rms: true, logit_scale: 2.0 };
        for part in w.ranks(&shape(12), &sharing, None) {
            for (i, row) in part.kv_b.rows().into_iter().enumerate() {
                let plain = w.kv_b.slice(s![i, part.columns.clone()]).mapv(|v| v as f32);
                assert_eq!(row, plain * if i % 5 < 3 { 2.0 } else { 1.0 });
            }
        }
    }

    #[test]
    fn corrections_are_one_where_a_norm_does_nothing_or_slices_are_alike() {
        let mut m = moments(8);
        m.second = Array2::from_diag(&Array1::from_vec(vec![1.0; 8]));
        assert!(rms_corrections(&m, 4).iter().all(|a| (a - 1.0).abs() < 1e-12));
        m.second = Array2::from_diag(&Array1::from_vec(vec![1.75, 1.75, 0.25, 0.25]));
        let a = rms_corrections(&m, 2);
        assert!((a[0] - 1.75_f64.sqrt()).abs() < 1e-12 && (a[1] - 0.5).abs() < 1e-12);
        m.second *= 1e-9;
        assert!(rms_corrections(&m, 2).iter().all(|a| (a - 1.0).abs() < 1e-8));
    }

    #[test]
    fn moments_rotate_as_their_latents_do() {
        let n = sample(50, 8, 3);
        let of = |n: &Array2<f64>| LatentMoments {
            mean: n.mean_axis(Axis(0)).unwrap(),
            second: matmul(&n.t(), n) / 50.0,
            covariance: matmul(&n.t(), n) / 50.0,
            reads: matmul(&n.t(), n),
        };
        let transform = LatentTransform::hadamard(8);
        let mut rotated = n.clone();
        transform.apply(rotated.view_mut());
        let (a, b) = (of(&n).transformed(&transform), of(&rotated));
        assert!((&a.second - &b.second).iter().chain((&a.mean - &b.mean).iter()).all(|d| d.abs() < 1e-12));
    }
}
