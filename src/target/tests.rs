//! Every class of the registry on random small layers: what is planned is what is written, the class's own arithmetic on it
//! gives what the layer says, and the config describes it.

use ndarray::{Array1, Array2, ArrayView2, Axis, s};
use serde_json::json;

use super::classes::CLASSES;
use super::{Emission, LatentNorm, OutTensor, Padding, Profile, RopeGrid, Storage, Target, TargetSpec, pad};
use crate::arch::Architecture;
use crate::mla::{Geometry, MlaLayer, Query};
use crate::random::uniform;
use crate::source::Dtype;

/// Sizes and biases of a random layer.
#[derive(Debug, Clone, Copy)]
struct Case {
    class: Target,
    geometry: Geometry,
    bias: bool,
    query_bias: bool,
    padding: Padding,
    profile: Profile,
}

fn cases() -> Vec<Case> {
    let mut out = Vec::new();
    for class in CLASSES.iter().copied() {
        for q_rank in [None, Some(7)] {
            for (bias, query_bias) in [(false, false), (true, false), (true, true)] {
                for (padding, profile) in [Padding::None, Padding::Kernels]
                    .into_iter()
                    .flat_map(|p| [(p, Profile::Portable), (p, Profile::Faithful)])
                {
                    let geometry = Geometry {
                        kv_lora_rank: 10,
                        q_lora_rank: q_rank,
                        qk_nope_head_dim: 6,
                        qk_rope_head_dim: 8,
                        v_head_dim: 5,
                    };
                    out.push(Case { class, geometry, bias, query_bias, padding, profile });
                }
            }
        }
    }
    out
}

fn source() -> Architecture {
    let config = json!({
        "model_type": "llama", "hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8,
        "num_hidden_layers": 2, "intermediate_size": 20, "vocab_size": 11, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64
    });
    Architecture::from_config(&config).expect("a config")
}

impl Case {
    fn spec(&self, arch: &Architecture) -> TargetSpec {
        let form = LatentNorm::of(self.class, self.profile == Profile::Faithful, false);
        let mut spec = TargetSpec {
            class: self.class,
            geometry: self.geometry,
            padding: self.padding,
            profile: self.profile,
            slots: RopeGrid::Free,
            bias: self.bias || form.is_some_and(LatentNorm::needs_bias),
            query_bias: self.query_bias,
            head_norms: false,
            storage: Storage::Rounded(Dtype::F32),
            plain_weights: false,
            latent_norm: form,
            kept: Vec::new(),
        };
        spec.set_query_rank(self.geometry.q_lora_rank, arch.hidden);
        spec
    }

    fn layer(&self, arch: &Architecture, state: &mut u64) -> MlaLayer {
        let (g, heads, d) = (self.geometry, arch.heads, arch.hidden);
        let mut matrix = |rows: usize, columns: usize| Array2::from_shape_fn((rows, columns), |_| uniform(state) - 0.5);
        let inner = g.q_lora_rank.unwrap_or(d);
        let mut bias = |there: bool, n: usize| there.then(|| matrix(n, 1).column(0).to_owned());
        let (nope_bias, rope_bias) =
            (bias(self.query_bias, heads * g.qk_nope_head_dim), bias(self.query_bias, heads * g.qk_rope_head_dim));
        let (k_rope_bias, wo_bias) = (bias(self.bias, g.qk_rope_head_dim), bias(self.bias, d));
        MlaLayer {
            heads,
            query: Query {
                down: g.q_lora_rank.map(|rank| matrix(rank, d)),
                nope: matrix(heads * g.qk_nope_head_dim, inner),
                nope_bias,
                rope: matrix(heads * g.qk_rope_head_dim, inner),
                rope_bias,
            },
            latent: matrix(g.kv_lora_rank, d),
            k_rope: matrix(g.qk_rope_head_dim, d),
            k_rope_bias,
            k_up: matrix(heads * g.qk_nope_head_dim, g.kv_lora_rank),
            v_up: matrix(heads * g.v_head_dim, g.kv_lora_rank),
            wo: matrix(d, heads * g.v_head_dim),
            wo_bias,
            rope_freq: (0..g.qk_rope_head_dim / 2).map(|p| 0.7_f64.powi(p as i32)).collect(),
            score_scale: 0.31,
        }
    }
}

/// Written tensors of a layer, by their names within its attention.
struct Written(Vec<OutTensor>);

impl Written {
    fn get(&self, name: &str) -> Option<ArrayView2<'_, f64>> {
        let tensor = self.0.iter().find(|t| t.name.ends_with(&format!(".self_attn.{name}")))?;
        let rows = tensor.shape[0];
        let columns: usize = tensor.shape[1..].iter().product();
        Some(ArrayView2::from_shape((rows, columns), &tensor.values).expect("its shape"))
    }

    /// A linear layer, with its bias where it has one.
    fn linear(&self, name: &str, x: &Array1<f64>) -> Option<Array1<f64>> {
        let mut y = self.get(&format!("{name}.weight"))?.dot(x);
        if let Some(bias) = self.get(&format!("{name}.bias")) {
            y += &bias.column(0);
        }
        Some(y)
    }

    /// The norm of that name, where the class has it.
    fn norm(&self, name: &str, x: Array1<f64>, eps: f64) -> Array1<f64> {
        let Some(weight) = self.get(&format!("{name}.weight")) else { return x };
        let mean_square = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
        x / (mean_square + eps).sqrt() * weight.column(0)
    }
}

/// Queries, rotated key, other keys and values of a token, and the pairs that rotate together.
struct Token {
    /// `[H, d_N]` and `[H, d_R]`.
    q: (Array2<f64>, Array2<f64>),
    /// `[H, d_N]` and `[1, d_R]`.
    k: (Array2<f64>, Array2<f64>),
    /// `[H d_V]`.
    v: Array1<f64>,
}

/// Cut rows of heads after `n` values.
fn cut(rows: &Array1<f64>, heads: usize, n: usize) -> (Array2<f64>, Array2<f64>) {
    let rows = rows.to_shape((heads, rows.len() / heads)).expect("whole heads").to_owned();
    (rows.slice(s![.., ..n]).to_owned(), rows.slice(s![.., n..]).to_owned())
}

/// What a class computes of a token from what is written.
fn of_class(written: &Written, spec: &TargetSpec, arch: &Architecture, x: &Array1<f64>) -> Token {
    let (g, eps) = (spec.output(), spec.norm_eps(arch));
    let x = &(x * spec.input_scale());
    let queries = match written.linear("q_proj", x) {
        Some(queries) => queries,
        None => {
            let latent = written.linear("q_a_proj", x).expect("queries");
            written.linear("q_b_proj", &written.norm("q_a_layernorm", latent, eps)).expect("queries")
        }
    };
    let both = written.linear("kv_a_proj_with_mqa", x).expect("a latent");
    let (latent, key) = both.view().split_at(Axis(0), g.kv_lora_rank);
    let latent = written.norm("kv_a_layernorm", latent.to_owned(), eps);
    let (k, v) = cut(&written.linear("kv_b_proj", &latent).expect("keys"), arch.heads, g.qk_nope_head_dim);
    Token {
        q: cut(&queries, arch.heads, g.qk_nope_head_dim),
        k: (k, key.to_owned().insert_axis(Axis(0))),
        v: v.flatten().to_owned(),
    }
}

/// What the layer says of a token.
fn of_layer(mla: &MlaLayer, x: &Array1<f64>) -> Token {
    let latent = mla.latent.dot(x);
    let hidden = mla.query.down.as_ref().map_or_else(|| x.clone(), |down| down.dot(x));
    let heads = |rows: Array1<f64>, bias: &Option<Array1<f64>>, n: usize| {
        let rows = bias.as_ref().map_or(rows.clone(), |bias| &rows + bias);
        let width = rows.len() / n;
        rows.into_shape_with_order((n, width)).expect("whole heads")
    };
    Token {
        q: (
            heads(mla.query.nope.dot(&hidden), &mla.query.nope_bias, mla.heads),
            heads(mla.query.rope.dot(&hidden), &mla.query.rope_bias, mla.heads),
        ),
        k: (heads(mla.k_up.dot(&latent), &None, mla.heads), heads(mla.k_rope.dot(x), &mla.k_rope_bias, 1)),
        v: mla.v_up.dot(&latent),
    }
}

/// Scores of a query `distance` tokens after a key, `[H]`, before any scale. Pair `p` rotates by `frequencies[p]` radians a token.
fn scores(q: &Token, k: &Token, frequencies: &[f64], interleaved: bool, distance: f64) -> Array1<f64> {
    let half = frequencies.len();
    let pair = |p: usize| if interleaved { (2 * p, 2 * p + 1) } else { (p, p + half) };
    (0..q.q.0.nrows())
        .map(|h| {
            let mut score = q.q.0.row(h).dot(&k.k.0.row(h));
            for (p, f) in frequencies.iter().enumerate() {
                let ((a, b), (sin, cos)) = (pair(p), (f * distance).sin_cos());
                let (qa, qb) = (q.q.1[[h, a]], q.q.1[[h, b]]);
                let (ka, kb) = (k.k.1[[0, a]], k.k.1[[0, b]]);
                score += (qa * cos - qb * sin) * ka + (qa * sin + qb * cos) * kb;
            }
            score
        })
        .collect()
}

#[test]
fn every_class_computes_what_the_layer_says() {
    let (arch, mut state) = (source(), 11);
    for case in cases() {
        let (spec, mla) = (case.spec(&arch), case.layer(&arch, &mut state));
        let gain: Vec<f64> = (0..arch.hidden).map(|_| 0.2 + uniform(&mut state)).collect();
        let written = Written(spec.attention_tensors(&arch, 1, &mla, &gain));
        let g = spec.output();
        assert_eq!(g.kv_lora_rank == 256, case.padding == Padding::Kernels);
        let mut token = || {
            let mut x = Array1::from_shape_fn(arch.hidden, |_| uniform(&mut state) - 0.5);
            x *= (arch.hidden as f64 / x.dot(&x)).sqrt();
            x * Array1::from(gain.clone())
        };
        let (m, n) = (token(), token());
        // What is left of the norm: the square of the ratio of the latent to the constant, or to the root of the epsilon.
        let allowed = match spec.latent_norm {
            None | Some(LatentNorm::TinyRows) => 1e-6,
            Some(LatentNorm::Constant { .. }) => 1e-4,
            // 2^-15 for each of two latents, of scores of about five.
            Some(LatentNorm::SmallRows) => 5e-4,
        };
        let scale = match case.class.has_own_score_scale() {
            true => mla.score_scale,
            false => ((g.qk_nope_head_dim + g.qk_rope_head_dim) as f64).powf(-0.5),
        };
        let frequencies = pad::frequencies(&mla.rope_freq, g.qk_rope_head_dim, arch.rope.theta);
        let (qm, kn) = (of_class(&written, &spec, &arch, &m), of_class(&written, &spec, &arch, &n));
        let got = scores(&qm, &kn, &frequencies, case.class.interleaves_pairs(), 3.0) * scale;
        let (qm, of_n) = (of_layer(&mla, &m), of_layer(&mla, &n));
        let wanted = scores(&qm, &of_n, &mla.rope_freq, true, 3.0) * mla.score_scale;
        let error = (&got - &wanted).iter().fold(0.0_f64, |m, v| m.max(v.abs()));
        assert!(error < allowed, "{case:?}: {got} instead of {wanted}");

        let got = written.linear("o_proj", &kn.v).expect("an output");
        let wanted = mla.wo.dot(&of_n.v) + mla.wo_bias.clone().unwrap_or_else(|| Array1::zeros(arch.hidden));
        let wanted = wanted * spec.stream_scale(&arch);
        let error = (&got - &wanted).iter().fold(0.0_f64, |m, v| m.max(v.abs()));
        assert!(error < allowed, "{case:?}: {got} instead of {wanted}");
    }
}

#[test]
fn what_is_planned_is_what_is_written() {
    let (arch, mut state) = (source(), 5);
    for case in cases() {
        let (spec, mla) = (case.spec(&arch), case.layer(&arch, &mut state));
        let planned = spec.planned_attention(&arch, 1);
        let written = spec.attention_tensors(&arch, 1, &mla, &vec![1.0; arch.hidden]);
        assert_eq!(planned.len(), written.len());
        for (planned, written) in planned.iter().zip(&written) {
            assert_eq!((&planned.name, &planned.shape), (&written.name, &written.shape), "{case:?}");
            assert_eq!(written.values.len(), written.shape.iter().product::<usize>(), "{case:?}: {}", written.name);
            assert!(written.values.iter().all(|v| v.is_finite()), "{case:?}: {}", written.name);
        }
        // No values are there twice or left over.
        let holds: Vec<_> = case.class.attention(&spec, &arch).into_iter().map(|t| t.holds).collect();
        assert!(holds.iter().enumerate().all(|(i, h)| !holds[i + 1..].contains(h)), "{case:?}: {holds:?}");
    }
}

#[test]
fn the_config_describes_the_tensors() {
    let arch = source();
    for case in cases() {
        let spec = case.spec(&arch);
        let frequencies: Vec<f64> = (0..case.geometry.qk_rope_head_dim / 2).map(|p| 0.5_f64.powi(p as i32)).collect();
        let rope = spec.rope(&frequencies, &arch, &json!({}), 64);
        let config = spec.config(&arch, &json!({ "eos_token_id": 3 }), &rope, 64);
        assert_eq!(config["model_type"], case.class.model_type());
        assert_eq!(
            (&config["architectures"][0], &config["eos_token_id"]),
            (&json!(case.class.architecture()), &json!(3))
        );
        assert_eq!(config.get("auto_map").is_some(), case.class.brings_code(), "{}", case.class);
        let output = Architecture::from_config(&config).unwrap_or_else(|e| panic!("{case:?}: {e}"));
        assert_eq!(output.norm_eps, spec.norm_eps(&arch));
        assert!(output.mla().expect("an MLA config").score_scale.is_finite());
        let mut expected: Vec<_> = output.expected_tensors().into_iter().map(|t| (t.name, t.shape)).collect();
        let emission = Emission::new(&arch, &spec, &|_| Dtype::F32);
        let mut planned: Vec<_> = emission.planned().into_iter().map(|t| (t.name, t.shape)).collect();
        expected.sort();
        planned.sort();
        assert_eq!(planned, expected, "{case:?}");
    }
}

#[test]
fn a_journal_gives_the_same_spec_back() {
    let arch = source();
    for case in cases() {
        let spec = TargetSpec { kept: vec![true, false], ..case.spec(&arch) };
        let json = serde_json::to_string(&spec).expect("serialises");
        assert_eq!(serde_json::from_str::<TargetSpec>(&json).expect("reads"), spec, "{json}");
    }
}
