//! Memory of a prompt whose cache is kept as factors: bytes of the formula, and no others.

use std::sync::atomic::Ordering;

use gqa2mla::runtime::{Cpu, Model, Resident, Session, SessionSize, XkvSession, XkvSettings};

use super::peak::{HELD, alone};
use crate::common::models::{fixture, open};
use crate::common::xkv::{tokens, widths};

/// `r_k (P + G w) + r_v (P + G w)` values per group of GQA, `r_k (P + G r) + G P d_R` of MLA; the rest as any cache has it.
#[test]
fn bytes_are_those_of_the_formula_and_no_others_stay() {
    let _alone = alone();
    for name in ["pico-trained", "pico-deepseek-v3-bias"] {
        let (source, arch) = open(&fixture(name));
        let resident = Resident::load(Model::new(&source, &arch, &Cpu)).expect("loads");
        let (prompt, behind) = (200usize, 8);
        let text = tokens(prompt, arch.vocab);
        let (k, v) = widths(&arch);
        for group in 1..=arch.layers.min(3) {
            let settings = XkvSettings { rank_k: 7, rank_v: 9, group };
            let of_group = |layers: usize| match arch.mla() {
                Some(a) => {
                    settings.rank_k.min(layers * k) * (prompt + layers * k) + layers * prompt * a.qk_rope_head_dim
                }
                None => {
                    (settings.rank_k + settings.rank_v) * prompt + layers * (settings.rank_k * k + settings.rank_v * v)
                }
            };
            let layers: Vec<usize> = (0..arch.layers).collect();
            let formula: usize = layers.chunks(group).map(|c| 4 * of_group(c.len())).sum();
            // Threads and tables that stay for good.
            XkvSession::new(&resident, settings, prompt + behind, true).expect("fits").prefill(&text).expect("runs");

            let before = HELD.load(Ordering::Relaxed);
            let mut xkv = XkvSession::new(&resident, settings, prompt + behind, true).expect("fits");
            xkv.prefill(&text).expect("runs");
            let held = (HELD.load(Ordering::Relaxed) - before) as usize;
            let bytes = xkv.prompt_bytes();
            let exact = prompt * arch.cache_values() * arch.layers * 4;
            let tail = behind * arch.cache_values() * arch.layers * 4;
            assert_eq!(bytes.compressed, formula, "{name}, groups of {group}");
            assert_eq!((bytes.exact, xkv.cache_bytes()), (exact, formula + tail), "{name}, groups of {group}");
            // Beside the caches: the table of rotations, one of 8 bytes per pair and position, and lists.
            let pairs = arch.rope.inv_freq.len();
            let other = 8 * pairs * (prompt + behind) + 4096 * arch.layers;
            println!("{name}, groups of {group}: held {held}, caches {}, exact {exact}", xkv.cache_bytes());
            assert!(held <= xkv.cache_bytes() + other, "{name}: {held} held, {} of caches", xkv.cache_bytes());
            assert!(held >= xkv.cache_bytes());
            drop(xkv);

            let before = HELD.load(Ordering::Relaxed);
            let size = SessionSize { sequences: 1, capacity: prompt + behind, beyond_context: true };
            let mut session = Session::with(&resident, size).expect("fits");
            session.prefill(&text).expect("runs");
            let whole = (HELD.load(Ordering::Relaxed) - before) as usize;
            assert!(whole >= exact + tail);
            assert!(held < whole - exact + formula + other, "{name}: the exact cache is gone");
        }
    }
}
