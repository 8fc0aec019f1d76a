//! Every fixture's logits against those of stock transformers (f32, eager attention), full forward and with a cache.

// Figures for the record, shown with --nocapture.
#![allow(clippy::print_stdout)]

use gqa2mla::observe::Silent;
use gqa2mla::runtime::{Cpu, Model, Resident, Session};

use crate::common::golden::golden;
use crate::common::logits::{golden_fixtures, tolerance};
use crate::common::models::open;

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

#[test]
fn logits_are_those_of_transformers() {
    for dir in golden_fixtures() {
        let (source, arch) = open(&dir);
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
    for dir in golden_fixtures() {
        let (source, arch) = open(&dir);
        let resident = Resident::load(Model::new(&source, &arch, &Cpu)).unwrap();
        let session = Session::new(&resident, 10).unwrap();
        assert_eq!(session.cache_bytes(), 10 * arch.layers * arch.cache_values() * size_of::<f32>());
    }
}
