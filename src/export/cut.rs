//! What of a layer's widths is used, and the layer without the rest: zero padding is cut off before other padding is added.

use ndarray::{Array1, Array2, Axis, s};

use crate::mla::{Geometry, MlaLayer};

/// The widths that all layers together use.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Extent {
    rank: usize,
    q_rank: Option<usize>,
    nope: usize,
    value: usize,
    /// Which rotated pairs are used.
    pairs: Vec<bool>,
    /// Whether some layer has a bias of queries.
    pub query_bias: bool,
    /// Whether some layer has another bias.
    pub bias: bool,
}

impl Extent {
    /// What `layer` uses. Of its widths only an end is cut off, so that a coordinate that happens to be zero stays.
    pub fn of(layer: &MlaLayer) -> Self {
        let heads = layer.heads;
        let live = |v: &f64| *v != 0.0;
        let (nope, value) = (layer.nope_dim(), layer.value_dim());
        let row = |m: &Array2<f64>, i: usize| m.row(i).iter().any(live);
        let entry = |b: &Option<Array1<f64>>, i: usize| b.as_ref().is_some_and(|b| b[i] != 0.0);
        let used = |width: usize, reads: &dyn Fn(usize) -> bool| {
            (0..width).rev().find(|j| (0..heads).any(|h| reads(h * width + j))).map_or(0, |j| j + 1)
        };
        let query = |i: usize| row(&layer.query.nope, i) || entry(&layer.query.nope_bias, i);
        let rotated = |h: usize, i: usize| {
            let at = h * layer.rope_dim() + i;
            row(&layer.query.rope, at) || entry(&layer.query.rope_bias, at)
        };
        let key = |i: usize| row(&layer.k_rope, i) || entry(&layer.k_rope_bias, i);
        let pair = |p: usize| {
            let rows = [2 * p, 2 * p + 1];
            rows.iter().any(|i| key(*i)) && (0..heads).any(|h| rows.iter().any(|i| rotated(h, *i)))
        };
        Self {
            rank: layer.rank(),
            q_rank: layer.query.down.as_ref().map(Array2::nrows),
            nope: used(nope, &|i| query(i) && row(&layer.k_up, i)),
            value: used(value, &|i| row(&layer.v_up, i) && layer.wo.column(i).iter().any(live)).max(1),
            pairs: (0..layer.rope_dim() / 2).map(pair).collect(),
            query_bias: layer.query.nope_bias.is_some() || layer.query.rope_bias.is_some(),
            bias: layer.k_rope_bias.is_some() || layer.wo_bias.is_some(),
        }
    }

    /// What this and another layer use.
    pub fn and(mut self, other: Self) -> Self {
        self.rank = self.rank.max(other.rank);
        self.q_rank = self.q_rank.max(other.q_rank);
        self.nope = self.nope.max(other.nope);
        self.value = self.value.max(other.value);
        self.pairs.iter_mut().zip(other.pairs).for_each(|(own, other)| *own |= other);
        self.query_bias |= other.query_bias;
        self.bias |= other.bias;
        self
    }

    /// The rotated pairs that are kept: the first of every `k`, which lie on the narrower grid, or the first ones, or all.
    pub fn kept_pairs(&self) -> Vec<usize> {
        let all = self.pairs.len();
        let holds = |kept: &[usize]| (0..all).all(|p| !self.pairs[p] || kept.contains(&p));
        let every = |n: usize| (0..n).map(|p| p * (all / n)).collect::<Vec<_>>();
        (1..=all)
            .flat_map(|n| [all.is_multiple_of(n).then(|| every(n)), Some((0..n).collect())])
            .flatten()
            .find(|kept| holds(kept))
            .unwrap_or_else(|| (0..all).collect())
    }

    /// The widths that are left.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            kv_lora_rank: self.rank,
            q_lora_rank: self.q_rank,
            qk_nope_head_dim: self.nope,
            qk_rope_head_dim: 2 * self.kept_pairs().len(),
            v_head_dim: self.value,
        }
    }

    /// `layer` with these widths; the score scale stays.
    pub fn cut(&self, layer: &MlaLayer) -> MlaLayer {
        let (heads, pairs) = (layer.heads, self.kept_pairs());
        let first = |width: usize, n: usize| -> Vec<usize> {
            (0..heads).flat_map(|h| (0..n).map(move |i| h * width + i)).collect()
        };
        let turned = |heads: usize| -> Vec<usize> {
            let width = layer.rope_dim();
            let rows = |h: usize| pairs.iter().flat_map(move |p| [h * width + 2 * p, h * width + 2 * p + 1]);
            (0..heads).flat_map(rows).collect()
        };
        let vector = |b: &Option<Array1<f64>>, rows: &[usize]| b.as_ref().map(|b| b.select(Axis(0), rows));
        let (nope, value) = (first(layer.nope_dim(), self.nope), first(layer.value_dim(), self.value));
        let (query, key) = (turned(heads), turned(1));
        let mut out = layer.clone();
        out.query.nope = layer.query.nope.select(Axis(0), &nope);
        out.query.nope_bias = vector(&layer.query.nope_bias, &nope);
        out.query.rope = layer.query.rope.select(Axis(0), &query);
        out.query.rope_bias = vector(&layer.query.rope_bias, &query);
        out.k_rope = layer.k_rope.select(Axis(0), &key);
        out.k_rope_bias = vector(&layer.k_rope_bias, &key);
        out.k_up = widen(&layer.k_up.select(Axis(0), &nope), 1, self.rank);
        out.v_up = widen(&layer.v_up.select(Axis(0), &value), 1, self.rank);
        out.latent = widen(&layer.latent, 0, self.rank);
        out.wo = layer.wo.select(Axis(1), &value);
        if let (Some(down), Some(rank)) = (&layer.query.down, self.q_rank) {
            out.query.nope = widen(&out.query.nope, 1, rank);
            out.query.rope = widen(&out.query.rope, 1, rank);
            out.query.down = Some(widen(down, 0, rank));
        }
        out.rope_freq = pairs.iter().map(|p| layer.rope_freq[*p]).collect();
        out
    }
}

/// `m` with zeros after it, `n` along `axis`.
fn widen(m: &Array2<f64>, axis: usize, n: usize) -> Array2<f64> {
    let (mut rows, mut columns) = m.dim();
    let size = if axis == 0 { &mut rows } else { &mut columns };
    if *size == n {
        return m.clone();
    }
    *size = n;
    let mut out = Array2::zeros((rows, columns));
    out.slice_mut(s![..m.nrows(), ..m.ncols()]).assign(m);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mla::Query;
    use crate::random::uniform;
    use crate::target::pad::pad;

    fn layer() -> MlaLayer {
        let mut state = 3;
        let mut random = |r: usize, c: usize| Array2::from_shape_fn((r, c), |_| uniform(&mut state) - 0.5);
        let (heads, d, r, nope, rope, value) = (2, 8, 5, 3, 4, 3);
        MlaLayer {
            heads,
            query: Query {
                down: None,
                nope: random(heads * nope, d),
                nope_bias: None,
                rope: random(heads * rope, d),
                rope_bias: None,
            },
            latent: random(r, d),
            k_rope: random(rope, d),
            k_rope_bias: None,
            k_up: random(heads * nope, r),
            v_up: random(heads * value, r),
            wo: random(d, heads * value),
            wo_bias: None,
            rope_freq: vec![1.0, 0.01],
            score_scale: 0.3,
        }
    }

    #[test]
    fn what_padding_added_is_cut_off_again() {
        let made = layer();
        let wide =
            Geometry { kv_lora_rank: 5, q_lora_rank: None, qk_nope_head_dim: 8, qk_rope_head_dim: 16, v_head_dim: 8 };
        let padded = pad(&made, &wide, 1e4);
        let extent = Extent::of(&padded);
        assert_eq!(extent.kept_pairs(), [0, 4]);
        let cut = extent.cut(&padded);
        assert_eq!(cut.query.nope, made.query.nope);
        assert_eq!(cut.query.rope, made.query.rope);
        assert_eq!((cut.k_rope, cut.k_up, cut.v_up), (made.k_rope, made.k_up, made.v_up));
        assert_eq!((cut.latent, cut.wo, cut.rope_freq), (made.latent, made.wo, made.rope_freq));
    }

    #[test]
    fn layers_share_the_widest_extent() {
        let wide = layer();
        let mut narrow = layer();
        narrow.latent = narrow.latent.slice(s![..4, ..]).to_owned();
        narrow.k_up = narrow.k_up.slice(s![.., ..4]).to_owned();
        narrow.v_up = narrow.v_up.slice(s![.., ..4]).to_owned();
        narrow.query.rope.fill(0.0);
        let extent = Extent::of(&narrow).and(Extent::of(&wide));
        assert_eq!(extent.geometry(), Extent::of(&wide).geometry());
        let cut = extent.cut(&narrow);
        assert_eq!(cut.latent.nrows(), 5);
        assert!(cut.latent.row(4).iter().all(|v| *v == 0.0));
    }
}
