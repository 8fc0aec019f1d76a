//! In which dtypes the output is stored.

use serde::{Deserialize, Serialize};

use super::neutral::LatentNorm;
use super::{OutputDtype, Target};
use crate::error::ConvertError;
use crate::source::Dtype;

/// In which dtypes the output is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Storage {
    /// Tensors that are copied keep the source's dtype.
    AsSource {
        /// Of what is computed.
        base: Dtype,
        /// Of what is computed and what `base` would round.
        inexact: Dtype,
    },
    /// Every tensor is rounded to this one.
    Rounded(Dtype),
    /// Linear layers in blocks of FP8, the rest in bf16.
    Fp8,
}

impl Storage {
    /// What is written for a class with its form of the latent norm, and a decision to report. `asked`: by the user; `own`: the dtype of most weights of the
    /// source; `exact`: whether the method loses nothing.
    ///
    /// # Errors
    /// A dtype that the class cannot be written in.
    pub fn choose(
        asked: Option<OutputDtype>,
        own: Dtype,
        (class, norm): (Target, Option<LatentNorm>),
        exact: bool,
    ) -> Result<(Self, Option<&'static str>), ConvertError> {
        match asked {
            Some(dtype) => Ok((Self::asked(dtype, class, norm)?, None)),
            None => Ok(Self::as_source(own, norm, exact)),
        }
    }

    fn asked(dtype: OutputDtype, class: Target, norm: Option<LatentNorm>) -> Result<Self, ConvertError> {
        match dtype {
            OutputDtype::Bf16 => Ok(Self::Rounded(Dtype::BF16)),
            OutputDtype::F32 => Ok(Self::Rounded(Dtype::F32)),
            OutputDtype::F16 => match f16_obstacle(norm) {
                None => Ok(Self::Rounded(Dtype::F16)),
                Some(why) => Err(ConvertError::refused(
                    format!("`--dtype f16` with the target `{class}`: {why}"),
                    match Target::first(|other| !other.norms_latents()) {
                        Some(other) => format!(
                            "use `--dtype bf16`, `--profile faithful`, or `--target {other}`, which norms no latent"
                        ),
                        None => "use `--dtype bf16`".to_owned(),
                    },
                )),
            },
            OutputDtype::Fp8 => match class.fp8_obstacle() {
                None => Ok(Self::Fp8),
                Some(why) => Err(ConvertError::refused(
                    format!("`--dtype fp8` with the target `{class}`: {why}"),
                    "use `--dtype bf16`, or a stock target",
                )),
            },
        }
    }

    fn as_source(own: Dtype, norm: Option<LatentNorm>, exact: bool) -> (Self, Option<&'static str>) {
        let rounding = |base: Dtype| Self::AsSource { base, inexact: base };
        match own {
            Dtype::BF16 if exact => (
                Self::AsSource { base: Dtype::BF16, inexact: Dtype::F32 },
                Some(
                    "tensors that a fold would round in bf16 are written in f32, the others as they are (`--dtype bf16` rounds them)",
                ),
            ),
            Dtype::F16 if f16_obstacle(norm).is_none() => {
                let inexact = if exact { Dtype::F32 } else { Dtype::F16 };
                (Self::AsSource { base: Dtype::F16, inexact }, None)
            }
            Dtype::F16 => (
                rounding(Dtype::F32),
                Some(
                    "the source is f16, in which the neutralised latent norm underflows: converted tensors are written in f32",
                ),
            ),
            Dtype::F8_E4M3 => (
                rounding(Dtype::BF16),
                Some("the source is FP8: weights are written in bf16 (`--dtype fp8` quantises them again)"),
            ),
            Dtype::BF16 => (rounding(Dtype::BF16), None),
            _ => (rounding(Dtype::F32), None),
        }
    }

    /// Dtype of what is computed and rounded.
    pub fn base(self) -> Dtype {
        match self {
            Self::AsSource { base, .. } | Self::Rounded(base) => base,
            Self::Fp8 => Dtype::BF16,
        }
    }

    /// Dtype of a tensor that [`Storage::base`] would round.
    pub fn inexact(self) -> Dtype {
        match self {
            Self::AsSource { inexact, .. } => inexact,
            Self::Rounded(_) | Self::Fp8 => self.base(),
        }
    }

    /// Whether tensors that are copied keep the source's dtype.
    pub fn keeps_stored(self) -> bool {
        matches!(self, Self::AsSource { .. })
    }

    /// Whether linear layers are written in FP8.
    pub fn is_fp8(self) -> bool {
        self == Self::Fp8
    }
}

/// Why a form of the latent norm cannot be written in f16; `None`: it can.
fn f16_obstacle(norm: Option<LatentNorm>) -> Option<&'static str> {
    norm.and_then(LatentNorm::f16_obstacle)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::Profile;
    use crate::target::classes::CLASSES;

    #[test]
    fn a_journal_gives_the_same_storage_back() {
        let all =
            [Storage::AsSource { base: Dtype::BF16, inexact: Dtype::F32 }, Storage::Rounded(Dtype::F16), Storage::Fp8];
        for storage in all {
            let json = serde_json::to_string(&storage).expect("serialises");
            assert_eq!(serde_json::from_str::<Storage>(&json).expect("reads"), storage, "{json}");
        }
        assert!(serde_json::from_str::<Storage>(r#"{"rounded":"F99"}"#).is_err());
    }

    #[test]
    fn tiny_latents_are_never_written_in_f16() {
        for class in CLASSES.iter().copied() {
            for (exact, profile) in
                [false, true].into_iter().flat_map(|e| [(e, Profile::Portable), (e, Profile::Faithful)])
            {
                let norm = LatentNorm::of(class, profile == Profile::Faithful, exact);
                let asked = Storage::choose(Some(OutputDtype::F16), Dtype::F32, (class, norm), exact);
                let (own, decision) = Storage::choose(None, Dtype::F16, (class, norm), exact).expect("always possible");
                let possible = !class.norms_latents() || profile == Profile::Faithful || !exact;
                assert_eq!(asked.is_ok(), possible, "{class}");
                assert_eq!(own.base() == Dtype::F16, possible, "{class}");
                assert_eq!(decision.is_none(), possible, "{class}");
                if let Err(e) = asked {
                    let said = e.to_string();
                    assert!(
                        said.contains(class.name())
                            && said.contains("hint: use `--dtype bf16`, `--profile faithful`, or"),
                        "{said}"
                    );
                }
            }
        }
    }
}
