//! The bytes of every conversion, against a committed table.
//!
//! `tests/convert/hashes.tsv` holds the SHA-256 of every file that each method writes for each fixture and target, and of the
//! message where a case is refused. A change of structure must not change one of them; a commit that changes bytes on purpose
//! renews the lines it changes (`scripts/renew_hashes.sh`) and says why.
//!
//! Decompositions differ in their last bits between processors with other vector instructions. The table names those it was
//! made with; on another processor only method `exact`, which decomposes nothing, is held to it. A build with the feature `lapack`
//! has other bits and says so in every report, and is not held to it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const SOURCES: [&str; 15] = [
    "pico-gemma2",
    "pico-granite",
    "pico-llama",
    "pico-llama3",
    "pico-mha",
    "pico-mistral",
    "pico-mixtral",
    "pico-olmo2",
    "pico-phi3",
    "pico-phi3-long",
    "pico-qwen2",
    "pico-qwen2-moe",
    "pico-qwen3",
    "pico-qwen3-moe",
    "pico-trained",
];
const METHODS: [&str; 6] = ["attention-aware", "care", "exact", "mha2mla", "transmla", "x-ecomla"];
const TARGETS: [&str; 5] = ["deepseek_v2", "deepseek_v3", "hf-remote", "minicpm3", "youtu"];
/// Models that `rotate` and `shard` take.
const LATENT: [&str; 4] = ["pico-deepseek-v3", "pico-deepseek-v3-bias", "pico-deepseek-v3-fp8", "pico-minicpm3"];

/// Options beside a method and a target, on the model they matter to.
const OPTIONS: [(&str, &str); 34] = [
    ("pico-trained", "--kv-budget 33%"),
    ("pico-trained", "--kv-budget 50% --refine 3"),
    ("pico-trained", "--kv-lora-rank 24 --qk-rope-head-dim 8"),
    ("pico-trained", "--kv-budget 50% --without phase --without metric --without converted-stream"),
    ("pico-trained", "--kv-budget 50% --without query-refit --without key-refit --without value-refit"),
    ("pico-trained", "--kv-budget 50% --without centring --without query-weight --without output-refit"),
    ("pico-trained", "--kv-budget 50% --rope-grid stock"),
    ("pico-trained", "--kv-budget 50% --profile portable"),
    ("pico-trained", "--kv-budget 50% --profile portable --method transmla"),
    ("pico-trained", "--pad kernels --kv-lora-rank 128 --qk-rope-head-dim 16 --rope-grid stock --force"),
    ("pico-trained", "--dtype fp8 --kv-lora-rank 128 --qk-rope-head-dim 16 --force"),
    ("pico-trained", "--dtype f32 --kv-budget 50% --method care"),
    ("pico-trained", "--dtype f16 --target hf-remote --kv-budget 50%"),
    ("pico-trained", "--dtype f16"),
    ("pico-trained", "--mla-layers auto:50% --kv-budget 50%"),
    ("pico-trained", "--mla-layers 0,2-3 --kv-budget 50% --method transmla"),
    ("pico-trained", "--mla-layers 1 --kv-budget 50% --method x-ecomla"),
    ("pico-trained", "--method transmla --kv-budget 50% --q-lora-rank 48 --freqfold 2"),
    ("pico-trained", "--method transmla --kv-budget 50% --balance-kv-ratio none"),
    ("pico-trained", "--method x-ecomla --kv-energy 0.9 --q-energy 0.9"),
    ("pico-trained", "--method x-ecomla --published-layout --kv-budget 50%"),
    ("pico-trained", "--method x-ecomla --partial-rope 2-norm --kv-budget 50%"),
    ("pico-trained", "--method mha2mla --partial-rope 2-norm --kv-budget 50%"),
    ("pico-trained", "--method mha2mla --svd split --kv-budget 50%"),
    ("pico-trained", "--method mha2mla --partial-rope low --kv-budget 50%"),
    ("pico-trained", "--max-shard-size 200KB --method exact"),
    ("pico-trained", "--max-context 64 --method exact"),
    ("pico-trained", "--calib-max-seq-len 64 --fit-tokens 512 --kv-budget 50%"),
    ("pico-trained", "--max-memory 1MB"),
    ("pico-llama3", "--profile portable"),
    ("pico-llama3", "--method exact --profile portable"),
    ("pico-qwen2", "--method transmla --kv-budget 50%"),
    ("pico-qwen3", "--kv-budget 50% --force"),
    ("pico-mistral", "--method exact"),
];

/// A run of the tool: its name in the table, and its arguments but for the output.
struct Case {
    name: String,
    arguments: Vec<String>,
}

impl Case {
    fn new(arguments: String) -> Self {
        let calibration =
            arguments.starts_with("convert").then_some(" --calib TEXT --calib-samples 12 --calib-seq-len 32");
        let text = arguments.contains("pca").then_some(" --calib TEXT --calib-samples 12 --calib-seq-len 32");
        let model = arguments.split(' ').nth(1).unwrap_or_default().to_owned();
        let all = format!("{arguments}{}{}", calibration.unwrap_or_default(), text.unwrap_or_default());
        let all = all.replace("TEXT", &format!("{model}.txt"));
        Self { name: arguments, arguments: all.split(' ').map(str::to_owned).collect() }
    }
}

fn cases() -> Vec<Case> {
    let mut out = Vec::new();
    for model in SOURCES {
        for method in METHODS {
            for target in TARGETS {
                let force = if method == "exact" { "" } else { " --kv-budget 50%" };
                out.push(Case::new(format!("convert {model} --method {method} --target {target}{force}")));
            }
        }
        out.push(Case::new(format!("convert {model}")));
    }
    out.extend(OPTIONS.iter().map(|(model, options)| Case::new(format!("convert {model} {options}"))));
    for model in LATENT {
        for transform in ["none", "hadamard", "pca"] {
            out.push(Case::new(format!("rotate {model} --transform {transform}")));
        }
        for tp in [1, 2] {
            out.push(Case::new(format!("shard {model} --tp {tp}")));
        }
    }
    out
}

/// A model's folder in `root`, with a tokenizer of one token a word where it has none, and a text it can read.
fn prepare(root: &Path, name: &str) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name);
    let to = root.join(name);
    fs_err::create_dir(&to).expect("a folder");
    for entry in fs_err::read_dir(&from).expect("the fixture").map(|e| e.expect("an entry")) {
        let file = entry.file_name().to_string_lossy().into_owned();
        if !file.starts_with("golden") {
            fs_err::copy(entry.path(), to.join(file)).expect("copied");
        }
    }
    let config: Value = serde_json::from_slice(&fs_err::read(to.join("config.json")).expect("read")).expect("JSON");
    let vocab = config["vocab_size"].as_u64().expect("a vocabulary");
    if to.join("tokenizer.json").exists() {
        fs_err::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("data/calib.txt"), root.join(format!("{name}.txt")))
            .expect("copied");
        return;
    }
    let words: serde_json::Map<String, Value> = (0..vocab).map(|i| (format!("w{i}"), json!(i))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "Whitespace" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": words, "unk_token": "w0" }
    });
    fs_err::write(to.join("tokenizer.json"), tokenizer.to_string()).expect("written");
    // Words with a slope, so that moments have a spectrum.
    let (mut state, mut text) = (12345_u64, String::new());
    for _ in 0..6000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let uniform = (state >> 40) as f64 / (1_u64 << 24) as f64;
        write!(text, "w{} ", (uniform * uniform * vocab as f64) as u64).expect("a string");
    }
    fs_err::write(root.join(format!("{name}.txt")), text).expect("written");
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn program() -> PathBuf {
    std::env::var_os("GQA2MLA_BIN").map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_gqa2mla")), PathBuf::from)
}

/// What a case writes: hash by file, or the message's where it is refused.
fn outcome(root: &Path, case: &Case, number: usize) -> BTreeMap<String, String> {
    let folder = format!("out-{number}");
    let out = Command::new(program())
        .current_dir(root)
        .args(&case.arguments)
        .args(["-o", &folder, "--quiet"])
        .env("RAYON_NUM_THREADS", "1")
        .env_remove("RUST_LOG")
        .output()
        .expect("the tool starts");
    let to = root.join(&folder);
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr).replace(&folder, "OUT");
        return BTreeMap::from([(format!("exit {}", out.status.code().unwrap_or(-1)), sha256(said.as_bytes()))]);
    }
    let mut files = Vec::new();
    list(&to, &mut files);
    let hash = |file: &PathBuf| {
        let name = file.strip_prefix(&to).expect("within").display().to_string();
        (name, sha256(&fs_err::read(file).expect("read")))
    };
    let own = |name: &str| !name.ends_with("manifest.json") && !name.contains("tokenizer");
    let hashes = files.iter().map(hash).filter(|(name, _)| own(name)).collect();
    fs_err::remove_dir_all(&to).expect("removed");
    hashes
}

fn list(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs_err::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").path()) {
        if entry.is_dir() { list(&entry, files) } else { files.push(entry) }
    }
}

/// The vector instructions that decide last bits.
fn instructions() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            return "x86-64 avx512f";
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return "x86-64 avx2 fma";
        }
    }
    std::env::consts::ARCH
}

#[test]
#[cfg_attr(feature = "lapack", ignore = "the table is that of builds without the feature `lapack`")]
fn conversions_write_the_bytes_they_wrote() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    SOURCES.iter().chain(&LATENT).for_each(|model| prepare(dir.path(), model));
    let (cases, next) = (cases(), AtomicUsize::new(0));
    let outcomes = Mutex::new(BTreeMap::new());
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some((i, case)) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|i| Some((i, cases.get(i)?)))
                {
                    let files = outcome(dir.path(), case, i);
                    outcomes.lock().expect("no panic").insert(case.name.clone(), files);
                }
            });
        }
    });
    let mut now = format!("# made with {}\n", instructions());
    for (case, files) in outcomes.into_inner().expect("no panic") {
        files.iter().for_each(|(file, hash)| writeln!(now, "{case}\t{file}\t{hash}").expect("a string"));
    }
    let table = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/convert/hashes.tsv");
    if std::env::var_os("GQA2MLA_RENEW_HASHES").is_some() {
        fs_err::write(table, now).expect("written");
        return;
    }
    let before = fs_err::read_to_string(table).expect("the committed table");
    let comparable = before.lines().next() == now.lines().next();
    let held = |line: &&str| !line.starts_with('#') && (comparable || line.contains("--method exact"));
    let (before, now): (Vec<&str>, Vec<&str>) =
        (before.lines().filter(held).collect(), now.lines().filter(held).collect());
    assert!(before.len() > 100, "the table is not whole");
    let gone: Vec<&&str> = before.iter().filter(|line| !now.contains(line)).collect();
    let new: Vec<&&str> = now.iter().filter(|line| !before.contains(line)).collect();
    assert!(gone.is_empty() && new.is_empty(), "other bytes than the table has:\n- {gone:#?}\n+ {new:#?}");
}
