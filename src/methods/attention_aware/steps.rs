//! Steps of `attention-aware`. Each can be left out so that its worth can be shown (`--without STEP`).

use serde::{Serialize, Serializer};

/// A step of `attention-aware`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Best constant phase for pairs that lose RoPE.
    Phase,
    /// Query-weighted slots (without: plain key energy).
    QueryWeight,
    /// Centred covariance in the joint low rank.
    Centring,
    /// Metric of queries and output projection (without: plain L2).
    Metric,
    /// Query refit on the source's scores.
    QueryRefit,
    /// Key refit on the source's scores.
    KeyRefit,
    /// Per-head value refit on attention-pooled inputs.
    ValueRefit,
    /// Output projection refit on the source's attention output.
    OutputRefit,
    /// Statistics of what the layers before give once they are converted.
    ConvertedStream,
}

impl Step {
    /// Every step with its name on the command line, in the order they are taken.
    pub const ALL: [(Step, &'static str); 9] = [
        (Step::Phase, "phase"),
        (Step::QueryWeight, "query-weight"),
        (Step::Centring, "centring"),
        (Step::Metric, "metric"),
        (Step::QueryRefit, "query-refit"),
        (Step::KeyRefit, "key-refit"),
        (Step::ValueRefit, "value-refit"),
        (Step::OutputRefit, "output-refit"),
        (Step::ConvertedStream, "converted-stream"),
    ];

    /// Their names.
    pub const NAMES: [&'static str; Self::ALL.len()] = {
        let mut names = [""; Self::ALL.len()];
        let mut i = 0;
        while i < names.len() {
            names[i] = Self::ALL[i].1;
            i += 1;
        }
        names
    };

    /// The step of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn named(name: &str) -> Result<Self, String> {
        let step = Self::ALL.iter().find(|(_, n)| *n == name).map(|(step, _)| *step);
        step.ok_or_else(|| format!("expected one of {}", Self::NAMES.join(", ")))
    }
}

/// The steps that are taken: all but some.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Steps {
    /// A bit for each step that is left out.
    left_out: u32,
}

impl Steps {
    /// Those, and `step` left out.
    #[must_use]
    pub fn without(self, step: Step) -> Self {
        Self { left_out: self.left_out | 1 << step as u32 }
    }

    /// Whether `step` is taken.
    pub fn has(self, step: Step) -> bool {
        self.left_out & (1 << step as u32) == 0
    }

    /// Names of the steps that are left out.
    pub fn left_out(self) -> impl Iterator<Item = &'static str> {
        Step::ALL.into_iter().filter(move |(step, _)| !self.has(*step)).map(|(_, name)| name)
    }
}

/// Every step, and whether it is taken.
impl Serialize for Steps {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(Step::ALL.map(|(step, name)| (name.replace('-', "_"), self.has(step))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_left_out_one_by_one() {
        for (step, name) in Step::ALL {
            let steps = Steps::default().without(step);
            assert_eq!(Step::named(name), Ok(step));
            assert_eq!(steps.left_out().collect::<Vec<_>>(), [name]);
            assert!(Step::ALL.iter().all(|(other, _)| steps.has(*other) == (*other != step)));
            assert!(Steps::default().has(step));
        }
        assert!(Step::named("metrics").is_err());
        let json = serde_json::to_value(Steps::default().without(Step::KeyRefit)).expect("JSON");
        assert_eq!((&json["key_refit"], &json["query_weight"]), (&false.into(), &true.into()));
    }
}
