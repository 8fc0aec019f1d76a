//! Properties of one layer with random weights: what must be equal, equals.

use gqa2mla::arch::Architecture;
use gqa2mla::observe::Silent;
use gqa2mla::runtime::{
    AttentionTensors, Cpu, FeedForwardTensors, GqaTensors, Layer, LayerExtras, LayerTensors, Linear, MlaTensors,
    MlpTensors, Model, Qkv, QueryTensors, Resident, RuntimeError, Session, SessionSize,
};
use gqa2mla::source::{ModelSource, OpenOptions};
use ndarray::{Array2, s};
use serde_json::{Value, json};

/// A linear congruential generator, so that every run sees the same weights.
struct Random(u64);

impl Random {
    /// Roughly normal, standard deviation 1.
    fn next(&mut self) -> f32 {
        let mut uniform = || {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 40) as f32 / (1u64 << 24) as f32
        };
        // Four uniforms have variance 1/3.
        ((uniform() + uniform() + uniform() + uniform()) - 2.0) * 3f32.sqrt()
    }

    fn matrix(&mut self, rows: usize, columns: usize, scale: f32) -> Array2<f32> {
        Array2::from_shape_simple_fn((rows, columns), || self.next() * scale)
    }

    fn vector(&mut self, len: usize, mean: f32) -> Vec<f32> {
        (0..len).map(|_| mean + 0.3 * self.next()).collect()
    }

    fn linear(&mut self, out: usize, inner: usize, bias: bool) -> Linear {
        let weight = self.matrix(out, inner, (inner as f32).powf(-0.5));
        Linear { weight, bias: bias.then(|| self.vector(out, 0.0)) }
    }

    fn layer(&mut self, arch: &Architecture) -> LayerTensors {
        let (d, i, h) = (arch.hidden, arch.intermediate, arch.heads);
        let attention = match (arch.gqa(), arch.mla()) {
            (Some(a), _) => AttentionTensors::Gqa(GqaTensors {
                q: self.linear(h * a.head_dim, d, a.qkv_bias),
                k: self.linear(a.kv_heads * a.head_dim, d, a.qkv_bias),
                v: self.linear(a.kv_heads * a.head_dim, d, a.qkv_bias),
                o: self.linear(d, h * a.head_dim, a.out_bias),
            }),
            (_, Some(a)) => {
                let q = h * (a.qk_nope_head_dim + a.qk_rope_head_dim);
                AttentionTensors::Mla(MlaTensors {
                    query: match a.q_lora_rank {
                        None => QueryTensors::Direct(self.linear(q, d, false)),
                        Some(rank) => QueryTensors::LowRank {
                            a: self.linear(rank, d, a.bias),
                            norm: self.vector(rank, 1.0),
                            b: self.linear(q, rank, false),
                        },
                    },
                    kv_a: self.linear(a.kv_lora_rank + a.qk_rope_head_dim, d, a.bias),
                    kv_a_norm: self.vector(a.kv_lora_rank, 1.0),
                    kv_b: self.linear(h * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank, false),
                    o: self.linear(d, h * a.v_head_dim, a.bias),
                })
            }
            _ => unreachable!("attention is one of the two"),
        };
        LayerTensors {
            input_norm: self.vector(d, 1.0),
            attention,
            post_norm: self.vector(d, 1.0),
            mlp: MlpTensors {
                gate: Some(self.linear(i, d, arch.mlp_bias)),
                up: self.linear(i, d, arch.mlp_bias),
                down: self.linear(d, i, arch.mlp_bias),
            }
            .into(),
            extras: LayerExtras { window: arch.windows[0], ..LayerExtras::default() },
        }
    }
}

fn gqa(more: Value) -> Architecture {
    let base = json!({"model_type": "llama", "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 80, "vocab_size": 50, "rms_norm_eps": 1e-5,
        "attention_bias": true, "mlp_bias": true, "max_position_embeddings": 4096, "hidden_act": "silu"});
    architecture(base, more)
}

fn mla(more: Value) -> Architecture {
    let base = json!({"model_type": "deepseek_v3", "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 9,
        "num_key_value_heads": 9, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
        "first_k_dense_replace": 1, "intermediate_size": 80, "vocab_size": 50, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "hidden_act": "silu"});
    architecture(base, more)
}

fn architecture(mut base: Value, more: Value) -> Architecture {
    let extra = more.as_object().unwrap().clone();
    base.as_object_mut().unwrap().extend(extra);
    Architecture::from_config(&base).unwrap()
}

fn variants() -> Vec<(&'static str, Architecture)> {
    vec![
        ("gqa", gqa(json!({}))),
        ("mha", gqa(json!({"num_key_value_heads": 6}))),
        ("mqa", gqa(json!({"num_key_value_heads": 1}))),
        ("sliding window", gqa(json!({"model_type": "mistral", "sliding_window": 7}))),
        ("mla", mla(json!({}))),
        ("mla without nope", mla(json!({"qk_nope_head_dim": 0}))),
        ("mla, half layout", mla(json!({"rope_interleave": false}))),
        ("mla with biases", mla(json!({"q_lora_rank": 16, "attention_bias": true}))),
    ]
}

fn assert_close(what: &str, found: &Array2<f32>, expected: &Array2<f32>, terms: usize) {
    assert_eq!(found.dim(), expected.dim(), "{what}");
    let scale = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    // About ten sums of up to `terms` in a row on either side, errors adding up like a random walk.
    let bound = 20.0 * (terms as f32).sqrt() * f32::EPSILON * scale;
    let error = found.iter().zip(expected).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(error <= bound, "{what}: off by {error}, allowed {bound}");
}

const WINDOWS: [usize; 4] = [1, 300, 17, 130];

#[test]
fn decoding_with_a_cache_equals_the_full_forward() {
    for (name, arch) in variants() {
        let mut random = Random(1);
        let layer = Layer::new(&Cpu, &arch, random.layer(&arch)).unwrap();
        let mut full = random.matrix(140, arch.hidden, 1.0);
        let mut cached = full.clone();
        layer.forward(&mut full, &[140]).unwrap();
        layer.forward_cached(&mut cached).unwrap();
        assert_close(name, &cached, &full, 140);
    }
}

#[test]
fn the_parts_of_a_layer_make_the_layer() {
    for (name, arch) in variants() {
        let mut random = Random(2);
        let layer = Layer::new(&Cpu, &arch, random.layer(&arch)).unwrap();
        let mut hidden = random.matrix(WINDOWS.iter().sum(), arch.hidden, 1.0);
        let x = layer.attention_input(hidden.view()).unwrap();
        let out = layer.attention_output(x.view(), &WINDOWS).unwrap();
        let heads = layer.attention_heads(x.view(), &WINDOWS).unwrap();
        assert_eq!(layer.output_projection(heads.view()).unwrap(), out, "{name}");
        let middle = &hidden + &out;
        let mlp = layer.mlp_output(middle.view()).unwrap();
        let trace = layer.mlp_trace(middle.view()).unwrap();
        assert_eq!(trace.output, mlp, "{name}");
        layer.forward(&mut hidden, &WINDOWS).unwrap();
        assert_eq!(hidden, middle + mlp, "{name}");
    }
}

/// Attention by its definition, in f64, from the statistics' own queries, keys and values.
fn naive_heads(qkv: &Qkv, windows: &[usize]) -> Array2<f32> {
    let mut out = Array2::zeros((qkv.q.nrows(), qkv.heads * qkv.v_dim));
    let mut first = 0;
    for &length in windows {
        for head in 0..qkv.heads {
            let kv = qkv.kv_head(head);
            for t in first..first + length {
                let seen = qkv.sliding_window.map_or(first, |w| first.max((t + 1).saturating_sub(w)))..t + 1;
                let weights: Vec<f64> = seen
                    .clone()
                    .map(|j| {
                        let dot = |i| f64::from(qkv.q[[t, head * qkv.qk_dim + i]] * qkv.k[[j, kv * qkv.qk_dim + i]]);
                        ((0..qkv.qk_dim).map(dot).sum::<f64>() * qkv.scale).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                for i in 0..qkv.v_dim {
                    let value = |(j, w): (usize, &f64)| w / total * f64::from(qkv.v[[j, kv * qkv.v_dim + i]]);
                    let sum: f64 = seen.clone().zip(&weights).map(value).sum();
                    out[[t, head * qkv.v_dim + i]] = sum as f32;
                }
            }
        }
        first += length;
    }
    out
}

#[test]
fn attention_is_its_definition_and_the_statistics_see_it() {
    for (name, arch) in variants() {
        let mut random = Random(3);
        let layer = Layer::new(&Cpu, &arch, random.layer(&arch)).unwrap();
        let x = random.matrix(WINDOWS.iter().sum(), arch.hidden, 1.0);
        let heads = layer.attention_heads(x.view(), &WINDOWS).unwrap();
        let qkv = layer.project_qkv(x.view(), &WINDOWS).unwrap();
        assert_close(name, &heads, &naive_heads(&qkv, &WINDOWS), 300);

        // Probabilities times values, tile by tile.
        let parts = qkv.fold_probabilities(&WINDOWS, vec![Vec::new(); WINDOWS.len() * qkv.heads], |parts, mut tile| {
            assert_eq!(tile.scratch.dim(), tile.probabilities.dim());
            // What is left there may not reach the next tile.
            tile.scratch.fill(f32::NAN);
            let kv = qkv.kv_head(tile.head);
            let (start, keys) = (tile.window_start, tile.probabilities.ncols());
            let values = qkv.v.slice(s![start..start + keys, kv * qkv.v_dim..(kv + 1) * qkv.v_dim]);
            parts.push((start + tile.row0, tile.probabilities.dot(&values)));
        });
        let mut folded = Array2::zeros(heads.dim());
        for (index, tiles) in parts.into_iter().enumerate() {
            let head = index % qkv.heads;
            for (row, out) in tiles {
                let columns = head * qkv.v_dim..(head + 1) * qkv.v_dim;
                folded.slice_mut(s![row..row + out.nrows(), columns]).assign(&out);
            }
        }
        assert_close(name, &folded, &heads, 300);
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    // Wider than one tile of a product in either direction.
    let wide = json!({"hidden_size": 640, "intermediate_size": 1100});
    for arch in [gqa(wide.clone()), mla(wide)] {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut random = Random(4);
                let layer = Layer::new(&Cpu, &arch, random.layer(&arch)).unwrap();
                let mut hidden = random.matrix(WINDOWS.iter().sum(), arch.hidden, 1.0);
                let mut cached = hidden.slice(s![..20, ..]).to_owned();
                layer.forward(&mut hidden, &WINDOWS).unwrap();
                layer.forward_cached(&mut cached).unwrap();
                (hidden, cached)
            })
        };
        let one = run(1);
        for threads in [2, 3, 7] {
            assert!(run(threads) == one, "{threads} threads");
        }
    }
}

#[test]
fn sequences_side_by_side_are_those_alone() {
    for name in ["pico-llama", "pico-mistral", "pico-deepseek-v3"] {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name);
        let source = ModelSource::open(dir.to_str().unwrap(), &OpenOptions::default(), &Silent).unwrap();
        let arch = Architecture::from_config(&source.config).unwrap();
        let resident = Resident::load(Model::new(&source, &arch, &Cpu)).unwrap();
        let text = |n: usize, s: usize| (0..n).map(|i| ((i * 31 + s * 17) % arch.vocab) as u32).collect::<Vec<_>>();
        // Lengths on either side of what is attended to in the latent.
        let (texts, more) = ([text(3, 0), text(40, 1), text(9, 2)], [text(1, 3), text(1, 4), text(1, 5)]);
        let size = SessionSize { sequences: 3, capacity: 41, beyond_context: false };
        let mut together = Session::with(&resident, size).unwrap();
        let first = together.feed(&texts.each_ref().map(Vec::as_slice)).unwrap();
        let second = together.feed(&more.each_ref().map(Vec::as_slice)).unwrap();
        for s in 0..3 {
            let mut alone = Session::new(&resident, 41).unwrap();
            for (text, found) in [(&texts[s], &first), (&more[s], &second)] {
                let expected = Array2::from_shape_vec((1, arch.vocab), alone.prefill(text).unwrap()).unwrap();
                let found = found.slice(s![s..s + 1, ..]).to_owned();
                assert_close(name, &found, &expected, arch.intermediate * arch.layers);
            }
        }
        assert_eq!(together.cache_bytes(), 3 * 41 * arch.layers * arch.cache_values() * size_of::<f32>());
        assert!(matches!(together.feed(&[&[1]]), Err(RuntimeError::Sequences { expected: 3, found: 1 })));
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let arch = mla(json!({}));
    let mut tensors = Random(5).layer(&arch);
    let layer = Layer::new(&Cpu, &arch, tensors.clone()).unwrap();
    let x = Array2::<f32>::zeros((4, arch.hidden));
    assert!(matches!(layer.attention_output(x.view(), &[1, 2]), Err(RuntimeError::Windows { windows: 3, rows: 4 })));
    assert!(matches!(
        layer.attention_input(x.slice(s![.., 1..])),
        Err(RuntimeError::Width { expected: 48, found: 47 })
    ));
    assert!(matches!(
        Layer::new(&Cpu, &gqa(json!({})), tensors.clone()),
        Err(RuntimeError::Variant { expected: "gqa", found: "mla" })
    ));
    if let FeedForwardTensors::Dense(mlp) = &mut tensors.mlp {
        mlp.down = Array2::<f32>::zeros((48, 79)).into();
    }
    let error = Layer::new(&Cpu, &arch, tensors).unwrap_err();
    assert_eq!(error.to_string(), "layer weight `down`: expected [48, 80], found [48, 79]");
}

#[test]
fn the_layer_that_breaks_is_named() {
    let from = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/pico-llama");
    let dir = tempfile::tempdir().unwrap();
    fs_err::copy(from.join("config.json"), dir.path().join("config.json")).unwrap();
    let mut bytes = fs_err::read(from.join("model.safetensors")).unwrap();
    let name = "model.layers.1.mlp.up_proj.weight";
    let offset = {
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        file.tensor(name).unwrap().data().as_ptr() as usize - bytes.as_ptr() as usize
    };
    // All ones are a NaN in bf16 and in f32.
    bytes[offset..offset + 4].fill(0xff);
    fs_err::write(dir.path().join("model.safetensors"), bytes).unwrap();
    let source = ModelSource::open(dir.path().to_str().unwrap(), &OpenOptions::default(), &Silent).unwrap();
    let arch = Architecture::from_config(&source.config).unwrap();
    let model = Model::new(&source, &arch, &Cpu);
    let expected = "NaN or infinity in the output of layer 1";
    let error = model.final_hidden(&[vec![1, 2, 3]], &Silent).unwrap_err().to_string();
    assert!(error.starts_with(expected), "{error}");
    let resident = gqa2mla::runtime::Resident::load(model).unwrap();
    let mut session = gqa2mla::runtime::Session::new(&resident, 8).unwrap();
    let error = session.prefill(&[1, 2, 3]).unwrap_err().to_string();
    assert!(error.starts_with(expected), "{error}");
    let vocab = arch.vocab as u32;
    assert!(matches!(session.step(vocab), Err(RuntimeError::Token { token, .. }) if token == vocab));
    assert!(matches!(session.prefill(&[1; 9]), Err(RuntimeError::ContextTooLong { length: 9, max: 8 })));
    assert!(matches!(session.prefill(&[]), Err(RuntimeError::NoTokens)));
}
