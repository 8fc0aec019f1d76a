//! What a target class is: the one trait, and the plain values it takes and gives.
//!
//! A class is asked in this order: [`Class::obstacles`] (can it hold the source), its properties while the output is planned,
//! [`Class::attention`] for every layer, [`Class::config`] at the end. Defaults are those of a stock class of transformers with
//! DeepSeek's latent attention; docs/targets.md has what each class computes.

use std::fmt::Debug;

use serde_json::{Map, Value};

use super::attention::{self, AttentionTensor};
use super::rope::RopeConfig;
use super::spec::TargetSpec;
use crate::arch::Architecture;

/// A file that a class needs beside the weights: its name, and its text.
pub type ClassFile = (&'static str, &'static str);

/// A model class that a conversion can be written for.
///
/// Implementations are unit structs: a class has no state, and two of the same name are the same.
pub trait Class: Debug + Send + Sync {
    /// Name on the command line.
    fn name(&self) -> &'static str;

    /// Name in JSON documents and journals.
    fn id(&self) -> &'static str {
        self.name()
    }

    /// `model_type` of its config.
    fn model_type(&self) -> &'static str {
        self.name()
    }

    /// Name of the class in the library that runs it.
    fn architecture(&self) -> &'static str;

    /// What it has no place for in `arch`, in plain words; empty where it holds the source. `linear_norms`: norms of queries and
    /// keys are replaced by linear maps before the class sees them.
    fn obstacles(&self, arch: &Architecture, linear_norms: bool) -> Vec<String>;

    /// What engines disagree on although the class holds the source. A class with a caveat is written only where it is asked for.
    fn caveat(&self, _arch: &Architecture) -> Option<Caveat> {
        None
    }

    /// Why it is the class to take where it holds the source.
    fn merit(&self) -> &'static str {
        "holds everything the source has"
    }

    /// Files it needs beside the weights; empty where engines have the class.
    fn files(&self) -> &'static [ClassFile] {
        &[]
    }

    /// Whether engines other than transformers have it as a class of their own, which the portable profile is written for.
    fn is_portable(&self) -> bool {
        false
    }

    /// Whether it applies an RMSNorm to latents, which has to be neutralised (docs/targets.md, section 2).
    fn norms_latents(&self) -> bool {
        true
    }

    /// Why no engine reads its weights in blocks of FP8; `None`: some do.
    fn fp8_obstacle(&self) -> Option<&'static str> {
        None
    }

    /// Whether layers can have sliding windows.
    fn has_windows(&self) -> bool {
        false
    }

    /// Whether its config has a score scale; other classes scale by the width of a head.
    fn has_own_score_scale(&self) -> bool {
        false
    }

    /// Whether its config takes any list of frequencies as it is; other classes express one as LongRoPE factors.
    fn has_any_frequencies(&self) -> bool {
        false
    }

    /// Whether the projection to queries can have a bias; in other classes a constant row of the query latent carries one.
    fn has_query_biases(&self) -> bool {
        false
    }

    /// Whether its config has the factors on embedding and logits that some families have; else they go into the weights.
    fn has_multipliers(&self) -> bool {
        false
    }

    /// Whether some layers can keep the source's attention.
    fn holds_two_kinds_of_layers(&self) -> bool {
        false
    }

    /// Whether pair `p` of the rotated part is rows `(2p, 2p + 1)`, or else `(p, p + d_R / 2)`.
    fn interleaves_pairs(&self) -> bool {
        true
    }

    /// Whether queries always go through a latent.
    fn needs_query_latent(&self) -> bool {
        false
    }

    /// Whether layers of experts need the weights of a shared expert, of zeros where the source has none.
    fn needs_shared_expert(&self) -> bool {
        true
    }

    /// Attention tensors of a layer that becomes MLA, in writing order: names, dtypes, shapes and what each holds.
    fn attention(&self, spec: &TargetSpec, arch: &Architecture) -> Vec<AttentionTensor> {
        attention::tensors(spec, arch)
    }

    /// What its config has beside the keys of [`TargetSpec::config`] that all classes share.
    fn config(&self, input: &ConfigInput<'_>) -> Map<String, Value>;
}

/// What engines disagree on in a class, although it holds the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caveat {
    /// The class as an alternative to the one that is taken instead.
    pub alternative: &'static str,
    /// What the user is told who asked for it.
    pub warning: &'static str,
}

/// What a config is made from.
#[derive(Clone, Copy)]
pub struct ConfigInput<'a> {
    /// Widths, biases and dtypes of the output.
    pub spec: &'a TargetSpec,
    /// The source.
    pub arch: &'a Architecture,
    /// Frequencies of the rotated slots as a stock config expresses them.
    pub rope: &'a RopeConfig,
    /// Longest context of the output.
    pub max_position: usize,
}
