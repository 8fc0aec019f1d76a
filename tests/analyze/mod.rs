//! Alignment and energy of caches across layers, against what they are by definition.

use std::path::Path;
use std::process::Output;

use faer::Mat;
use gqa2mla::analyze::{Analysis, AnalyzeError, AnalyzeSettings, CacheMatrix, analyze};
use gqa2mla::observe::Silent;
use gqa2mla::runtime::{Cpu, Model};
use insta::assert_snapshot;
use ndarray::{Array2, Axis, concatenate, s};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::common::command::gqa2mla;
use crate::common::models::{fixture, open};

const TRAINED: &str = "pico-trained";
const MLA: &str = "pico-deepseek-v3";
/// The trained fixture, as the command takes it.
const FOLDER: &str = "fixtures/pico-trained";

/// Windows of tokens that mean nothing.
fn windows(count: usize, length: usize, vocab: usize) -> Vec<Vec<u32>> {
    let token = |i: usize| ((i * 7919 + 13 + i * i % 31) % vocab) as u32;
    (0..count).map(|w| (0..length).map(|t| token(w * length + t)).collect()).collect()
}

fn settings(groups: &[usize]) -> AnalyzeSettings {
    AnalyzeSettings { groups: groups.to_vec(), align_rank: None }
}

fn run(name: &str, windows: &[Vec<u32>], groups: &[usize]) -> Analysis {
    let (source, arch) = open(&fixture(name));
    analyze(&Model::new(&source, &arch, &Cpu), windows, &settings(groups), &Silent).expect("runs")
}

/// The matrices `[T, w]` of every layer for one window, by the public parts of the runtime.
fn caches(name: &str, window: &[u32], matrix: CacheMatrix) -> Vec<Array2<f32>> {
    let (source, arch) = open(&fixture(name));
    let model = Model::new(&source, &arch, &Cpu);
    let (mut hidden, lengths) = model.start(&[window.to_vec()]).expect("embeds");
    let mut out = Vec::new();
    for index in 0..arch.layers {
        let layer = model.layer(index).expect("loads");
        let raw = layer.raw_kv(layer.attention_input(hidden.view()).expect("norms").view()).expect("projects");
        out.push(match matrix {
            CacheMatrix::Values => raw.values.expect("GQA has values"),
            _ => raw.keys,
        });
        layer.forward(&mut hidden, &lengths).expect("runs");
    }
    out
}

fn svd(x: &Array2<f32>) -> (Vec<f64>, Array2<f64>) {
    let svd = Mat::from_fn(x.nrows(), x.ncols(), |i, j| f64::from(x[[i, j]])).thin_svd().expect("converges");
    let (u, s) = (svd.U(), svd.S());
    let values = (0..x.nrows().min(x.ncols())).map(|i| s[i]).collect();
    (values, Array2::from_shape_fn((x.nrows(), u.ncols()), |(i, j)| u[(i, j)]))
}

/// Energies and overlaps come from sums of token Grams; the definition is a singular value decomposition of the columns
/// side by side.
#[test]
fn energy_and_alignment_are_those_of_a_direct_decomposition() {
    for (name, matrix, tokens) in
        [(TRAINED, CacheMatrix::Keys, 40), (TRAINED, CacheMatrix::Values, 90), (MLA, CacheMatrix::Latents, 40)]
    {
        let (_, arch) = open(&fixture(name));
        let texts = windows(1, tokens, arch.vocab);
        let found = run(name, &texts, &[1, 2]);
        let of = found.matrices.iter().find(|m| m.matrix == matrix).expect("the matrix");
        let layers = caches(name, &texts[0], matrix);
        for spectrum in &of.groups {
            let mut mean = vec![0.0; spectrum.max_rank];
            let chunks: Vec<_> = layers.chunks(spectrum.group).collect();
            for chunk in &chunks {
                let views: Vec<_> = chunk.iter().map(|x| x.view()).collect();
                let (s, _) = svd(&concatenate(Axis(1), &views).expect("the same rows"));
                let total: f64 = s.iter().map(|s| s * s).sum();
                let mut kept = 0.0;
                for (to, s) in mean.iter_mut().zip(&s) {
                    kept += s * s / total;
                    *to += kept / chunks.len() as f64;
                }
            }
            assert_eq!(mean.len(), spectrum.energy.len());
            for (rank, (a, b)) in spectrum.energy.iter().zip(&mean).enumerate() {
                // Eigenvalues of a Gram in f64 move by a few eps of the largest, of which there are up to 90.
                assert!(
                    (a - b).abs() < 1e-12,
                    "{name} {matrix:?}, {} layers, rank {}: {a} {b}",
                    spectrum.group,
                    rank + 1
                );
            }
            for r in &spectrum.ranks {
                assert!(mean[r.rank - 1] >= r.energy - 1e-12 && (r.rank == 1 || mean[r.rank - 2] < r.energy + 1e-12));
            }
        }
        let rank = of.alignment.rank;
        assert_eq!(rank, of.width / 4);
        let bases: Vec<_> = layers.iter().map(|x| svd(x).1.slice(s![.., ..rank]).to_owned()).collect();
        for (i, a) in bases.iter().enumerate() {
            for (j, b) in bases.iter().enumerate() {
                let want = a.t().dot(b).iter().map(|x| x * x).sum::<f64>() / rank as f64;
                let got = of.alignment.overlap[i][j];
                // Bases are kept in f32; a subspace turns by the rounding over its gap, a few percent of the largest value
                // at worst here.
                assert!((got - want).abs() < 1e-5, "{name} {matrix:?}, layers {i} and {j}: {got} {want}");
            }
        }
    }
}

#[test]
fn several_windows_give_the_mean_of_each() {
    let (_, arch) = open(&fixture(TRAINED));
    let texts = windows(2, 32, arch.vocab);
    let both = run(TRAINED, &texts, &[1, 3]);
    let each: Vec<_> = texts.iter().map(|t| run(TRAINED, std::slice::from_ref(t), &[1, 3])).collect();
    for (n, matrix) in both.matrices.iter().enumerate() {
        for (g, spectrum) in matrix.groups.iter().enumerate() {
            for (r, share) in spectrum.energy.iter().enumerate() {
                let mean = each.iter().map(|a| a.matrices[n].groups[g].energy[r]).sum::<f64>() / 2.0;
                // Windows share products of f32 in the forward pass, which are cut by the number of rows.
                assert!((share - mean).abs() < 1e-6, "{share} {mean}");
            }
        }
        let mean = each.iter().map(|a| a.matrices[n].alignment.overlap[0][2]).sum::<f64>() / 2.0;
        assert!((matrix.alignment.overlap[0][2] - mean).abs() < 1e-5);
    }
    // Four layers by threes: the last is a group of one, told but not in the mean.
    let each: Vec<_> = both.matrices[0].groups[1].each.iter().map(|g| (g.first, g.layers)).collect();
    assert_eq!(each, [(0, 3), (3, 1)]);
}

/// A Llama of three equal layers that add nothing to the residual stream: all layers see the same input.
fn identical_layers(dir: &Path) {
    let (d, q, kv, i, vocab) = (24, 24, 12, 20, 40);
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "float32",
        "hidden_size": d, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": i,
        "vocab_size": vocab, "num_hidden_layers": 3, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": true,
    });
    fs_err::write(dir.join("config.json"), config.to_string()).expect("written");
    let random = |len: usize, seed: u32| -> Vec<u8> {
        let mut state = seed;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / (1 << 24) as f32 - 0.5).to_le_bytes()
        };
        (0..len).flat_map(next).collect()
    };
    let ones = |len: usize| -> Vec<u8> { (0..len).flat_map(|_| 1f32.to_le_bytes()).collect() };
    let mut stored = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocab, d], random(vocab * d, 1)),
        ("model.norm.weight".to_owned(), vec![d], ones(d)),
    ];
    for n in 0..3 {
        let layer: [(&str, Vec<usize>, Vec<u8>); 9] = [
            ("input_layernorm", vec![d], ones(d)),
            ("post_attention_layernorm", vec![d], ones(d)),
            ("self_attn.q_proj", vec![q, d], random(q * d, 2)),
            ("self_attn.k_proj", vec![kv, d], random(kv * d, 3)),
            ("self_attn.v_proj", vec![kv, d], random(kv * d, 4)),
            ("self_attn.o_proj", vec![d, q], vec![0; d * q * 4]),
            ("mlp.gate_proj", vec![i, d], random(i * d, 5)),
            ("mlp.up_proj", vec![i, d], random(i * d, 6)),
            ("mlp.down_proj", vec![d, i], vec![0; d * i * 4]),
        ];
        stored.extend(layer.map(|(role, shape, data)| (format!("model.layers.{n}.{role}.weight"), shape, data)));
    }
    let views = stored.iter().map(|(name, shape, data)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), data).expect("the bytes fit the shape"))
    });
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).expect("written");
}

#[test]
fn identical_layers_are_aligned_and_a_group_needs_no_more_rank_than_one() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    identical_layers(dir.path());
    let (source, arch) = open(dir.path());
    let model = Model::new(&source, &arch, &Cpu);
    let found = analyze(&model, &windows(2, 30, arch.vocab), &settings(&[1, 3]), &Silent).expect("runs");
    for matrix in &found.matrices {
        for overlap in matrix.alignment.overlap.iter().flatten() {
            // Entries of a basis are rounded by 2^-25 relative, so squared lengths by 2^-24.
            assert!((overlap - 1.0).abs() < 1e-6, "{overlap}");
        }
        let (one, three) = (&matrix.groups[0].energy, &matrix.groups[1].energy);
        for (a, b) in one.iter().zip(three) {
            assert!((a - b).abs() < 1e-12, "{a} {b}");
        }
        assert!(three[one.len() - 1] > 1.0 - 1e-12);
    }
}

#[test]
fn what_a_model_cannot_have_is_refused() {
    let (source, arch) = open(&fixture(TRAINED));
    let model = Model::new(&source, &arch, &Cpu);
    let try_with = |groups: &[usize], align_rank, texts: &[Vec<u32>]| {
        let settings = AnalyzeSettings { groups: groups.to_vec(), align_rank };
        analyze(&model, texts, &settings, &Silent).expect_err("refused")
    };
    let texts = windows(2, 16, arch.vocab);
    assert!(matches!(try_with(&[5], None, &texts), AnalyzeError::Group { group: 5, layers: 4 }));
    assert!(matches!(try_with(&[0], None, &texts), AnalyzeError::Group { group: 0, .. }));
    assert!(matches!(try_with(&[1], Some(17), &texts), AnalyzeError::AlignRank { rank: 17, tokens: 16, width: 64 }));
    let uneven = [texts[0].clone(), texts[1][..9].to_vec()];
    assert!(matches!(try_with(&[1], None, &uneven), AnalyzeError::Windows { shortest: 9, longest: 16 }));
    assert!(matches!(try_with(&[1], None, &[]), AnalyzeError::Runtime(_)));
}

fn command(args: &[&str]) -> Output {
    gqa2mla(args).output().expect("the binary starts")
}

#[test]
fn the_command_prints_a_table_and_writes_json_and_plots() {
    let args = ["analyze", FOLDER, "--device", "cpu", "--seq-len", "128", "--windows", "2"];
    let out = command(&args);
    assert_eq!(out.status.code(), Some(0), "{out:?}");
    assert_snapshot!("analyze", String::from_utf8_lossy(&out.stdout));
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().display().to_string();
    let out = command(&[&args[..], &["--json", "-o", &path]].concat());
    let document: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!(
        (&document["schema_version"], &document["layers"], &document["tokens"]),
        (&1.into(), &4.into(), &128.into())
    );
    assert_eq!(document["matrices"][1]["matrix"], "values");
    // Eight layers are more than there are.
    assert_eq!(document["matrices"][0]["groups"].as_array().map(Vec::len), Some(3));
    let written = fs_err::read_to_string(dir.path().join("analyze.json")).expect("analyze.json");
    assert_eq!(serde_json::from_str::<Value>(&written).expect("JSON"), document);
    for plot in ["alignment-keys", "alignment-values", "energy-keys", "energy-values"] {
        let svg = fs_err::read_to_string(dir.path().join(format!("{plot}.svg"))).expect(plot);
        assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN"), "{plot}");
    }
    let threads = command(&[&args[..], &["--json", "--threads", "1"]].concat());
    assert_eq!(serde_json::from_slice::<Value>(&threads.stdout).expect("JSON"), document);
}

#[test]
fn bad_input_of_the_command_is_a_sentence() {
    for (more, says) in [
        (["--groups", "9"], "groups of 9 layers: the model has 4"),
        (["--groups", "0"], "expected a positive integer"),
        (["--align-rank", "65"], "at most rank 64"),
        (["--text", "fixtures/pico-trained/generation_config.json"], "less than one window of 128"),
    ] {
        let args = ["analyze", FOLDER, "--device", "cpu", "--windows", "1", "--seq-len", "128"];
        let out = command(&[&args[..], &more].concat());
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(2), "{more:?}: {text}");
        assert!(out.stdout.is_empty() && text.contains(says), "{more:?}: {text}");
    }
}
