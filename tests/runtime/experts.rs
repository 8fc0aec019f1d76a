//! Layers of experts.

use gqa2mla::observe::Silent;
use gqa2mla::runtime::{Cpu, Model};

use crate::common::models::{fixture, open};

#[test]
fn streamed_experts_are_the_held_ones() {
    for name in ["pico-deepseek-v2", "pico-deepseek-v3-moe", "pico-deepseek-v3-fp8", "pico-mixtral"] {
        let (source, arch) = open(&fixture(name));
        let windows = vec![(0..20).collect(), (7..40).collect::<Vec<u32>>()];
        let model = Model::new(&source, &arch, &Cpu);
        let held = model.final_hidden(&windows, &Silent).expect("runs");
        let streamed = model.with_held_experts(0).final_hidden(&windows, &Silent).expect("runs");
        assert_eq!(held, streamed, "{name}");
    }
}
