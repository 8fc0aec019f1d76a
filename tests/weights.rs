//! Methods that factorise weights: X-EcoMLA and MHA2MLA, against their definitions and on whole models.

#[path = "common/random.rs"]
mod random;

#[path = "common/models.rs"]
mod models;

use std::path::Path;

use gqa2mla::arch::{AttentionSource, load_attention_source};
use gqa2mla::calibrate::{LatentAttention, output_projection};
use gqa2mla::convert::{
    Budget, CalibrationSettings, ConversionReport, ConvertError, ConvertSettings, Method, OutputDtype, TargetKind,
    WeightSettings, convert,
};
use gqa2mla::factor::svd::svd;
use gqa2mla::methods::MlaLayer;
use gqa2mla::methods::mha2mla::{self, SvdKind};
use gqa2mla::methods::partial_rope::{PartialRope, Slot};
use gqa2mla::methods::x_ecomla::{self, Ranks};
use gqa2mla::observe::Silent;
use gqa2mla::runtime::{Cpu, Model};

use gqa2mla::verify::{Comparison, compare, windows_from_text};
use models::{fixture, open};
use ndarray::{Array1, Array2, Axis, concatenate, s};
use random::split_mix;
use serde_json::Value;

fn settings(method: Method) -> ConvertSettings {
    let calibration = CalibrationSettings { samples: 4, seq_len: 128, ..CalibrationSettings::default() };
    ConvertSettings { method, calibration, dtype: Some(OutputDtype::F32), force: true, ..ConvertSettings::default() }
}

fn run(from: &Path, to: &Path, settings: &ConvertSettings) -> Result<ConversionReport, String> {
    let (source, arch) = open(from);
    convert(&source, &arch, settings, to, &|_| Vec::new(), &Silent).map_err(|e: ConvertError| e.to_string())
}

fn side_by_side(from: &Path, to: &Path, windows: &[Vec<u32>]) -> Comparison {
    let ((s, sa), (c, ca)) = (open(from), open(to));
    compare(&Model::new(&s, &sa, &Cpu), &Model::new(&c, &ca, &Cpu), windows, &Silent).expect("both models run")
}

fn heldout(seq_len: usize, count: usize) -> Vec<Vec<u32>> {
    let (source, _) = open(&fixture("pico-trained"));
    let tokens = source.tokenizer().expect("tokenizer").encode(gqa2mla::calibrate::bundled_heldout()).expect("encodes");
    windows_from_text(&tokens, seq_len, 1, Some(count))
}

/// Trained pico with `settings`: its excess in nats per token.
fn excess(settings: &ConvertSettings) -> f64 {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out");
    run(&fixture("pico-trained"), &to, settings).expect("converts");
    let c = side_by_side(&fixture("pico-trained"), &to, &heldout(128, 8));
    (c.ppl_converted / c.ppl_source).ln()
}

/// Random attention: `heads` query heads of 8 values on `kv_heads`, hidden size 24, biases everywhere; the last `still` of 4
/// pairs do not turn.
fn attention(heads: usize, kv_heads: usize, still: usize) -> AttentionSource {
    let (d, hidden) = (8, 24);
    let mut state = 7;
    let mut value = || split_mix(&mut state) as f64 / u64::MAX as f64 - 0.5;
    let mut matrix = |rows: usize, columns: usize| Array2::from_shape_simple_fn((rows, columns), &mut value);
    let mut out = AttentionSource {
        heads,
        kv_heads,
        head_dim: d,
        wq: matrix(heads * d, hidden),
        wk: matrix(kv_heads * d, hidden),
        wv: matrix(kv_heads * d, hidden),
        wo: matrix(hidden, heads * d),
        bq: None,
        bk: None,
        bv: None,
        bo: None,
        inv_freq: (0..d / 2).map(|j| if j + still < d / 2 { 0.7_f64.powi(j as i32) } else { 0.0 }).collect(),
        score_scale: 0.9,
        score_softcap: None,
    };
    let mut vector = |n: usize| Some(matrix(n, 1).column(0).to_owned());
    (out.bq, out.bk) = (vector(heads * d), vector(kv_heads * d));
    (out.bv, out.bo) = (vector(kv_heads * d), vector(hidden));
    out
}

const TOKENS: usize = 9;

fn inputs() -> Array2<f32> {
    Array2::from_shape_fn((TOKENS, 24), |(t, i)| ((t * 24 + i) as f32 * 0.37).sin())
}

fn project(x: &Array2<f64>, w: &Array2<f64>, b: Option<&Array1<f64>>) -> Array2<f64> {
    let out = x.dot(&w.t());
    b.map_or(out.clone(), |b| out + b)
}

/// Causal attention of one source layer by its definition, in f64: pairs `(j, j + d/2)` turn by `freq(a, j)`. Keys are given by
/// KV head, so that an approximation of them can be put in their place.
fn by_definition(
    a: &AttentionSource,
    (q, k, v): (&Array2<f64>, &Array2<f64>, &Array2<f64>),
    freq: impl Fn(usize, usize) -> f64,
) -> Array2<f64> {
    let (d, n, half) = (a.head_dim, a.heads / a.kv_heads, a.head_dim / 2);
    let mut heads = Array2::zeros((TOKENS, a.heads * d));
    for h in 0..a.heads {
        let g = h / n;
        for m in 0..TOKENS {
            let score = |t: usize| {
                (0..half)
                    .map(|j| {
                        let (sin, cos) = (freq(g, j) * (m as f64 - t as f64)).sin_cos();
                        let (qr, qi) = (q[[m, h * d + j]], q[[m, h * d + half + j]]);
                        let (kr, ki) = (k[[t, g * d + j]], k[[t, g * d + half + j]]);
                        // Re(q conj(k) e^(i f (m - t)))
                        (qr * kr + qi * ki) * cos - (qi * kr - qr * ki) * sin
                    })
                    .sum::<f64>()
            };
            let weights: Vec<f64> = (0..=m).map(|t| (a.score_scale * score(t)).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (t, w) in weights.iter().enumerate() {
                let value = v.slice(s![t, g * d..(g + 1) * d]);
                heads.slice_mut(s![m, h * d..(h + 1) * d]).scaled_add(w / total, &value);
            }
        }
    }
    project(&heads, &a.wo, a.bo.as_ref())
}

fn source_output(a: &AttentionSource) -> Array2<f64> {
    let x = inputs().mapv(f64::from);
    let q = project(&x, &a.wq, a.bq.as_ref());
    let k = project(&x, &a.wk, a.bk.as_ref());
    let v = project(&x, &a.wv, a.bv.as_ref());
    by_definition(a, (&q, &k, &v), |_, j| a.inv_freq[j])
}

fn output(layer: &MlaLayer) -> Array2<f64> {
    let x = inputs();
    let heads = LatentAttention::new(layer, x.view(), &[TOKENS]).outputs();
    output_projection(layer, &heads).mapv(f64::from)
}

/// Values of order one through sums of at most 64 terms in f32, a few layers of them.
fn assert_close(found: &Array2<f64>, expected: &Array2<f64>) {
    let worst = (found - expected).iter().fold(0.0_f64, |m, e| m.max(e.abs()));
    assert!(worst < 2e-5, "{worst}");
}

fn shared(pairs: &[usize]) -> Vec<Slot> {
    pairs.iter().map(|&pair| Slot { pair, head: None }).collect()
}

fn own(heads: usize, pairs: &[usize]) -> Vec<Slot> {
    (0..heads).flat_map(|a| pairs.iter().map(move |&pair| Slot { pair, head: Some(a) })).collect()
}

#[test]
fn at_full_rank_x_ecomla_loses_only_what_turned_and_the_difference_of_keys() {
    // One KV head: its mean is itself. The two pairs that turn keep their slots, the others do not turn in the source either.
    let source = attention(3, 1, 2);
    let ranks = Ranks { kv: 16, kv_width: 19, q: 24, q_width: 25 };
    let made = x_ecomla::convert(&source, &shared(&[0, 1]), &ranks, 4).expect("converts");
    assert!(made.rank_loss < 1e-12);
    assert_close(&output(&made.layer), &source_output(&source));
    // The published rows do not: imaginary parts as pairs, real parts cut off.
    let published = x_ecomla::convert_published(&source, &[1.0, 0.1], &ranks, 4).expect("converts");
    let worst = (&output(&published.layer) - &source_output(&source)).iter().fold(0.0_f64, |m, e| m.max(e.abs()));
    assert!(worst > 1e-2, "{worst}");
}

#[test]
fn x_ecomla_is_its_definition() {
    // Against the formulas: keys and values cut off at rank 6, the mean key in the kept pairs, nothing turned in the others.
    let source = attention(4, 2, 0);
    let (d, half, x) = (8, 4, inputs().mapv(f64::from));
    let kept = [1, 3];
    let ranks = Ranks { kv: 6, kv_width: 6, q: 10, q_width: 10 };
    let made = x_ecomla::convert(&source, &shared(&kept), &ranks, 4).expect("converts");
    let cut = |w: &Array2<f64>, rank: usize| {
        let f = svd(w, "test").expect("converges");
        f.left(rank, rank).dot(&f.scaled_right(rank, rank))
    };
    let joint = cut(&concatenate![Axis(0), source.wk, source.wv], 6);
    let q = project(&x, &cut(&source.wq, 10), source.bq.as_ref());
    // A bias of keys that do not turn cancels; it is left in to show that.
    let mut k = project(&x, &joint.slice(s![..16, ..]).to_owned(), source.bk.as_ref());
    let v = project(&x, &joint.slice(s![16.., ..]).to_owned(), source.bv.as_ref());
    let own = project(&x, &source.wk, source.bk.as_ref());
    for j in kept.into_iter().flat_map(|j| [j, j + half]) {
        let mean = (&own.column(j) + &own.column(d + j)) / 2.0;
        k.column_mut(j).assign(&mean);
        k.column_mut(d + j).assign(&mean);
    }
    let want = by_definition(&source, (&q, &k, &v), |_, j| if kept.contains(&j) { source.inv_freq[j] } else { 0.0 });
    assert_close(&output(&made.layer), &want);
}

#[test]
fn mha2mla_is_its_definition() {
    // Other pairs in each KV head, as 2-norm chooses them; the published layer with a rotated key per KV head.
    let source = attention(4, 2, 0);
    let x = inputs().mapv(f64::from);
    let kept = [[0, 2], [2, 3]];
    let slots: Vec<Slot> = (0..2).flat_map(|a| kept[a].map(|pair| Slot { pair, head: Some(a) })).collect();
    let still: Vec<usize> = (0..16).filter(|i| !kept[i / 8].contains(&(i % 4))).collect();
    let keys = source.wk.select(Axis(0), &still);
    let cut = |w: &Array2<f64>, rank: usize| {
        let f = svd(w, "test").expect("converges");
        f.scaled_left(rank, rank).dot(&f.right(rank, rank))
    };
    for kind in SvdKind::ALL {
        let made = mha2mla::convert(&source, &slots, 7, 4, kind).expect("converts");
        assert_eq!((made.layer.rank(), made.layer.rope_dim(), made.layer.nope_dim()), (7, 8, 4));
        let (low_k, low_v) = match kind {
            SvdKind::Joint => {
                let joint = cut(&concatenate![Axis(0), keys, source.wv], 7);
                (joint.slice(s![..8, ..]).to_owned(), joint.slice(s![8.., ..]).to_owned())
            }
            SvdKind::Split => (cut(&keys, 3), cut(&source.wv, 4)),
        };
        let mut wk = source.wk.clone();
        for (row, i) in low_k.rows().into_iter().zip(&still) {
            wk.row_mut(*i).assign(&row);
        }
        let q = project(&x, &source.wq, source.bq.as_ref());
        let k = project(&x, &wk, source.bk.as_ref());
        let v = project(&x, &low_v, source.bv.as_ref());
        let want =
            by_definition(&source, (&q, &k, &v), |a, j| if kept[a].contains(&j) { source.inv_freq[j] } else { 0.0 });
        assert_close(&output(&made.layer), &want);
    }
}

#[test]
fn at_full_rank_mha2mla_loses_only_what_turned() {
    let source = attention(6, 3, 2);
    for (kind, rank) in [(SvdKind::Joint, 24), (SvdKind::Split, 48)] {
        // Twelve rows of keys without rotation, 24 of values, hidden size 24.
        let made = mha2mla::convert(&source, &own(3, &[0, 1]), rank, 4, kind).expect("converts");
        assert!(made.rank_loss < 1e-12);
        assert_close(&output(&made.layer), &source_output(&source));
    }
}

#[test]
fn ranks_are_those_of_the_published_rule() {
    let golden: Vec<Value> =
        serde_json::from_slice(&fs_err::read(fixture("x-ecomla-ranks.json")).expect("readable")).expect("JSON");
    let (source, arch) = open(&fixture("pico-trained"));
    let mut seen = std::collections::BTreeSet::new();
    for g in golden {
        let number = |key: &str| g[key].as_u64().expect("a number") as usize;
        let attention = load_attention_source(&source, &arch, number("layer")).expect("loads");
        let (energy, divisor) = (g["energy"].as_f64().expect("a number"), number("divisor"));
        assert_eq!(x_ecomla::kv_rank(&attention, energy, divisor).expect("converges"), number("kv"), "{g}");
        assert_eq!(x_ecomla::q_rank(&attention, energy, divisor).expect("converges"), number("q"), "{g}");
        seen.insert(number("kv"));
    }
    assert!(seen.len() > 10, "ranks that differ");
}

#[test]
fn ranks_by_energy_differ_by_layer_and_are_padded_at_no_change() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let at = |target: TargetKind, divisor: usize, to: &Path| {
        let weights =
            WeightSettings { kv_energy: Some(0.8), q_energy: Some(0.9), rank_divisor: divisor, ..Default::default() };
        run(&fixture("pico-trained"), to, &ConvertSettings { target, weights, ..settings(Method::XEcomla) })
    };
    let (stock, remote) = (dir.path().join("stock"), dir.path().join("remote"));
    let report = at(TargetKind::DeepseekV3, 1, &stock).expect("converts");
    at(TargetKind::HfRemote, 1, &remote).expect("converts");
    let ranks: Vec<usize> = report.layers.iter().filter_map(|l| l.kv_rank).collect();
    assert_eq!(ranks.len(), 4);
    assert!(ranks.iter().any(|r| *r != ranks[0]), "{ranks:?}");
    assert_eq!(ranks.iter().max(), Some(&report.geometry.kv_lora_rank));
    // Rows behind a layer's own rank are zero, and the document in the folder knows the ranks.
    let (source, _) = open(&stock);
    for (layer, rank) in ranks.iter().enumerate() {
        let name = format!("model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight");
        let values = source.tensors.view(&name).expect("there").to_f32();
        let row = |i: usize| &values[i * 128..(i + 1) * 128];
        assert!((*rank..report.geometry.kv_lora_rank).all(|i| row(i).iter().all(|v| *v == 0.0)), "layer {layer}");
        assert!(row(rank - 1).iter().any(|v| *v != 0.0));
    }
    let document: Value =
        serde_json::from_slice(&fs_err::read(stock.join("conversion.json")).expect("readable")).expect("JSON");
    assert_eq!(document["layers"][1]["kv_rank"], ranks[1]);
    // Norms over the padded latent, of the stock class, and none, of ours: the same function.
    let c = side_by_side(&stock, &remote, &heldout(64, 2));
    assert!(c.max_abs_dlogit < 2e-4 && c.cached_vs_full_max_abs_dlogit < 2e-4, "{c:?}");
    let rounded = at(TargetKind::DeepseekV3, 8, &dir.path().join("eight")).expect("converts");
    assert!(rounded.layers.iter().zip(&ranks).all(|(l, r)| l.kv_rank == Some(r.next_multiple_of(8))));
}

#[test]
fn right_positions_are_no_worse_than_the_published_ones() {
    for (rope, rank) in [(8, 56), (8, 100)] {
        let base =
            ConvertSettings { qk_rope_head_dim: Some(rope), kv_lora_rank: Some(rank), ..settings(Method::XEcomla) };
        let ours = excess(&base);
        let weights = WeightSettings { published_layout: true, ..Default::default() };
        let published = excess(&ConvertSettings { weights, ..base });
        assert!(ours <= published, "{rope}+{rank}: {ours} ours, {published} published");
    }
}

#[test]
fn every_rule_writes_a_model_whose_slots_turn_as_the_source() {
    let (_, source) = open(&fixture("pico-trained"));
    for method in [Method::XEcomla, Method::Mha2mla] {
        for rule in PartialRope::ALL {
            let dir = tempfile::tempdir().expect("a temporary folder");
            let to = dir.path().join("out");
            let weights = WeightSettings { partial_rope: Some(rule), ..Default::default() };
            let s = ConvertSettings { kv_budget: Some(Budget::Percent(50.0)), weights, ..settings(method) };
            let report = run(&fixture("pico-trained"), &to, &s).expect("converts");
            assert_eq!(report.cache_values_per_token_per_layer, 64);
            for f in &report.rope_frequencies {
                assert!(
                    source.rope.inv_freq.iter().any(|own| (own / f - 1.0).abs() < 1e-6),
                    "{method}, {}",
                    rule.name()
                );
            }
            let c = side_by_side(&fixture("pico-trained"), &to, &heldout(64, 2));
            assert!(c.ppl_converted.is_finite() && c.cached_vs_full_max_abs_dlogit < 2e-4, "{method}: {c:?}");
        }
    }
}

#[test]
fn biases_and_norms_and_partial_rotation_are_carried() {
    // Random weights: what counts is that the written model is the one that was measured.
    for (name, method) in [
        ("pico-qwen2", Method::XEcomla),
        ("pico-qwen2", Method::Mha2mla),
        ("pico-qwen3", Method::XEcomla),
        ("pico-phi3", Method::Mha2mla),
        ("pico-phi3", Method::XEcomla),
    ] {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let (stock, remote) = (dir.path().join("stock"), dir.path().join("remote"));
        let from = dir.path().join("from");
        fs_err::create_dir(&from).expect("made");
        for entry in fs_err::read_dir(fixture(name)).expect("readable").flatten() {
            fs_err::copy(entry.path(), from.join(entry.file_name())).expect("copied");
        }
        fs_err::copy(fixture("pico-trained").join("tokenizer.json"), from.join("tokenizer.json")).expect("copied");
        // Bytes that the small vocabularies have.
        let text = dir.path().join("text.txt");
        fs_err::write(&text, "THE RIVER BENDS TWICE BEFORE 1900 AND 1950. ".repeat(60)).expect("written");
        let s = |target| {
            let mut s = ConvertSettings { target, ..settings(method) };
            s.calibration.files = vec![text.clone()];
            s
        };
        run(&from, &stock, &s(TargetKind::DeepseekV3)).unwrap_or_else(|e| panic!("{name}: {e}"));
        run(&from, &remote, &s(TargetKind::HfRemote)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let tokens: Vec<u32> = (0..40).map(|i| i * 5 % 60).collect();
        let c = side_by_side(&stock, &remote, &[tokens]);
        assert!(c.max_abs_dlogit < 2e-4, "{name}, {method}: {c:?}");
    }
}

#[test]
fn what_is_impossible_is_said_and_nothing_is_written() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out");
    let with = |method: Method, f: &dyn Fn(&mut ConvertSettings)| {
        let mut s = ConvertSettings { force: false, ..settings(method) };
        f(&mut s);
        s
    };
    let (x, m) = (Method::XEcomla, Method::Mha2mla);
    let cases: Vec<(&str, ConvertSettings)> = vec![
        ("--kv-energy 1.5 is no share", with(x, &|s| s.weights.kv_energy = Some(1.5))),
        ("--q-energy 0 is no share", with(x, &|s| s.weights.q_energy = Some(0.0))),
        ("--kv-energy NaN is no share", with(x, &|s| s.weights.kv_energy = Some(f64::NAN))),
        ("finds the ranks", with(x, &|s| (s.weights.kv_energy, s.kv_lora_rank) = (Some(0.9), Some(64)))),
        ("finds the ranks", with(x, &|s| (s.weights.q_energy, s.q_lora_rank) = (Some(0.9), Some(64)))),
        ("rank 128 at most", with(x, &|s| (s.kv_lora_rank, s.qk_rope_head_dim) = (Some(129), Some(8)))),
        ("rank 112 at most", with(m, &|s| (s.kv_lora_rank, s.qk_rope_head_dim) = (Some(113), Some(16)))),
        ("q_lora_rank 129 is larger", with(x, &|s| s.q_lora_rank = Some(129))),
        ("--q-lora-rank", with(m, &|s| s.q_lora_rank = Some(64))),
        ("--published-layout", with(m, &|s| s.weights.published_layout = true)),
        ("--svd", with(x, &|s| s.weights.svd = SvdKind::Split)),
        ("qk_rope_head_dim 12 cannot", with(m, &|s| s.qk_rope_head_dim = Some(12))),
        ("qk_rope_head_dim 16 cannot", with(x, &|s| s.qk_rope_head_dim = Some(16))),
        ("nothing is saved", with(x, &|s| s.weights.kv_energy = Some(1.0))),
        (
            "stock grid",
            with(x, &|s| {
                s.weights.partial_rope = Some(PartialRope::High);
                s.profile = Some(gqa2mla::convert::Profile::Portable);
            }),
        ),
    ];
    for (expected, s) in cases {
        let error = run(&fixture("pico-trained"), &to, &s).expect_err(expected);
        assert!(error.contains(expected), "expected `{expected}`, found: {error}");
        assert!(error.contains("hint: "), "{error}");
        assert_eq!(fs_err::read_dir(dir.path()).expect("readable").count(), 0, "something was left behind: {error}");
    }
}
