//! Everything that can be decided and checked before a byte is written and before the model is run.

use crate::arch::{ArchError, Architecture, GqaShape, check_tensors};
use crate::error::ConvertError;
use crate::methods::{Candidates, Case, ConvertSettings, Split};
use crate::mla::Geometry;
use crate::source::{Dtype, ModelSource, scan_non_finite};
use crate::stream::SourceModel;
use crate::target::fp8::BLOCK;
use crate::target::{self, OutputDtype, Padding, Profile, RopeGrid, TargetKind, TargetSpec};

use super::hybrid;

/// Up to this many bytes every weight is scanned for NaN before anything starts; above, each layer when it is read.
const SCAN_FIRST: u64 = 8 << 30;

/// A query latent with a constant row is padded with zero rows to a multiple of this: an odd width would leave f32 tensors
/// unaligned after bf16 ones.
const QUERY_LATENT_MULTIPLE: usize = 16;

/// A conversion that is known to be possible, with what only a survey can settle still open.
#[derive(Clone)]
pub struct Checked<'a> {
    /// The source, its attention, the settings and the class.
    pub case: Case<'a>,
    /// What the method would do; of its splits, those that padding and FP8 allow.
    pub candidates: Candidates,
    /// Names, shapes and dtypes of the output, with the first split.
    pub spec: TargetSpec,
    /// Longest context of the output.
    pub max_position: usize,
    /// Decisions taken for the user.
    pub decisions: Vec<String>,
    /// Whether every weight was scanned for NaN already.
    pub scanned: bool,
}

impl<'a> Checked<'a> {
    /// Check source and settings against each other.
    ///
    /// # Errors
    /// [`ConvertError`]; nothing was written.
    pub fn new(
        source: &'a ModelSource,
        arch: &'a Architecture,
        settings: &'a ConvertSettings,
    ) -> Result<Self, ConvertError> {
        settings.validate()?;
        let Some(&shape) = arch.gqa() else {
            return Err(ArchError::Unsupported {
                what: format!("converting `{}`, which is MLA already,", arch.model_type),
                hint: Some("give the GQA checkpoint it was made from".into()),
            }
            .into());
        };
        check_tensors(arch, &source.tensors)?;
        let mut decisions = Vec::new();
        let kept = hybrid::kept(settings, arch.layers)?;
        let target = pick_target(arch, settings, &mut decisions)?;
        let max_position = context(arch, &shape, settings, target == TargetKind::HfRemote, &mut decisions)?;
        let (base, lossless) = dtypes(source, settings, target, &mut decisions)?;
        let case = Case { source, arch, shape, settings, target };
        if settings.profile == Some(Profile::Portable) {
            check_portable(&case)?;
        }
        let mut candidates = settings.method.check(&case, &mut decisions)?;
        let mut spec = spec(&case, &candidates, Dtypes { base, lossless }, kept);
        if !candidates.ranks_open {
            candidates.splits = fitting(candidates.splits, &mut spec, settings, &mut decisions)?;
        }
        if spec.stream_scale != 1.0 {
            decisions.push(format!(
                "rms_norm_eps {:e} becomes 1e-6, which stock classes fix for the latent norm: the residual stream is scaled by {:.5}",
                arch.norm_eps, spec.stream_scale
            ));
        }
        let scanned = source.tensors.total_bytes() <= SCAN_FIRST;
        if scanned {
            for (name, _) in source.tensors.in_file_order() {
                check_finite(source, name)?;
            }
        }
        if !candidates.ranks_open {
            check_cache(&case, &spec)?;
        }
        Ok(Self { case, candidates, spec, max_position, decisions, scanned })
    }

    /// The source as its layers are read.
    pub fn model(&self) -> SourceModel<'a> {
        SourceModel { source: self.case.source, arch: self.case.arch, keeps_head_norms: self.spec.qk_norm }
    }

    /// Refuse a tensor that holds NaN or infinity, where the first scan did not read it.
    ///
    /// # Errors
    /// [`ConvertError::NotFinite`].
    pub fn check_finite(&self, name: &str) -> Result<(), ConvertError> {
        if self.scanned { Ok(()) } else { check_finite(self.case.source, name) }
    }
}

/// Dtypes of the output.
#[derive(Clone, Copy)]
struct Dtypes {
    /// Of what is rounded.
    base: Dtype,
    /// Whether what `base` would round is written in f32 instead.
    lossless: bool,
}

/// Names, shapes and dtypes of the output for the first split.
fn spec(case: &Case<'_>, candidates: &Candidates, dtypes: Dtypes, kept: Vec<bool>) -> TargetSpec {
    let Case { arch, shape, settings, target, .. } = *case;
    let remote = target == TargetKind::HfRemote;
    let compresses = settings.method.compresses();
    // A constant row of the query latent carries what stock classes have no bias for.
    let constant_row = candidates.query_bias && !remote;
    let Split { rope, rank } = candidates.splits[0];
    let geometry = Geometry {
        kv_lora_rank: rank,
        q_lora_rank: query_latent(candidates.q_rank, constant_row, target, arch.hidden),
        qk_nope_head_dim: candidates.nope,
        qk_rope_head_dim: rope,
        v_head_dim: shape.head_dim,
    };
    let width = (geometry.qk_nope_head_dim + geometry.qk_rope_head_dim) as f64;
    let score_scale = shape.score_scale * arch.rope.amplitude.powi(2) * width.sqrt();
    TargetSpec {
        kind: target,
        geometry,
        portable: settings.profile == Some(Profile::Portable),
        pad: pads(settings),
        stock_grid: candidates.grid == RopeGrid::Stock && compresses,
        plain_scale: score_scale.log2().fract().abs() < 1e-12,
        bias: candidates.bias,
        query_bias: candidates.query_bias && remote,
        qk_norm: arch.qk_norm.is_some() && !compresses,
        fp8: settings.dtype == Some(OutputDtype::Fp8),
        keep_dtypes: settings.dtype.is_none(),
        constant_row,
        base: dtypes.base,
        lossless: dtypes.lossless,
        plain_weights: candidates.plain_weights,
        stream_scale: if remote { 1.0 } else { TargetSpec::stream_scale(arch.norm_eps) },
        kept,
    }
}

/// Refuse an output whose cache is no smaller than the source's.
pub(super) fn check_cache(case: &Case<'_>, spec: &TargetSpec) -> Result<(), ConvertError> {
    let (new, old) = (spec.cache_values(), case.arch.cache_values());
    if !case.settings.method.compresses() || case.settings.force || new < old {
        return Ok(());
    }
    Err(ConvertError::refused(
        format!("the output would cache {new} values per token and layer, the source caches {old}: nothing is saved"),
        match spec.output() == spec.geometry {
            true => "lower `--kv-budget`, `--kv-lora-rank` or `--qk-rope-head-dim`, or say `--force`",
            false => "padding to kernels costs more than this model saves: `--pad none`, or say `--force`",
        },
    ))
}

/// The spec with ranks that a survey found.
///
/// # Errors
/// A cache that does not shrink, widths that padding or FP8 do not allow.
pub(super) fn with_ranks(
    checked: &Checked<'_>,
    split: Split,
    q_rank: Option<usize>,
    decisions: &mut Vec<String>,
) -> Result<TargetSpec, ConvertError> {
    let case = &checked.case;
    let mut spec = checked.spec.clone();
    spec.geometry.q_lora_rank = query_latent(q_rank, spec.constant_row, spec.kind, case.arch.hidden);
    fitting(vec![split], &mut spec, case.settings, decisions)?;
    check_cache(case, &spec)?;
    Ok(spec)
}

/// Width of the query latent that is written for a rank of the queries, if they have one.
fn query_latent(rank: Option<usize>, constant_row: bool, kind: TargetKind, hidden: usize) -> Option<usize> {
    match (rank, constant_row) {
        (None, true) => Some((hidden + 1).next_multiple_of(QUERY_LATENT_MULTIPLE)),
        (None, false) if kind == TargetKind::Minicpm3 => Some(hidden.next_multiple_of(QUERY_LATENT_MULTIPLE)),
        (Some(rank), true) => Some((rank + 1).next_multiple_of(QUERY_LATENT_MULTIPLE)),
        (rank, false) => rank,
    }
}

/// Refuse a tensor that holds NaN or infinity.
fn check_finite(source: &ModelSource, name: &str) -> Result<(), ConvertError> {
    match scan_non_finite(&source.tensors, name)? {
        None => Ok(()),
        Some(found) => Err(ConvertError::NotFinite {
            name: name.to_owned(),
            count: found.count,
            index: found.first_index,
            value: found.value,
        }),
    }
}

/// The class, and that it can hold the source.
fn pick_target(
    arch: &Architecture,
    settings: &ConvertSettings,
    decisions: &mut Vec<String>,
) -> Result<TargetKind, ConvertError> {
    let linear = settings.method.compresses();
    let asked = settings.target;
    let (kind, why) = match asked {
        _ if settings.mla_layers.is_some() => (hybrid::target(settings)?, "it holds layers of both kinds".to_owned()),
        TargetKind::Auto => target::choose(arch, linear),
        kind => (kind, String::new()),
    };
    let against = target::obstacles(arch, kind, linear);
    if !against.is_empty() {
        let (other, _) = target::choose(arch, linear);
        let hint = match target::obstacles(arch, other, linear).is_empty() {
            true if linear || target::obstacles(arch, kind, true).len() == against.len() => {
                format!("`--target {}` holds them", other.name())
            }
            true => format!(
                "`--target {}` holds them; methods that compress replace norms of queries and keys by linear maps",
                other.name()
            ),
            false => "no target holds them".to_owned(),
        };
        return Err(ConvertError::refused(
            format!("the target `{}` has no place for {}", kind.name(), against.join(", ")),
            hint,
        ));
    }
    if asked == TargetKind::Auto && kind != TargetKind::DeepseekV3 {
        decisions.push(format!("target {}: {why}", kind.name()));
    }
    if asked == TargetKind::DeepseekV2 && arch.moe.as_ref().is_some_and(|m| m.renormalise && m.per_token < m.experts) {
        decisions.push(
            "expert weights sum to one (`norm_topk_prob`): vLLM and SGLang honour that in deepseek_v2, transformers does not"
                .into(),
        );
    }
    Ok(kind)
}

/// The spec with another split.
pub(super) fn with_split(spec: &TargetSpec, split: Split) -> TargetSpec {
    let mut spec = spec.clone();
    spec.geometry.qk_rope_head_dim = split.rope;
    spec.geometry.kv_lora_rank = split.rank;
    spec
}

/// Whether widths are padded to those of kernels.
fn pads(settings: &ConvertSettings) -> bool {
    match settings.pad {
        Some(pad) => pad == Padding::Kernels,
        None => settings.profile == Some(Profile::Portable),
    }
}

/// The splits that padding and FP8 blocks allow. Padding that was asked for and that no kernel is wide enough for is
/// refused; that of the portable profile is left out.
fn fitting(
    splits: Vec<Split>,
    spec: &mut TargetSpec,
    settings: &ConvertSettings,
    decisions: &mut Vec<String>,
) -> Result<Vec<Split>, ConvertError> {
    let kernel = |s: &TargetSpec| target::pad::kernel_shape(&s.geometry, s.stock_grid);
    let mut splits = splits;
    if spec.pad {
        let fit: Vec<_> = splits.iter().copied().filter(|split| kernel(&with_split(spec, *split)).is_some()).collect();
        if fit.is_empty() {
            let g = &spec.geometry;
            let message = format!(
                "no kernel holds heads of {} + {} and {} values with a latent of {}",
                g.qk_nope_head_dim, g.qk_rope_head_dim, g.v_head_dim, g.kv_lora_rank
            );
            if settings.pad.is_some() {
                return Err(ConvertError::refused(
                    message,
                    "kernels take heads up to 192 + 64 and 256 values, on a stock grid a rotated width that divides 64, and \
                     latents up to 512: choose smaller widths, or `--pad none`",
                ));
            }
            decisions.push(format!("{message}: nothing is padded"));
            spec.pad = false;
        } else {
            splits = fit;
        }
    }
    if spec.fp8 {
        let whole = |split: &Split| with_split(spec, *split).output().kv_lora_rank.is_multiple_of(BLOCK);
        let rank = with_split(spec, splits[0]).output().kv_lora_rank;
        splits.retain(whole);
        if splits.is_empty() {
            return Err(ConvertError::refused(
                format!(
                    "a latent of {rank} values shares an FP8 block of {BLOCK} rows with the rotated key, whose weights are \
                     2^20 times as large: the latent would be rounded to zero"
                ),
                format!("choose a kv_lora_rank that is a multiple of {BLOCK}, or `--pad kernels`"),
            ));
        }
    }
    spec.geometry = with_split(spec, splits[0]).geometry;
    let (g, to) = (spec.geometry, spec.output());
    if to != g {
        decisions.push(format!(
            "padded with zeros to kernels: heads {} + {} / {} become {} + {} / {}, the cache grows from {} to {} values \
             ({} more bytes per token and layer in bf16)",
            g.qk_nope_head_dim,
            g.qk_rope_head_dim,
            g.v_head_dim,
            to.qk_nope_head_dim,
            to.qk_rope_head_dim,
            to.v_head_dim,
            g.kv_lora_rank + g.qk_rope_head_dim,
            to.kv_lora_rank + to.qk_rope_head_dim,
            2 * (to.kv_lora_rank + to.qk_rope_head_dim - g.kv_lora_rank - g.qk_rope_head_dim)
        ));
    }
    Ok(splits)
}

fn context(
    arch: &Architecture,
    shape: &GqaShape,
    settings: &ConvertSettings,
    windows: bool,
    decisions: &mut Vec<String>,
) -> Result<usize, ConvertError> {
    let asked = settings.max_context.unwrap_or(arch.max_position);
    if asked == 0 || asked > arch.max_position {
        return Err(ConvertError::refused(
            format!("--max-context {asked} is not within the model's {} positions", arch.max_position),
            "give a smaller context, or leave the option out",
        ));
    }
    if let Some(window) = shape.sliding_window
        && asked > window
        && !windows
    {
        return Err(ConvertError::refused(
            format!(
                "the model attends within a sliding window of {window} tokens, its context is {asked}; no MLA class has windows"
            ),
            format!(
                "`--max-context {window}` converts it for contexts within the window, where the window changes nothing; \
                 `--target hf-remote` has windows"
            ),
        ));
    }
    if asked != arch.max_position {
        decisions.push(format!("max_position_embeddings becomes {asked} instead of {}", arch.max_position));
    }
    if let Some(long) = arch.rope.long.as_ref().filter(|l| asked > l.original) {
        decisions.push(format!(
            "the frequencies change past {} tokens, as LongRoPE has it: transformers switches so, engines that pick one \
             list for good take the long one; `--max-context {}` writes the short list alone",
            long.original, long.original
        ));
    }
    Ok(asked)
}

fn dtypes(
    source: &ModelSource,
    settings: &ConvertSettings,
    kind: TargetKind,
    decisions: &mut Vec<String>,
) -> Result<(Dtype, bool), ConvertError> {
    let exact = !settings.method.compresses();
    let remote = kind == TargetKind::HfRemote;
    match settings.dtype {
        Some(OutputDtype::Bf16) => return Ok((Dtype::Bf16, false)),
        Some(OutputDtype::F32) => return Ok((Dtype::F32, false)),
        Some(OutputDtype::F16) if remote => return Ok((Dtype::F16, false)),
        Some(OutputDtype::F16) => {
            return Err(ConvertError::refused(
                format!(
                    "`--dtype f16` with the target `{}`: its latent norm is neutralised by weights scaled to 2^-20, which \
                     f16 rounds to zero",
                    kind.name()
                ),
                "use `--dtype bf16`, or `--target hf-remote`, which norms no latent",
            ));
        }
        Some(OutputDtype::Fp8) if remote => {
            return Err(ConvertError::refused(
                "`--dtype fp8` with the target `hf-remote`: no engine reads block scales in a class of ours",
                "use `--dtype bf16`, or a stock target",
            ));
        }
        Some(OutputDtype::Fp8) => return Ok((Dtype::Bf16, false)),
        None => {}
    }
    // The dtype most weight bytes have.
    let mut bytes = std::collections::BTreeMap::new();
    for (_, t) in source.tensors.iter() {
        *bytes.entry(t.dtype).or_insert(0_u64) += t.bytes();
    }
    let own = bytes.into_iter().max_by_key(|(_, n)| *n).map_or(Dtype::F32, |(d, _)| d);
    Ok(match own {
        Dtype::Bf16 if exact => {
            decisions.push(
                "tensors that a fold would round in bf16 are written in f32, the others as they are (`--dtype bf16` rounds them)".into(),
            );
            (Dtype::Bf16, true)
        }
        Dtype::F16 if remote => (Dtype::F16, exact),
        Dtype::F16 => {
            decisions.push(
                "the source is f16, in which the neutralised latent norm underflows: converted tensors are written in f32".into(),
            );
            (Dtype::F32, false)
        }
        Dtype::F8E4M3 => {
            decisions
                .push("the source is FP8: weights are written in bf16 (`--dtype fp8` quantises them again)".into());
            (Dtype::Bf16, false)
        }
        Dtype::Bf16 => (Dtype::Bf16, false),
        _ => (Dtype::F32, false),
    })
}

/// Refuse what no engine's own class runs, before it is written for them.
fn check_portable(case: &Case<'_>) -> Result<(), ConvertError> {
    let Case { arch, shape, settings, target: kind, .. } = *case;
    let why = if !matches!(kind, TargetKind::DeepseekV3 | TargetKind::DeepseekV2) {
        Some(format!("the target `{}` is not a class that engines have of their own", kind.name()))
    } else if shape.qkv_bias || shape.out_bias {
        Some("the source has biases in its attention, which engines' own classes skip without a word".to_owned())
    } else if !["default", "llama3", "yarn"].contains(&arch.rope.kind.as_str()) {
        Some(format!("the source's RoPE is scaled by `{}`, which engines' own classes replace by YaRN", arch.rope.kind))
    } else if shape.rotary_dim != shape.head_dim {
        Some("the source rotates only part of a head, whose frequencies are on no stock grid".to_owned())
    } else if let Some(why) = settings.method.off_stock_grid(case) {
        Some(why)
    } else if settings.rope_grid == Some(RopeGrid::Free) {
        Some("`--rope-grid free` needs LongRoPE factors".to_owned())
    } else if arch.activation != crate::arch::Activation::Silu {
        Some(format!("the activation `{}` is not SiLU", arch.activation.name()))
    } else {
        None
    };
    match why {
        None => Ok(()),
        Some(why) => Err(ConvertError::refused(
            format!("the portable profile cannot hold this model: {why}"),
            "`--profile faithful` keeps it, for transformers and vLLM's transformers backend",
        )),
    }
}
