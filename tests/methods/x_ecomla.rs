//! X-EcoMLA: its definition, its ranks, its layout as published and as it is right.

use std::collections::BTreeSet;
use std::path::Path;

use gqa2mla::arch::load_attention_source;
use gqa2mla::convert::{ConvertSettings, Target};
use gqa2mla::factor::svd::svd;
use gqa2mla::methods::partial_rope::Slot;
use gqa2mla::methods::x_ecomla::{self, Ranks, XEcomla};
use gqa2mla::target::classes::{deepseek_v3, remote};
use ndarray::{Array2, Axis, concatenate, s};
use serde_json::Value;

use super::source_layer::{assert_close, attention, by_definition, inputs, output, project, source_output};
use super::weight_svd::settings;
use crate::common::judge::{converted, heldout, side_by_side};
use crate::common::models::{fixture, open};

/// Trained pico with `settings`: its excess in nats per token.
fn excess(settings: &ConvertSettings) -> f64 {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out");
    converted(&fixture("pico-trained"), &to, settings).expect("converts");
    let c = side_by_side(&fixture("pico-trained"), &to, &heldout(128, 8));
    (c.ppl_converted / c.ppl_source).ln()
}

fn shared(pairs: &[usize]) -> Vec<Slot> {
    pairs.iter().map(|&pair| Slot { pair, head: None }).collect()
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
fn ranks_are_those_of_the_published_rule() {
    let golden: Vec<Value> =
        serde_json::from_slice(&fs_err::read(fixture("x-ecomla-ranks.json")).expect("readable")).expect("JSON");
    let (source, arch) = open(&fixture("pico-trained"));
    let mut seen = BTreeSet::new();
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
    let at = |target: Target, divisor: usize, to: &Path| {
        let method =
            XEcomla { kv_energy: Some(0.8), q_energy: Some(0.9), rank_divisor: Some(divisor), ..XEcomla::default() };
        converted(&fixture("pico-trained"), to, &ConvertSettings { target: target.into(), ..settings(method) })
    };
    let (stock, remote) = (dir.path().join("stock"), dir.path().join("remote"));
    let report = at(deepseek_v3::TARGET, 1, &stock).expect("converts");
    at(remote::TARGET, 1, &remote).expect("converts");
    let ranks: Vec<usize> = report.layers.iter().filter_map(|l| l.kv_rank).collect();
    assert_eq!(ranks.len(), 4);
    assert!(ranks.iter().any(|r| *r != ranks[0]), "{ranks:?}");
    // The widest layer's, and a constant that neutralises the norm.
    let widest = ranks.iter().max().expect("layers");
    assert_eq!(report.geometry.kv_lora_rank, (widest + 1).next_multiple_of(2));
    // Rows after a layer's own rank are zero, and the document in the folder knows the ranks.
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
    let rounded = at(deepseek_v3::TARGET, 8, &dir.path().join("eight")).expect("converts");
    assert!(rounded.layers.iter().zip(&ranks).all(|(l, r)| l.kv_rank == Some(r.next_multiple_of(8))));
}

#[test]
fn right_positions_are_no_worse_than_the_published_ones() {
    for (rope, rank) in [(8, 56), (8, 100)] {
        let base =
            ConvertSettings { qk_rope_head_dim: Some(rope), kv_lora_rank: Some(rank), ..settings(XEcomla::default()) };
        let ours = excess(&base);
        let method = XEcomla { published_layout: true, ..XEcomla::default() };
        let published = excess(&ConvertSettings { method: method.into(), ..base });
        assert!(ours <= published, "{rope}+{rank}: {ours} ours, {published} published");
    }
}
