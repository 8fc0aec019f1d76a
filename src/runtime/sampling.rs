//! Choosing the next token from logits.

use std::cmp::Ordering;

use crate::random::uniform;

/// How the next token is chosen. Same settings, same logits, same tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    temperature: f64,
    top_p: f64,
    /// State of SplitMix64.
    state: u64,
}

impl Sampler {
    /// The likeliest token; the first of equals.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_p: 1.0, state: 0 }
    }

    /// Draw from `softmax(logits / temperature)`, cut to the likeliest tokens that hold `top_p` of the probability.
    ///
    /// `temperature` 0 (or what is no positive number) is [`Sampler::greedy`]; at least one token is always left.
    pub fn new(temperature: f64, top_p: f64, seed: u64) -> Self {
        Self { temperature: if temperature > 0.0 { temperature } else { 0.0 }, top_p, state: seed }
    }

    /// The next token after `logits [V]`; 0 where there are none.
    pub fn next(&mut self, logits: &[f32]) -> u32 {
        if self.temperature == 0.0 {
            return likeliest(logits);
        }
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |l: &f32| (f64::from(l - max) / self.temperature).exp();
        let mut tokens: Vec<(f64, u32)> = logits.iter().map(weight).zip(0..).collect();
        // Equal weights in order of ids, so that the cut is the same everywhere.
        tokens.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let total: f64 = tokens.iter().map(|t| t.0).sum();
        let (mut kept, mut mass) = (0, 0.0);
        while kept < tokens.len() && (kept == 0 || mass < self.top_p * total) {
            mass += tokens[kept].0;
            kept += 1;
        }
        let mut left = uniform(&mut self.state) * mass;
        for (weight, token) in &tokens[..kept] {
            left -= weight;
            if left < 0.0 {
                return *token;
            }
        }
        // Rounding may leave a rest after the last.
        tokens[..kept].last().map_or(0, |t| t.1)
    }
}

fn likeliest(logits: &[f32]) -> u32 {
    let better = |best: usize, i: usize| match logits[i].total_cmp(&logits[best]) {
        Ordering::Greater => i,
        _ => best,
    };
    (0..logits.len()).fold(0, better) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(Sampler::greedy().next(&[0.5, 2.0, -1.0, 2.0]), 1);
        assert_eq!(Sampler::new(0.0, 0.1, 3).next(&[0.5, 2.0, -1.0, 2.0]), 1);
    }

    #[test]
    fn frequencies_are_those_of_the_softmax() {
        let logits = [1.0f32, 0.0, 2.0, -1.0];
        for temperature in [0.5, 1.0, 2.0] {
            let weights: Vec<f64> = logits.iter().map(|l| (f64::from(*l) / temperature).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mut sampler = Sampler::new(temperature, 1.0, 7);
            let draws = 40_000;
            let mut counts = [0usize; 4];
            for _ in 0..draws {
                counts[sampler.next(&logits) as usize] += 1;
            }
            for (count, weight) in counts.iter().zip(&weights) {
                let p = weight / total;
                // Five standard deviations of a binomial share.
                let bound = 5.0 * (p * (1.0 - p) / f64::from(draws)).sqrt();
                let share = *count as f64 / f64::from(draws);
                assert!((share - p).abs() < bound, "{share} {p} at {temperature}");
            }
        }
    }

    #[test]
    fn the_nucleus_is_the_smallest_set_that_holds_its_share() {
        // Probabilities 0.6, 0.25, 0.1, 0.05.
        let logits: Vec<f32> = [0.25f32, 0.6, 0.05, 0.1].iter().map(|p| p.ln()).collect();
        for (top_p, allowed) in [(0.5, vec![1]), (0.7, vec![0, 1]), (0.9, vec![0, 1, 3]), (0.0, vec![1])] {
            let mut sampler = Sampler::new(1.0, top_p, 11);
            let mut seen: Vec<u32> = (0..2000).map(|_| sampler.next(&logits)).collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen, allowed, "top_p {top_p}");
        }
    }

    #[test]
    fn a_seed_fixes_the_tokens() {
        let logits: Vec<f32> = (0..100).map(|i| (i as f32 * 0.37).sin()).collect();
        let draw = |seed| {
            let mut sampler = Sampler::new(1.0, 0.9, seed);
            (0..50).map(|_| sampler.next(&logits)).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }
}
