//! Every family to every target that holds it, judged by the reference runtime (which the golden logits tie to stock
//! transformers; `scripts/check_transformers.py` loads the outputs there too).

#[path = "common/golden.rs"]
mod golden;
#[path = "common/models.rs"]
mod models;

use std::path::Path;

use golden::golden_tokens;
use gqa2mla::arch::{Architecture, Family, check_tensors, language_config};
use gqa2mla::convert::{
    CalibrationSettings, ConversionReport, ConvertSettings, Method, OutputDtype, Padding, Profile, TargetKind, convert,
};
use gqa2mla::observe::Silent;
use gqa2mla::report::engines::{Facts, Loads, judge};
use gqa2mla::runtime::{Cpu, Model};
use gqa2mla::source::{Dtype, ModelSource, OpenOptions};
use gqa2mla::target::fp8;
use gqa2mla::verify::{Comparison, compare};
use models::fixture;

use safetensors::tensor::TensorView;
use serde_json::{Value, json};

const DENSE: [TargetKind; 5] =
    [TargetKind::DeepseekV3, TargetKind::DeepseekV2, TargetKind::Youtu, TargetKind::Minicpm3, TargetKind::HfRemote];
const STOCK: [TargetKind; 4] =
    [TargetKind::DeepseekV3, TargetKind::DeepseekV2, TargetKind::Youtu, TargetKind::Minicpm3];
/// What two exact models may differ by: the f32 rounding of a few hundred products each (see tests/convert.rs).
const ROUNDING: f64 = 1.3e-4;

fn open(dir: &Path) -> (ModelSource, Architecture) {
    let (source, arch) = models::open(dir);
    check_tensors(&arch, &source.tensors).expect("config and tensors agree");
    (source, arch)
}

fn exact(target: TargetKind) -> ConvertSettings {
    ConvertSettings { method: Method::Exact, target, ..ConvertSettings::default() }
}

fn run(from: &Path, to: &Path, settings: &ConvertSettings) -> Result<ConversionReport, String> {
    let (source, arch) = open(from);
    convert(&source, &arch, settings, to, &|_| Vec::new(), &Silent).map_err(|e| e.to_string())
}

/// The window whose figures are worst.
fn side_by_side(from: &Path, to: &Path, windows: &[Vec<u32>]) -> Comparison {
    let ((s, sa), (c, ca)) = (open(from), open(to));
    let one = |w: &Vec<u32>| {
        let (a, b) = (Model::new(&s, &sa, &Cpu), Model::new(&c, &ca, &Cpu));
        compare(&a, &b, std::slice::from_ref(w), &Silent).expect("both models run")
    };
    windows.iter().map(one).max_by(|a, b| a.max_abs_dlogit.total_cmp(&b.max_abs_dlogit)).expect("a window")
}

#[test]
fn exact_loses_nothing_in_any_target_that_holds_the_source() {
    let cases: [(&str, &[TargetKind]); 12] = [
        ("pico-llama", &DENSE),
        ("pico-llama3", &DENSE),
        ("pico-qwen2", &DENSE),
        ("pico-phi3", &DENSE),
        ("pico-phi3-long", &DENSE),
        ("pico-granite", &DENSE),
        ("pico-qwen3", &[TargetKind::HfRemote]),
        ("pico-gemma2", &[TargetKind::HfRemote]),
        ("pico-olmo2", &[TargetKind::HfRemote]),
        ("pico-mixtral", &[TargetKind::HfRemote, TargetKind::DeepseekV2]),
        ("pico-qwen2-moe", &[TargetKind::HfRemote]),
        ("pico-qwen3-moe", &[TargetKind::HfRemote]),
    ];
    for (name, targets) in cases {
        for target in DENSE {
            let dir = tempfile::tempdir().expect("a temporary folder");
            let to = dir.path().join("out");
            match (targets.contains(&target), run(&fixture(name), &to, &exact(target))) {
                (true, Ok(report)) => {
                    assert_eq!(report.target, target);
                    let c = side_by_side(&fixture(name), &to, &golden_tokens(&fixture(name)));
                    assert!(c.max_abs_dlogit < ROUNDING, "{name} {target:?}: {c:?}");
                    assert!(c.cached_vs_full_max_abs_dlogit < ROUNDING, "{name} {target:?}: {c:?}");
                    assert_eq!(to.join("modeling_gqa2mla.py").exists(), target == TargetKind::HfRemote);
                }
                (true, Err(e)) => panic!("{name} {target:?}: {e}"),
                (false, Ok(_)) => panic!("{name} {target:?} was taken"),
                (false, Err(e)) => {
                    assert!(e.contains(target.name()) && e.contains("hint:"), "{name}: {e}");
                    assert!(!to.exists());
                }
            }
        }
        // What `auto` picks holds the source, and transformers' verdict on it is not a no.
        let dir = tempfile::tempdir().expect("a temporary folder");
        let to = dir.path().join("out");
        let report = run(&fixture(name), &to, &exact(TargetKind::Auto)).expect("auto finds a target");
        assert!(targets.contains(&report.target), "{name}: {:?}", report.target);
        let (source, _) = open(&to);
        let facts = Facts::read(&source.config, Some(&source.tensors)).expect("an MLA folder");
        let verdict = &judge(&facts)[0];
        assert!(verdict.engine == "transformers" && verdict.loads != Loads::No, "{name}: {verdict:?}");
    }
}

#[test]
fn experts_are_copied_bit_for_bit() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out");
    run(&fixture("pico-mixtral"), &to, &exact(TargetKind::HfRemote)).expect("converts");
    let ((a, _), (b, _)) = (open(&fixture("pico-mixtral")), open(&to));
    for (from, into) in
        [("gate", "gate"), ("experts.3.w1", "experts.3.gate_proj"), ("experts.0.w2", "experts.0.down_proj")]
    {
        let stored = a.tensors.view(&format!("model.layers.1.block_sparse_moe.{from}.weight")).expect("there");
        let written = b.tensors.view(&format!("model.layers.1.mlp.{into}.weight")).expect("there");
        assert_eq!((stored.dtype, &stored.bytes), (written.dtype, &written.bytes), "{from}");
    }
}

fn aware() -> ConvertSettings {
    let calibration = CalibrationSettings { samples: 24, seq_len: 96, ..CalibrationSettings::default() };
    ConvertSettings { calibration, kv_lora_rank: Some(48), qk_rope_head_dim: Some(24), ..ConvertSettings::default() }
}

#[test]
fn padding_to_kernels_changes_nothing_but_widths() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (i, base) in [
        aware(),
        ConvertSettings { profile: Some(Profile::Portable), qk_rope_head_dim: Some(16), ..aware() },
        exact(TargetKind::Auto),
    ]
    .into_iter()
    .enumerate()
    {
        let (plain, padded) = (dir.path().join(format!("plain-{i}")), dir.path().join(format!("padded-{i}")));
        let s = ConvertSettings { dtype: Some(OutputDtype::F32), force: true, ..base };
        let from = fixture("pico-trained");
        run(&from, &plain, &ConvertSettings { pad: Some(Padding::None), ..s.clone() }).expect("converts");
        let report = run(&from, &padded, &ConvertSettings { pad: Some(Padding::Kernels), ..s }).expect("converts");
        let g = report.geometry;
        assert_eq!((g.kv_lora_rank, g.qk_rope_head_dim, g.v_head_dim), (256, 64, 128));
        assert!(report.decisions.iter().any(|d| d.contains("padded") && d.contains("bytes")), "{:?}", report.decisions);
        let c = side_by_side(&plain, &padded, &golden_tokens(&fixture("pico-trained")));
        assert!(c.max_abs_dlogit < ROUNDING, "{c:?}");
    }
}

#[test]
fn the_portable_profile_is_what_every_engine_runs() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let to = dir.path().join("out");
    let s = ConvertSettings { profile: Some(Profile::Portable), qk_rope_head_dim: Some(16), force: true, ..aware() };
    run(&fixture("pico-trained"), &to, &s).expect("converts");
    let (source, _) = open(&to);
    let facts = Facts::read(&source.config, Some(&source.tensors)).expect("an MLA folder");
    assert!(judge(&facts).iter().all(|v| v.loads != Loads::No), "{:?}", judge(&facts));
    // Biases have no place there.
    let error =
        run(&fixture("pico-qwen2"), &dir.path().join("no"), &ConvertSettings { method: Method::Exact, ..s.clone() });
    let error = error.expect_err("exact takes no widths, or the profile no biases");
    assert!(error.contains("hint:"), "{error}");
    let error = run(
        &fixture("pico-qwen2"),
        &dir.path().join("no"),
        &ConvertSettings { profile: Some(Profile::Portable), ..exact(TargetKind::Auto) },
    );
    assert!(error.expect_err("biases").contains("biases"), "biases are named");
}

#[test]
fn fp8_is_within_the_format_s_error_and_reads_back() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (wide, narrow) = (dir.path().join("bf16"), dir.path().join("fp8"));
    let s = ConvertSettings { pad: Some(Padding::Kernels), force: true, ..aware() };
    let from = fixture("pico-trained");
    run(&from, &wide, &ConvertSettings { dtype: Some(OutputDtype::Bf16), ..s.clone() }).expect("converts");
    run(&from, &narrow, &ConvertSettings { dtype: Some(OutputDtype::Fp8), ..s }).expect("converts");
    let (source, _) = open(&narrow);
    assert_eq!(source.config["quantization_config"]["quant_method"], "fp8");
    let name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight";
    assert_eq!(source.tensors.get(name).expect("there").dtype, Dtype::F8_E4M3);
    assert_eq!(source.tensors.get(&fp8::scale_name(name)).expect("there").dtype, Dtype::F32);
    // Each weight is off by at most 2^-4 of itself, 2^-5 on average: about that share of each layer's output.
    let c = side_by_side(&wide, &narrow, &golden_tokens(&fixture("pico-trained")));
    assert!(c.kl_nats_per_token < 0.02, "{c:?}");
    // A latent that shares a block with the rotated key would vanish.
    let error = run(&from, &dir.path().join("no"), &ConvertSettings { dtype: Some(OutputDtype::Fp8), ..aware() });
    assert!(error.expect_err("48 latents").contains("share"), "the block is named");
}

/// A fixture under another config and other tensor names and bytes.
fn rewritten(
    name: &str,
    to: &Path,
    config: impl Fn(Value) -> Value,
    tensor: impl Fn(&str, &[f64], &[usize]) -> Vec<(String, safetensors::Dtype, Vec<usize>, Vec<u8>)>,
) {
    let (source, _) = open(&fixture(name));
    fs_err::create_dir_all(to).expect("made");
    fs_err::write(to.join("config.json"), config(source.config.clone()).to_string()).expect("written");
    let made: Vec<_> = source
        .tensors
        .names()
        .flat_map(|n| {
            let view = source.tensors.view(n).expect("there");
            tensor(n, &view.to_f64(), view.shape)
        })
        .collect();
    let views = made.iter().map(|(n, d, s, b)| (n.clone(), TensorView::new(*d, s.clone(), b).expect("a tensor")));
    let bytes = safetensors::serialize(views, None).expect("serialises");
    fs_err::write(to.join("model.safetensors"), bytes).expect("written");
}

fn as_f32(values: &[f64]) -> Vec<u8> {
    values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect()
}

#[test]
fn fp8_sources_are_read() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let from = dir.path().join("fp8");
    rewritten(
        "pico-llama",
        &from,
        |mut c| {
            c["quantization_config"] = json!({ "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128] });
            c
        },
        |name, values, shape| {
            if !fp8::is_quantised(name) && !name.ends_with("k_proj.weight") && !name.ends_with("v_proj.weight") {
                return vec![(name.to_owned(), safetensors::Dtype::F32, shape.to_vec(), as_f32(values))];
            }
            let (bytes, scales) = fp8::quantise(values, shape[1]);
            let scales: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
            let blocks = shape.iter().map(|n| n.div_ceil(fp8::BLOCK)).collect();
            vec![
                (name.to_owned(), safetensors::Dtype::F8_E4M3, shape.to_vec(), bytes),
                (fp8::scale_name(name), safetensors::Dtype::F32, blocks, scales),
            ]
        },
    );
    let to = dir.path().join("out");
    run(&from, &to, &ConvertSettings { dtype: Some(OutputDtype::F32), ..exact(TargetKind::Auto) }).expect("converts");
    let c = side_by_side(&from, &to, &golden_tokens(&fixture("pico-llama")));
    assert!(c.max_abs_dlogit < ROUNDING, "{c:?}");
}

#[test]
fn a_language_model_is_taken_out_of_a_multimodal_one() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let from = dir.path().join("llava");
    rewritten(
        "pico-mistral",
        &from,
        |c| json!({ "model_type": "llava", "text_config": c }),
        |name, values, shape| {
            let inside = (format!("language_model.{name}"), safetensors::Dtype::F32, shape.to_vec(), as_f32(values));
            let vision = (format!("vision_tower.{name}"), safetensors::Dtype::F32, vec![1], as_f32(&[0.5]));
            vec![inside, vision]
        },
    );
    let mut source = ModelSource::open(&from.display().to_string(), &OpenOptions::default(), &Silent).expect("opens");
    source.config = language_config(&source.config).expect("wraps a language model");
    let mut arch = Architecture::from_config(&source.config).expect("is understood");
    arch.look_inside(&source.tensors).expect("is found");
    check_tensors(&arch, &source.tensors).expect("agrees");
    let to = dir.path().join("out");
    convert(&source, &arch, &exact(TargetKind::Auto), &to, &|_| Vec::new(), &Silent).expect("converts");
    let c = side_by_side(&fixture("pico-mistral"), &to, &golden_tokens(&fixture("pico-mistral")));
    assert!(c.max_abs_dlogit < ROUNDING, "{c:?}");
}

#[test]
fn a_family_file_reads_what_nobody_knows() {
    let family = Family::parse("mine", "extends = \"llama\"\nmodel_types = [\"mine\"]\n").expect("parses");
    let (source, known) = open(&fixture("pico-llama"));
    let mut config = source.config.clone();
    config["model_type"] = "mine".into();
    assert!(Architecture::from_config(&config).expect_err("unknown").to_string().contains("`mine`"));
    let arch = Architecture::from_config_with(&config, &[family]).expect("is understood");
    assert_eq!(arch.expected_tensors(), known.expected_tensors());
}

#[test]
fn norms_of_heads_become_linear_maps_or_are_refused() {
    // Without a tokenizer nothing can be calibrated on, so the fixture borrows one whose ids it can hold.
    let dir = tempfile::tempdir().expect("a temporary folder");
    let from = dir.path().join("qwen3");
    let (trained, _) = open(&fixture("pico-trained"));
    let vocab = trained.config["vocab_size"].as_u64().expect("a number") as usize;
    rewritten(
        "pico-qwen3",
        &from,
        |mut c| {
            c["vocab_size"] = vocab.into();
            c
        },
        |name, values, shape| {
            let mut shape = shape.to_vec();
            let mut values = values.to_vec();
            if name == "model.embed_tokens.weight" {
                values = (0..vocab * shape[1]).map(|i| values[(i * 7 + i / 97) % values.len()]).collect();
                shape[0] = vocab;
            }
            vec![(name.to_owned(), safetensors::Dtype::F32, shape, as_f32(&values))]
        },
    );
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs_err::copy(fixture("pico-trained").join(file), from.join(file)).expect("copied");
    }
    let to = dir.path().join("out");
    let report = run(&from, &to, &ConvertSettings { kv_lora_rank: Some(28), qk_rope_head_dim: Some(16), ..aware() })
        .expect("converts");
    assert_eq!(report.target, TargetKind::DeepseekV3);
    assert!(report.decisions.iter().any(|d| d.contains("linear maps")), "{:?}", report.decisions);
    assert!(report.layers.iter().all(|l| l.notes.iter().any(|n| n.contains("R2 per head"))), "{:?}", report.layers);
    let windows: Vec<Vec<u32>> = vec![(0..60).map(|i| (i * 13 % vocab) as u32).collect()];
    let c = side_by_side(&from, &to, &windows);
    assert!(c.kl_nats_per_token < 0.5, "{c:?}");
}

#[test]
fn stock_targets_refuse_f16_with_the_reason() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let half = |target| ConvertSettings { dtype: Some(OutputDtype::F16), ..exact(target) };
    for target in STOCK {
        let error = run(&fixture("pico-llama"), &dir.path().join("no"), &half(target)).expect_err("f16");
        assert!(error.contains("2^-20") && error.contains("hf-remote"), "{error}");
    }
    let to = dir.path().join("out");
    run(&fixture("pico-llama"), &to, &half(TargetKind::HfRemote)).expect("the generic class norms no latent");
    let c = side_by_side(&fixture("pico-llama"), &to, &golden_tokens(&fixture("pico-llama")));
    // Eleven bits in every weight of two layers.
    assert!(c.max_abs_dlogit < 0.05, "{c:?}");
}
