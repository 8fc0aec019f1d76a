//! Timing prefill and decoding of a model with its real caches.

use std::time::Instant;

use super::{Backend, Resident, RuntimeError, Session, SessionSize};

/// What is measured: sequences of equal length, side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    /// Tokens in the cache of each sequence when decoding begins.
    pub context: usize,
    /// Sequences.
    pub batch: usize,
    /// Decoding steps there is room for.
    pub steps: usize,
    /// Allow more positions than the model was made for.
    pub beyond_context: bool,
}

/// A session whose cache holds the context of a case.
#[derive(Debug)]
pub struct Trial<'r, 'a, B: Backend> {
    session: Session<'r, 'a, B>,
    case: Case,
    vocab: usize,
    fed: usize,
    /// Seconds that filling the cache took.
    pub prefill_seconds: f64,
}

impl<'r, 'a, B: Backend> Trial<'r, 'a, B> {
    /// Allocate the caches and fill them.
    ///
    /// # Errors
    /// As [`Session::with`] and [`Session::feed`].
    pub fn new(resident: &'r Resident<'a, B>, case: Case) -> Result<Self, RuntimeError> {
        let vocab = resident.model().architecture().vocab;
        let capacity = case.context + case.steps;
        let size = SessionSize { sequences: case.batch, capacity, beyond_context: case.beyond_context };
        let mut session = Session::with(resident, size)?;
        let texts: Vec<Vec<u32>> = (0..case.batch).map(|s| tokens(s, 0..case.context, vocab)).collect();
        let texts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
        let started = Instant::now();
        session.feed(&texts)?;
        let prefill_seconds = started.elapsed().as_secs_f64();
        Ok(Self { session, case, vocab, fed: 0, prefill_seconds })
    }

    /// Decode one token of every sequence; the seconds it took. Beyond the room for steps the cache is cut back first.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn step(&mut self) -> Result<f64, RuntimeError> {
        if self.fed == self.case.steps {
            self.session.truncate(self.case.context);
            self.fed = 0;
        }
        let position = self.case.context + self.fed;
        let new: Vec<Vec<u32>> = (0..self.case.batch).map(|s| tokens(s, position..position + 1, self.vocab)).collect();
        let new: Vec<&[u32]> = new.iter().map(Vec::as_slice).collect();
        let started = Instant::now();
        self.session.feed(&new)?;
        self.fed += 1;
        Ok(started.elapsed().as_secs_f64())
    }

    /// Bytes of the allocated caches.
    pub fn cache_bytes(&self) -> usize {
        self.session.cache_bytes()
    }
}

/// Tokens that mean nothing, the same in every run: speed does not depend on them.
fn tokens(sequence: usize, positions: std::ops::Range<usize>, vocab: usize) -> Vec<u32> {
    let token = |p: usize| ((p * 7919 + sequence * 104_729 + 13) % vocab.max(1)) as u32;
    positions.map(token).collect()
}

/// The middle of `values`, of an even number the mean of the middle two; NaN of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }
}
