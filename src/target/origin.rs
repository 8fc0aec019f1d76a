//! Where the values of an output tensor come from: the vocabulary of every command that writes a model folder.

use std::ops::Range;

use crate::arch::Part;
use crate::write::PlannedTensor;

/// A tensor of the output. `K` names the values that a command computes itself ([`Origin::Computed`]).
#[derive(Debug, Clone, PartialEq)]
pub struct Emit<K = usize> {
    /// Name, dtype and shape.
    pub planned: PlannedTensor,
    /// Where its values come from.
    pub from: Origin<K>,
}

/// Where the values of an output tensor come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Origin<K = usize> {
    /// The bytes of a source tensor as they are stored, whatever they stand for: those of FP8 need their scales beside them.
    Stored {
        /// Name in the source.
        name: String,
        /// Which of its bytes.
        cut: Cut,
    },
    /// Rows of a source weight, times a factor, plus an offset: bit for bit where the factor is 1, the offset 0 and the
    /// dtype the stored one.
    Source {
        /// Which rows.
        part: Part,
        /// Factor.
        scale: f64,
        /// Added after it.
        offset: f64,
    },
    /// The values of a source weight, those of FP8 times their scales, in the planned dtype; signs of zeros stay.
    Widened(Part),
    /// Values that the command computes. `convert` counts the tensors of [`TargetSpec::attention_tensors`].
    ///
    /// [`TargetSpec::attention_tensors`]: super::TargetSpec::attention_tensors
    Computed(K),
    /// A norm's gain spread over other places: entry `i` is that of the source's entry `places[i]`, or 1.
    Spread {
        /// The source's gain.
        part: Part,
        /// Where each entry comes from.
        places: Vec<Option<usize>>,
        /// Added to the stored gain.
        offset: f64,
    },
    /// Zeros: an expert that adds nothing, a bias that another rank adds.
    Zero,
    /// The block scales of the FP8 tensor before.
    Scales,
}

/// Which elements of a stored tensor are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cut {
    /// All of them.
    Whole,
    /// Runs of rows, one after the other.
    Rows(Vec<Range<usize>>),
    /// A run of columns of a matrix.
    Columns(Range<usize>),
}
