//! Weights used in place, in maps of their files: the same bits as weights that are read, and errors, not signals, where a
//! file changes under a model that runs.

#[path = "common/models.rs"]
mod models;

use std::path::{Path, PathBuf};
use std::time::Duration;

use fs_err as fs;
use gqa2mla::arch::Architecture;
use gqa2mla::observe::Silent;
use gqa2mla::runtime::{Cpu, Device, Model, Resident, RuntimeError, Session, SessionSize, XkvSession, XkvSettings};
use gqa2mla::source::SourceError;
use gqa2mla::verify;
use models::{fixture, open};
use ndarray::Array2;

/// All fixtures: GQA and MLA, dense and experts, f32, bf16 and FP8.
fn fixtures() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(fixture(""))
        .expect("readable")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.join("config.json").exists())
        .collect();
    found.sort();
    assert!(found.len() >= 20, "{}", found.len());
    found
}

/// A copy of a fixture that may be spoilt.
fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for entry in fs::read_dir(fixture(name)).expect("readable") {
        let path = entry.expect("readable").path();
        if path.file_name().is_some_and(|n| n != "golden.safetensors") {
            fs::copy(&path, dir.path().join(path.file_name().expect("named"))).expect("copied");
        }
    }
    dir
}

fn weights(dir: &Path) -> PathBuf {
    dir.join("model.safetensors")
}

fn cut(dir: &Path, bytes: u64) {
    let file = fs::OpenOptions::new().write(true).open(weights(dir)).expect("opens");
    file.set_len(bytes).expect("cut");
}

fn tokens(arch: &Architecture, count: usize) -> Vec<u32> {
    (0..count).map(|i| (i * 37 % arch.vocab) as u32).collect()
}

/// Everything that a model computes: windows at once (of few and of many rows), token by token, in pieces, side by side.
fn all_logits(model: Model<'_, Cpu>) -> Vec<Array2<f32>> {
    let arch = model.architecture();
    let resident = Resident::load(model).expect("loads");
    let windows = [tokens(arch, 11), tokens(arch, 40)];
    let mut all = vec![resident.logits(&windows).expect("runs")];
    let hidden = model.final_hidden(&windows, &Silent).expect("runs");
    all.push(model.head().and_then(|head| head.logits(hidden.view())).expect("runs"));
    let mut session = Session::new(&resident, 60).expect("fits");
    for piece in [&windows[1][..], &[3], &[1, 4, 1, 5], &windows[0][..2]] {
        let logits = session.prefill(piece).expect("runs");
        all.push(Array2::from_shape_vec((1, logits.len()), logits).expect("a row"));
    }
    let size = SessionSize { sequences: 2, capacity: 20, beyond_context: false };
    let mut session = Session::with(&resident, size).expect("fits");
    all.push(session.feed(&[&windows[0][..5], &windows[1][..9]]).expect("runs"));
    all.push(session.feed(&[&[1], &[2]]).expect("runs"));
    all
}

fn bits(all: &[Array2<f32>]) -> Vec<Vec<u32>> {
    all.iter().map(|m| m.iter().map(|x| x.to_bits()).collect()).collect()
}

#[test]
fn weights_in_place_give_the_bits_of_weights_that_are_read() {
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool");
    let three = rayon::ThreadPoolBuilder::new().num_threads(3).build().expect("a pool");
    for dir in fixtures() {
        let (source, arch) = open(&dir);
        let model = Model::new(&source, &arch, &Cpu);
        let read = bits(&three.install(|| all_logits(model)));
        let whole = bits(&three.install(|| all_logits(model.in_place())));
        assert!(read == whole, "{}", dir.display());
        assert!(read == bits(&one.install(|| all_logits(model.in_place()))), "{}: threads", dir.display());
        if arch.moe.is_some() {
            let streamed = one.install(|| all_logits(model.in_place().with_held_experts(0)));
            assert!(read == bits(&streamed), "{}: experts as they are needed", dir.display());
        }
    }
}

#[test]
fn long_windows_and_compressed_prompts_too() {
    let (source, arch) = open(&fixture("pico-trained"));
    let model = Model::new(&source, &arch, &Cpu);
    // More tokens than the panels of an MLP begin at.
    let windows: Vec<Vec<u32>> = (0..2100 / 128 + 1).map(|i| tokens(&arch, 128 + i % 2)).collect();
    let hidden = |model: Model<'_, Cpu>| model.final_hidden(&windows, &Silent).expect("runs");
    assert!(bits(&[hidden(model)]) == bits(&[hidden(model.in_place())]));
    let settings = XkvSettings { group: 2, rank_k: 16, rank_v: 16 };
    let xkv = |model: Model<'_, Cpu>| {
        let resident = Resident::load(model).expect("loads");
        let mut session = XkvSession::new(&resident, settings, 80, false).expect("fits");
        let mut all = vec![session.prefill(&tokens(&arch, 64)).expect("runs")];
        all.extend((0..3).map(|t| session.step(t).expect("runs")));
        all.iter().flatten().map(|x| x.to_bits()).collect::<Vec<u32>>()
    };
    assert!(xkv(model) == xkv(model.in_place()));
    let figures = |model: Model<'_, Cpu>| verify::perplexity(&model, &windows[..2], &Silent).expect("runs");
    assert_eq!(figures(model), figures(model.in_place()));
    // By the type that is told the device at run time.
    let device = Device::Cpu(Cpu);
    let there = Model::new(&source, &arch, &device).in_place();
    assert_eq!(figures(model), verify::perplexity(&there, &windows[..2], &Silent).expect("runs"));
}

/// Files whose data begin at any byte.
#[test]
fn misaligned_weights_give_the_same() {
    for name in ["pico-llama", "pico-trained", "pico-deepseek-v3-moe"] {
        let (source, arch) = open(&fixture(name));
        let want = bits(&all_logits(Model::new(&source, &arch, &Cpu)));
        for more in 1..4 {
            let dir = copy(name);
            let bytes = fs::read(weights(dir.path())).expect("readable");
            let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight"));
            let (start, data) = bytes[8..].split_at(header as usize);
            let moved = [&(header + more).to_le_bytes()[..], start, &b"   "[..more as usize], data].concat();
            fs::write(weights(dir.path()), moved).expect("written");
            let (source, arch) = open(dir.path());
            assert!(want == bits(&all_logits(Model::new(&source, &arch, &Cpu).in_place())), "{name} moved by {more}");
        }
    }
}

/// The path and what changed.
fn changed(error: &RuntimeError) -> (&Path, &str) {
    match error {
        RuntimeError::Source(SourceError::Changed { path, what }) => (path, what),
        other => panic!("{other}"),
    }
}

#[test]
fn a_file_that_is_cut_is_an_error_of_whatever_runs_next() {
    for name in ["pico-trained", "pico-deepseek-v3"] {
        for left in [0, 2_000, 40_000] {
            let dir = copy(name);
            let (source, arch) = open(dir.path());
            let model = Model::new(&source, &arch, &Cpu).in_place();
            let resident = Resident::load(model).expect("loads");
            let mut session = Session::new(&resident, 60).expect("fits");
            session.prefill(&tokens(&arch, 20)).expect("runs");
            cut(dir.path(), left);
            let errors = [
                session.step(1).unwrap_err(),
                session.prefill(&tokens(&arch, 20)).unwrap_err(),
                resident.logits(&[tokens(&arch, 20)]).unwrap_err(),
                model.final_hidden(&[tokens(&arch, 20)], &Silent).unwrap_err(),
                model.check_files().unwrap_err(),
            ];
            for error in &errors {
                assert_eq!(changed(error), (&*weights(dir.path()), "it became shorter"), "{name}, {left} bytes");
                assert!(error.to_string().contains("hint: "), "{error}");
            }
        }
    }
}

/// A layer that is called by itself computes with zeros; the check that follows refuses what it made.
#[cfg(unix)]
#[test]
fn a_layer_survives_the_loss_of_its_weights() {
    let dir = copy("pico-trained");
    let (source, arch) = open(dir.path());
    let model = Model::new(&source, &arch, &Cpu).in_place();
    let layer = model.layer(1).expect("loads");
    let x = Array2::from_elem((30, arch.hidden), 0.5);
    layer.forward(&mut x.clone(), &[30]).expect("runs");
    cut(dir.path(), 0);
    layer.forward(&mut x.clone(), &[30]).expect("runs");
    layer.forward_cached(&mut x.clone()).expect("runs");
    drop(layer);
    assert_eq!(changed(&model.check_layer(1, x.view()).unwrap_err()).1, "it became shorter");
    // Putting it back does not bring back what was read meanwhile.
    fs::copy(weights(&fixture("pico-trained")), weights(dir.path())).expect("copied");
    changed(&model.check_files().unwrap_err());
}

#[test]
fn a_file_that_is_written_to_is_an_error_and_one_that_is_replaced_is_not() {
    let dir = copy("pico-trained");
    let (source, arch) = open(dir.path());
    let resident = Resident::load(Model::new(&source, &arch, &Cpu).in_place()).expect("loads");
    let text = tokens(&arch, 20);
    let before = resident.logits(std::slice::from_ref(&text)).expect("runs");
    // As this program publishes, and others do: the new file under another name, then a rename.
    let beside = dir.path().join("new");
    fs::write(&beside, b"something else").expect("written");
    fs::rename(&beside, weights(dir.path())).expect("renamed");
    assert_eq!(resident.logits(std::slice::from_ref(&text)).expect("runs"), before);

    let dir = copy("pico-trained");
    let (source, arch) = open(dir.path());
    let resident = Resident::load(Model::new(&source, &arch, &Cpu).in_place()).expect("loads");
    resident.logits(std::slice::from_ref(&text)).expect("runs");
    let bytes = fs::read(weights(dir.path())).expect("readable");
    // The clock of the file system has to move on.
    std::thread::sleep(Duration::from_millis(20));
    fs::write(weights(dir.path()), bytes).expect("written");
    let error = resident.logits(std::slice::from_ref(&text)).unwrap_err();
    assert!(["its modification time", "it became shorter"].contains(&changed(&error).1), "{error}");
}

#[test]
fn a_file_that_was_cut_before_it_is_used_is_an_error_by_name() {
    let dir = copy("pico-trained");
    let (source, arch) = open(dir.path());
    cut(dir.path(), 30_000);
    let model = Model::new(&source, &arch, &Cpu).in_place();
    assert_eq!(changed(&Resident::load(model).unwrap_err()).1, "it became shorter");
    assert_eq!(changed(&model.embed(&[1]).unwrap_err()).1, "it became shorter");
}

/// Another process cuts the file at any moment of a step: every time an error, and no step after it.
#[test]
fn files_that_are_cut_while_a_model_decodes_are_errors() {
    let mut survived = 0;
    for round in 0..30u64 {
        let dir = copy("pico-trained");
        let (source, arch) = open(dir.path());
        let resident = Resident::load(Model::new(&source, &arch, &Cpu).in_place()).expect("loads");
        let error = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_micros(round * 97));
                cut(dir.path(), 4096 * (round % 9));
            });
            let mut session = Session::new(&resident, 100).expect("fits");
            loop {
                session.truncate(0);
                match session.prefill(&tokens(&arch, 30)).and_then(|_| session.step(3)) {
                    Ok(_) => survived += 1,
                    Err(error) => return error,
                }
            }
        });
        assert_eq!(changed(&error).1, "it became shorter");
    }
    assert!(survived > 0, "no file was cut while a model decoded");
}

/// The binary, whose weights go while it writes text.
#[cfg(unix)]
#[test]
fn generate_ends_with_an_error_when_its_weights_go() {
    use std::io::Read as _;
    use std::process::{Command, Stdio};
    let dir = copy("pico-trained");
    let mut child = Command::new(assert_cmd::cargo::cargo_bin!("gqa2mla"))
        .args(["generate", &dir.path().display().to_string(), "--device", "cpu", "--prompt", "the", "--raw"])
        .args(["--ignore-end", "--beyond-context", "--max-tokens", "100000", "--temperature", "1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    // The first bytes of text: it decodes.
    child.stdout.as_mut().expect("a pipe").read_exact(&mut [0; 8]).expect("writes");
    cut(dir.path(), 0);
    let (mut out, mut err) = (child.stdout.take().expect("a pipe"), child.stderr.take().expect("a pipe"));
    let drained = std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
    let mut text = String::new();
    err.read_to_string(&mut text).expect("text");
    drained.join().expect("ends").expect("reads");
    let status = child.wait().expect("ends");
    assert_eq!(status.code(), Some(2), "{status}: {text}");
    assert!(text.contains("changed while it was in use (it became shorter)"), "{text}");
}
