//! The targets of `fuzz/` on a stable compiler: the committed corpus, then seeded mutations of it for a while.
//!
//! Without coverage to guide it this finds less than cargo-fuzz per hour, and runs on every machine and commit. Each input
//! has to end within seconds, in bounded memory, without a panic. A binary of its own: its allocator counts the heap of each
//! thread, and an input that overflows the stack ends the process. `GQA2MLA_FUZZ_SECONDS` sets how long each target runs.

// Figures for the record, shown with --nocapture.
#![allow(clippy::print_stdout)]

mod common {
    pub mod counting;
    pub mod random;
}

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::counting::Counting;
use common::random::split_mix;
use gqa2mla::fuzzing;

/// Longest an input may take.
const SLOW: Duration = Duration::from_secs(5);
/// Most memory an input may take.
const LARGE: isize = 1 << 30;
/// Longest input tried.
const MAX_LEN: usize = 1 << 16;

// What the thread at work holds.
thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // A thread that ends has no counters any more.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

#[global_allocator]
static ALLOCATOR: Counting = Counting(count);

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        split_mix(&mut self.0)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn range(&mut self, len: usize) -> std::ops::Range<usize> {
        let (a, b) = (self.below(len + 1), self.below(len + 1));
        a.min(b)..a.max(b).min(a.min(b) + 512)
    }
}

const NUMBERS: [&str; 18] = [
    "0",
    "-1",
    "1",
    "2",
    "3",
    "16",
    "255",
    "65536",
    "2147483647",
    "4294967296",
    "9223372036854775807",
    "18446744073709551616",
    "1e308",
    "1e-308",
    "-0.0",
    "0.5",
    "1e999",
    "3.0",
];
const WORDS: [&str; 22] = [
    "null",
    "true",
    "false",
    "[]",
    "{}",
    "\"\"",
    "\"x\"",
    "{\"a\":",
    "[[[[[[[[",
    "}}",
    "]",
    ",",
    ":",
    "\\u0000",
    "\\ud800",
    "\"rope_type\":\"llama3\"",
    "\"rope_scaling\":{",
    "\"num_key_value_heads\":",
    "{layer}",
    "\n",
    "../",
    "\u{202e}",
];

/// One to eight changes.
fn mutate(input: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let mut out = input.to_vec();
    for _ in 0..=random.below(8) {
        let at = random.below(out.len() + 1);
        match random.below(10) {
            0 if at < out.len() => out[at] ^= 1 << random.below(8),
            1 if at < out.len() => out[at] = random.next() as u8,
            2 => drop(out.drain(random.range(input.len().min(out.len())))),
            3 => {
                let copy = out[random.range(out.len())].to_vec();
                out.splice(at..at, copy);
            }
            4 => {
                let piece = other[random.range(other.len())].to_vec();
                out.splice(at..at, piece);
            }
            5 | 6 => replace_number(&mut out, at, NUMBERS[random.below(NUMBERS.len())]),
            7 | 8 => {
                let word = WORDS[random.below(WORDS.len())];
                let end = if random.below(2) == 0 { at } else { (at + word.len()).min(out.len()) };
                out.splice(at..end, word.bytes());
            }
            _ => {
                let depth = 1 << random.below(12);
                let bracket = [b'[', b'{', b'"'][random.below(3)];
                out.splice(at..at, std::iter::repeat_n(bracket, depth));
            }
        }
    }
    out.truncate(MAX_LEN);
    out
}

/// Puts `text` in the place of the next number behind `at`.
fn replace_number(out: &mut Vec<u8>, at: usize, text: &str) {
    let digit = |b: &u8| b.is_ascii_digit() || matches!(b, b'.' | b'-');
    let Some(start) = out[at..].iter().position(digit).map(|p| at + p) else { return };
    let length = out[start..].iter().take_while(|b| digit(b)).count();
    out.splice(start..start + length, text.bytes());
}

/// What is known to hold for any bytes, on the corpus and on what mutations make of it.
fn fuzz(name: &str, target: fn(&[u8])) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut paths: Vec<_> = fs_err::read_dir(&folder).expect("a corpus").map(|e| e.expect("an entry").path()).collect();
    paths.sort();
    let corpus: Vec<Vec<u8>> = paths.iter().map(|p| fs_err::read(p).expect("readable")).collect();
    assert!(!corpus.is_empty());
    let seconds = std::env::var("GQA2MLA_FUZZ_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(5);
    let end = Instant::now() + Duration::from_secs(seconds);
    for input in &corpus {
        try_one(name, target, input);
    }
    let mut random = Random(name.bytes().fold(1, |h, b| h * 31 + u64::from(b)));
    let mut tried = corpus.len();
    while Instant::now() < end {
        for _ in 0..64 {
            let (a, b) = (random.below(corpus.len()), random.below(corpus.len()));
            try_one(name, target, &mutate(&corpus[a], &corpus[b], &mut random));
            tried += 1;
        }
    }
    println!("{name}: {tried} inputs");
}

fn try_one(name: &str, target: fn(&[u8]), input: &[u8]) {
    let start = Instant::now();
    let before = HELD.get();
    PEAK.set(before);
    let result = catch_unwind(AssertUnwindSafe(|| target(input)));
    let (took, peak) = (start.elapsed(), PEAK.get() - before);
    let ok = result.is_ok() && took < SLOW && peak < LARGE;
    if !ok {
        let path = std::env::temp_dir().join(format!("gqa2mla-fuzz-{name}-{}", std::process::id()));
        fs_err::write(&path, input).expect("written");
        panic!("{name}: panic {}, {took:?}, {peak} bytes; the input is in {}", result.is_err(), path.display());
    }
}

#[test]
fn header() {
    fuzz("header", fuzzing::header);
}

#[test]
fn index() {
    fuzz("index", fuzzing::index);
}

#[test]
fn config() {
    fuzz("config", fuzzing::config);
}

#[test]
fn family() {
    fuzz("family", fuzzing::family);
}

#[test]
fn journal() {
    fuzz("journal", fuzzing::journal);
}

#[test]
fn manifest() {
    fuzz("manifest", fuzzing::manifest);
}

#[test]
fn tokenizer() {
    // The tokenizer library panics on some files; that is contained, but its messages would fill the screen.
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !gqa2mla::source::panics_are_contained() {
            usual(info);
        }
    }));
    fuzz("tokenizer", fuzzing::tokenizer);
}

#[test]
fn tokenizer_config() {
    fuzz("tokenizer_config", fuzzing::tokenizer_config);
}
