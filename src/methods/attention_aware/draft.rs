//! Method `attention-aware`: closed-form conversion that looks at what attention reads (docs/maths.md, sections 2 to 4).
//!
//! 1. Keys become query-weighted complex principal components per frequency; the components that are worth most keep
//!    their rotation in shared slots.
//! 2. Every other component loses its rotation and gets the best constant phase of its head instead.
//! 3. Keys without rotation and values share one latent, chosen in the metric of queries and output projection, on the
//!    centred covariance.
//! 4. The refits of [`crate::convert`] then fit queries and keys on the source's scores, each head's value up-projection on
//!    what the converted attention really pools, and the output projection on the source's attention output.

use faer::c64;
use ndarray::{Array1, Array2, Axis, concatenate, s};

use super::{Step, Steps};
use crate::arch::AttentionSource;
use crate::calibrate::Moments;
use crate::error::MethodError;
use crate::factor::joint::joint_low_rank;
use crate::factor::linalg::matmul;
use crate::factor::slots::{PairComponents, pair_components, rotation_value};
use crate::mla::{MlaLayer, Query};

/// Weight of key energy against value energy in the joint low rank: an error of a logit moves every value at once
/// (measured flat between 1.5 and 2; docs/maths.md, section 3).
pub const KEY_WEIGHT: f64 = 1.75;

/// Slot analysis of one layer: what each component of each frequency is worth with its rotation.
pub struct SlotAnalysis {
    components: PairComponents,
    /// `[d / 2, g]`: loss without rotation, per component.
    pub value: Array2<f64>,
}

/// A converted layer before its refits.
pub struct Draft {
    /// The layer; its biases are complete.
    pub layer: MlaLayer,
    /// Share of the weighted joint energy outside the latent.
    pub rank_loss: f64,
    /// Share of the rotated score energy that no slot holds and no phase explains.
    pub rope_loss: f64,
}

/// `E |q_{h,j}|^2`, `[H, d / 2]`.
fn query_energy(source: &AttentionSource, moments: &Moments) -> Array2<f64> {
    let (d, half) = (source.head_dim, source.head_dim / 2);
    let c = moments.second();
    let wc = matmul(&source.wq, &c);
    let mean = moments.mean();
    let mut energy = Array1::from_shape_fn(source.heads * d, |i| wc.row(i).dot(&source.wq.row(i)));
    if let Some(b) = &source.bq {
        let wm = source.wq.dot(&mean);
        energy = energy + 2.0 * &wm * b + b * b;
    }
    Array2::from_shape_fn((source.heads, half), |(h, j)| energy[h * d + j] + energy[h * d + j + half])
}

/// Analyse one layer's keys. `phases` is `alpha[h, j]` of [`crate::calibrate::DistanceProfile::phases`].
///
/// # Errors
/// [`MethodError::Factor`] from an eigenvalue problem.
pub fn analyse_slots(
    source: &AttentionSource,
    moments: &Moments,
    phases: &Array2<c64>,
    steps: &Steps,
) -> Result<SlotAnalysis, MethodError> {
    let (g, half, n) = (source.kv_heads, source.head_dim / 2, source.group());
    let mut energy = query_energy(source, moments);
    if !steps.has(Step::QueryWeight) {
        energy.fill(1.0);
    }
    let per_kv = Array2::from_shape_fn((g, half), |(a, j)| (a * n..(a + 1) * n).map(|h| energy[[h, j]]).sum());
    let ck = moments.output_moment(&source.wk, source.bk.as_ref());
    let components = pair_components(&ck, &per_kv, source.head_dim)?;
    // Without the phase step a pair is left where distance 0 puts it: E |e^{-i theta D} - 1|^2 = 2 - 2 Re alpha.
    let replaced = if steps.has(Step::Phase) {
        phases.clone()
    } else {
        phases.mapv(|a| c64::new((1.0 - (2.0 - 2.0 * a.re)).max(0.0).sqrt(), 0.0))
    };
    let value = rotation_value(&components, &energy, &replaced);
    Ok(SlotAnalysis { components, value })
}

/// Real `[2, 2]` action of multiplication by `u` on `(Re, Im)`, added to two rows of `out` at two columns.
fn put(out: &mut Array2<f64>, row: usize, re: usize, im: usize, u: c64) {
    out[[row, re]] += u.re;
    out[[row, im]] -= u.im;
    out[[row + 1, re]] += u.im;
    out[[row + 1, im]] += u.re;
}

/// `(frequency, component)`.
type Component = (usize, usize);

/// Which `(frequency, component)` pairs get slots, and which go to the latent, both in order of frequency.
fn partition(value: &Array2<f64>, slots: &[usize]) -> (Vec<Component>, Vec<Component>) {
    let (half, g) = value.dim();
    let (mut kept, mut dropped) = (Vec::new(), Vec::new());
    for j in 0..half {
        let mut order: Vec<usize> = (0..g).collect();
        order.sort_by(|&a, &b| value[[j, b]].total_cmp(&value[[j, a]]).then(a.cmp(&b)));
        for (rank, &c) in order.iter().enumerate() {
            if rank < slots[j] { kept.push((j, c)) } else { dropped.push((j, c)) }
        }
    }
    (kept, dropped)
}

/// Settings of one draft.
pub struct DraftSettings<'a> {
    /// Slots per frequency, `[d / 2]`.
    pub slots: &'a [usize],
    /// `r`.
    pub rank: usize,
    /// Steps switched on.
    pub steps: Steps,
    /// Whether the target can carry biases.
    pub bias: bool,
}

/// Maps between the source's heads and lists of components.
struct Maps<'a> {
    /// KV heads `g`, head width `d`, query heads of a KV head `n`.
    dims: (usize, usize, usize),
    analysis: &'a SlotAnalysis,
    /// Best constant phases, `[H, d / 2]`; `None` where components without rotation keep their own.
    phases: Option<&'a Array2<c64>>,
}

impl Maps<'_> {
    /// From all keys to components, `[2 * components, g d]`.
    fn keys(&self, list: &[Component]) -> Array2<f64> {
        let ((g, d, _), (u, w)) = (self.dims, (&self.analysis.components.basis, &self.analysis.components.weight));
        let mut map = Array2::zeros((2 * list.len(), g * d));
        for (i, &(j, c)) in list.iter().enumerate() {
            for a in 0..g {
                put(&mut map, 2 * i, a * d + j, a * d + j + d / 2, u[j][[a, c]].conj() * w[[j, a]]);
            }
        }
        map
    }

    /// From the queries of head `h` to components that rotate or do not, `[2 * components, d]`.
    fn queries(&self, list: &[Component], h: usize, rotated: bool) -> Array2<f64> {
        let ((_, d, n), (u, w)) = (self.dims, (&self.analysis.components.basis, &self.analysis.components.weight));
        let a = h / n;
        let mut map = Array2::zeros((2 * list.len(), d));
        for (i, &(j, c)) in list.iter().enumerate() {
            let mut factor = u[j][[a, c]].conj() / w[[j, a]];
            if let Some(phases) = self.phases.filter(|_| !rotated) {
                factor *= phases[[h, j]].conj();
            }
            put(&mut map, 2 * i, j, j + d / 2, factor);
        }
        map
    }
}

/// Rotated queries `[H d_R, D]` and their bias, every component times its entry of `scale`.
fn rotated_queries(
    source: &AttentionSource,
    maps: &Maps<'_>,
    kept: &[Component],
    scale: &[f64],
) -> (Array2<f64>, Option<Array1<f64>>) {
    let (heads, d, rope_dim) = (source.heads, source.head_dim, 2 * kept.len());
    let mut q_rope = Array2::zeros((heads * rope_dim, source.hidden()));
    let mut q_rope_bias = source.bq.as_ref().map(|_| Array1::zeros(heads * rope_dim));
    for h in 0..heads {
        let mut map = maps.queries(kept, h, true);
        for (row, mut values) in map.rows_mut().into_iter().enumerate() {
            values *= scale[row / 2];
        }
        let (rows, out) = (h * d..(h + 1) * d, h * rope_dim..(h + 1) * rope_dim);
        q_rope.slice_mut(s![out.clone(), ..]).assign(&matmul(&map, &source.wq.slice(s![rows.clone(), ..])));
        if let (Some(b), Some(bq)) = (&mut q_rope_bias, &source.bq) {
            b.slice_mut(s![out]).assign(&map.dot(&bq.slice(s![rows])));
        }
    }
    (q_rope, q_rope_bias)
}

/// Second moment of `z x` about the means that the target carries; of `z`, the first `keys` rows make keys, the others values.
fn centred_moment(z: &Array2<f64>, keys: usize, moments: &Moments, centred: bool, bias: bool) -> Array2<f64> {
    let mut cz = crate::factor::linalg::symmetrise(&matmul(&matmul(z, &moments.second()), &z.t()));
    if !centred {
        return cz;
    }
    // Constants in keys cancel in the softmax whatever the target; constants in values need an output bias.
    let mean = moments.mean();
    let mut zm = z.dot(&mean);
    if !bias {
        zm.slice_mut(s![keys..]).fill(0.0);
    }
    let zm = zm.insert_axis(Axis(1));
    cz = cz - matmul(&zm, &zm.t());
    if !bias {
        // Cross terms: E[(k - mean) v^T] with v uncentred.
        let (km, vm) = (z.slice(s![..keys, ..]).dot(&mean), z.slice(s![keys.., ..]).dot(&mean));
        let cross = matmul(&km.insert_axis(Axis(1)), &vm.insert_axis(Axis(0)));
        let mut block = cz.slice_mut(s![..keys, keys..]);
        block -= &cross;
        let mut block = cz.slice_mut(s![keys.., ..keys]);
        block -= &cross.t();
    }
    cz
}

/// What errors of keys and of values cost: the moment of the queries that meet the keys, the Gram matrix of the output projection
/// that meets the values. `maps`: per head, from queries to the keys' components.
fn metrics(
    source: &AttentionSource,
    moments: &Moments,
    maps: &[Array2<f64>],
    keys: usize,
) -> (Array2<f64>, Array2<f64>) {
    let (g, d, n) = (source.kv_heads, source.head_dim, source.group());
    let mut key_metric = Array2::zeros((keys, keys));
    let mut value_metric = Array2::zeros((g * d, g * d));
    for (h, map) in maps.iter().enumerate() {
        let (a, rows) = (h / n, h * d..(h + 1) * d);
        let wq = source.wq.slice(s![rows.clone(), ..]).to_owned();
        let bq = source.bq.as_ref().map(|b| b.slice(s![rows.clone()]).to_owned());
        let cq = moments.output_moment(&wq, bq.as_ref());
        key_metric += &matmul(&matmul(map, &cq), &map.t());
        let wo = source.wo.slice(s![.., rows]);
        let mut block = value_metric.slice_mut(s![a * d..(a + 1) * d, a * d..(a + 1) * d]);
        block += &matmul(&wo.t(), &wo);
    }
    (key_metric, value_metric)
}

/// Convert one layer, up to the refits.
///
/// # Errors
/// [`MethodError::Factor`]: a rank above what there is, or a failed decomposition.
pub fn draft(
    source: &AttentionSource,
    moments: &Moments,
    phases: &Array2<c64>,
    analysis: &SlotAnalysis,
    settings: &DraftSettings<'_>,
) -> Result<Draft, MethodError> {
    let (heads, g, d, n) = (source.heads, source.kv_heads, source.head_dim, source.group());
    let (kept, dropped) = partition(&analysis.value, settings.slots);
    let phases = settings.steps.has(Step::Phase).then_some(phases);
    let between = Maps { dims: (g, d, n), analysis, phases };

    // Rotated part, scaled to unit energy per slot so that the cached key is of the latent's size.
    let mut to_rope = between.keys(&kept);
    let slot_scale: Vec<f64> = kept
        .iter()
        .map(|&(j, c)| {
            let e = analysis.components.energy[[j, c]];
            if e > 0.0 { (e / 2.0).sqrt() } else { 1.0 }
        })
        .collect();
    for (row, mut values) in to_rope.rows_mut().into_iter().enumerate() {
        values /= slot_scale[row / 2];
    }
    let (q_rope, q_rope_bias) = rotated_queries(source, &between, &kept, &slot_scale);

    // Latent part: z = [k_N; v], centred where the target can carry the constants.
    let to_latent = between.keys(&dropped);
    let keys = to_latent.nrows();
    let z = concatenate![Axis(0), matmul(&to_latent, &source.wk), source.wv];
    let centred = settings.steps.has(Step::Centring);
    let cz = centred_moment(&z, keys, moments, centred, settings.bias);
    let maps: Vec<Array2<f64>> = (0..heads).map(|h| between.queries(&dropped, h, false)).collect();
    let (key_metric, value_metric) = match settings.steps.has(Step::Metric) {
        true => metrics(source, moments, &maps, keys),
        false => (Array2::eye(keys), Array2::eye(g * d)),
    };
    let rank = settings.rank;
    let joint = joint_low_rank(&cz, &key_metric, &value_metric, KEY_WEIGHT, rank)?;
    let latent = matmul(&joint.down, &z);
    let (up_k, up_v) = (joint.up.slice(s![..keys, ..]), joint.up.slice(s![keys.., ..]));
    let mut k_up = Array2::zeros((heads * d, rank));
    let mut v_up = Array2::zeros((heads * d, rank));
    for (h, map) in maps.iter().enumerate() {
        let (a, rows) = (h / n, h * d..(h + 1) * d);
        k_up.slice_mut(s![rows.clone(), ..]).assign(&matmul(&map.t(), &up_k));
        v_up.slice_mut(s![rows, ..]).assign(&up_v.slice(s![a * d..(a + 1) * d, ..]));
    }

    // Output bias: the values' own bias, and the constant that the centred latent does not carry.
    let mut wo_bias = crate::methods::output_bias_with_values(source);
    if centred && settings.bias {
        let mean = moments.mean();
        let constant = source.wv.dot(&mean) - up_v.dot(&latent.dot(&mean));
        let repeated = Array1::from_shape_fn(heads * d, |i| constant[(i / d / n) * d + i % d]);
        let carried = source.wo.dot(&repeated);
        wo_bias = Some(wo_bias.map_or(carried.clone(), |b| b + &carried));
    }
    let total: f64 = analysis.value.sum();
    let lost: f64 = dropped.iter().map(|&(j, c)| analysis.value[[j, c]]).sum();
    let layer = MlaLayer {
        heads,
        query: Query {
            down: None,
            nope: source.wq.clone(),
            nope_bias: source.bq.clone(),
            rope: q_rope,
            rope_bias: q_rope_bias,
        },
        latent,
        k_rope: matmul(&to_rope, &source.wk),
        k_rope_bias: source.bk.as_ref().map(|b| to_rope.dot(b)),
        k_up,
        v_up,
        wo: source.wo.clone(),
        wo_bias,
        rope_freq: kept.iter().map(|&(j, _)| source.inv_freq[j]).collect(),
        score_scale: source.score_scale,
    };
    Ok(Draft { layer, rank_loss: joint.loss(), rope_loss: if total > 0.0 { lost / total } else { 0.0 } })
}
