//! Every fixture's logits against those of stock transformers (f32, eager attention), full forward and with a cache.

// Figures for the record, shown with --nocapture.
#![allow(clippy::print_stdout)]

use std::path::{Path, PathBuf};

use gqa2mla::arch::Architecture;
use gqa2mla::observe::Silent;
use gqa2mla::runtime::{Cpu, Model, Resident, Session};
use gqa2mla::source::{ModelSource, OpenOptions};
use safetensors::SafeTensors;

fn fixtures() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let mut found: Vec<_> = fs_err::read_dir(&root)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|dir| dir.join("golden.safetensors").exists())
        .collect();
    found.sort();
    assert!(found.len() >= 5, "{} holds {} fixtures", root.display(), found.len());
    found
}

/// Sequences with the logits of transformers, `[T, V]` row-major.
fn golden(dir: &Path) -> Vec<(Vec<u32>, Vec<f32>)> {
    let bytes = fs_err::read(dir.join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut out = Vec::new();
    while let Ok(tokens) = file.tensor(&format!("tokens.{}", out.len())) {
        let logits = file.tensor(&format!("logits.{}", out.len())).unwrap();
        let tokens = tokens.data().chunks_exact(8).map(|c| i64::from_le_bytes(c.try_into().unwrap()) as u32);
        let logits = logits.data().chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap()));
        out.push((tokens.collect(), logits.collect()));
    }
    assert!(!out.is_empty(), "{} has no sequence", dir.display());
    out
}

/// What two f32 implementations may differ by: each layer has about eight roundings in a row, each a sum of up to
/// `widest` terms whose errors add up like a random walk, and both sides err.
fn tolerance(arch: &Architecture, scale: f32) -> f32 {
    let widest = arch.hidden.max(arch.intermediate) as f32;
    2.0 * (8 * arch.layers + 2) as f32 * widest.sqrt() * f32::EPSILON * scale
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

#[test]
fn logits_are_those_of_transformers() {
    for dir in fixtures() {
        let source = ModelSource::open(dir.to_str().unwrap(), &OpenOptions::default(), &Silent).unwrap();
        let arch = Architecture::from_config(&source.config).unwrap();
        let model = Model::new(&source, &arch, &Cpu);
        let resident = Resident::load(model).unwrap();
        let sequences = golden(&dir);
        let (mut full, mut cached) = (0.0f32, 0.0f32);
        for (tokens, expected) in &sequences {
            let scale = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            let bound = tolerance(&arch, scale);
            let logits = resident.logits(std::slice::from_ref(tokens)).unwrap();
            let error = worst(logits.as_slice().unwrap(), expected);
            assert!(error <= bound, "{}: {} tokens, off by {error}, allowed {bound}", dir.display(), tokens.len());
            full = full.max(error / scale);

            // Token by token, and in two pieces.
            let mut session = Session::new(&resident, tokens.len()).unwrap();
            for (t, &token) in tokens.iter().enumerate() {
                let error = worst(&session.step(token).unwrap(), &expected[t * arch.vocab..][..arch.vocab]);
                assert!(error <= bound, "{}: step {t}, off by {error}, allowed {bound}", dir.display());
                cached = cached.max(error / scale);
            }
            let last = &expected[(tokens.len() - 1) * arch.vocab..];
            for cut in [tokens.len() / 3, tokens.len() - 1] {
                session.truncate(0);
                if cut > 0 {
                    session.prefill(&tokens[..cut]).unwrap();
                }
                let error = worst(&session.prefill(&tokens[cut..]).unwrap(), last);
                assert!(error <= bound, "{}: cut at {cut}, off by {error}, allowed {bound}", dir.display());
            }
        }
        println!("{}: {full:.1e} full, {cached:.1e} cached", dir.display());
        // Windows under each other do not see each other, streamed or resident.
        let windows: Vec<Vec<u32>> = sequences.iter().map(|(tokens, _)| tokens.clone()).collect();
        let expected: Vec<f32> = sequences.into_iter().flat_map(|(_, logits)| logits).collect();
        let hidden = model.final_hidden(&windows, &Silent).unwrap();
        let logits = model.head().unwrap().logits(hidden.view()).unwrap();
        let bound = tolerance(&arch, expected.iter().fold(0.0f32, |m, x| m.max(x.abs())));
        let error = worst(logits.as_slice().unwrap(), &expected);
        assert!(error <= bound, "{}: together, off by {error}, allowed {bound}", dir.display());
    }
}

#[test]
fn caches_hold_what_the_architecture_says() {
    for dir in fixtures() {
        let source = ModelSource::open(dir.to_str().unwrap(), &OpenOptions::default(), &Silent).unwrap();
        let arch = Architecture::from_config(&source.config).unwrap();
        let resident = Resident::load(Model::new(&source, &arch, &Cpu)).unwrap();
        let session = Session::new(&resident, 10).unwrap();
        assert_eq!(session.cache_bytes(), 10 * arch.layers * arch.cache_values() * size_of::<f32>());
    }
}
