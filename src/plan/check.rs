//! Everything that can be decided and checked before a byte is written and before the model is run.

use crate::arch::{ArchError, Architecture, GqaShape, check_tensors};
use crate::error::ConvertError;
use crate::methods::{Candidates, Case, ConvertSettings, Split};
use crate::mla::Geometry;
use crate::source::{ModelSource, scan_non_finite};
use crate::stream::SourceModel;
use crate::target::{self, LatentNorm, OutputDtype, Padding, Profile, RopeGrid, Storage, Target, TargetSpec, Wanted};

use super::hybrid;

/// Up to this many bytes every weight is scanned for NaN before anything starts; above, each layer when it is read.
const SCAN_FIRST: u64 = 8 << 30;

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
        let compresses = settings.method.compresses();
        let wanted = Wanted {
            arch,
            choice: settings.target,
            linear_norms: compresses,
            two_kinds: settings.mla_layers.is_some(),
        };
        let target = target::select(&wanted, &mut decisions)?;
        let max_position = context(arch, &shape, settings, target, &mut decisions)?;
        let latent_norm = LatentNorm::of(target, has_room_for_biases(settings, &shape), !compresses);
        let (storage, decision) =
            Storage::choose(settings.dtype, source.tensors.main_dtype(), (target, latent_norm), !compresses)?;
        decisions.extend(decision.map(str::to_owned));
        let case = Case { source, arch, shape, settings, target };
        if settings.profile == Some(Profile::Portable) {
            let off_grid = settings.method.off_stock_grid(&case);
            target::check_portable(target, arch, &shape, off_grid, settings.rope_grid)?;
        }
        let mut candidates = settings.method.check(&case, &mut decisions)?;
        let mut spec = spec(&case, &candidates, storage, kept, latent_norm);
        decisions.extend(constant_slot(&mut spec, &mut candidates, compresses));
        if !candidates.ranks_open() {
            let fitted = target::fit(spec, candidates.splits, settings.pad.is_some())?;
            (spec, candidates.splits) = (fitted.spec, fitted.splits);
            decisions.extend(fitted.decisions);
        }
        let stream_scale = spec.stream_scale(arch);
        if stream_scale != 1.0 {
            decisions.push(format!(
                "rms_norm_eps {:e} becomes 1e-6, which stock classes fix for the latent norm: the residual stream is scaled by {stream_scale:.5}",
                arch.norm_eps
            ));
        }
        let scanned = source.tensors.total_bytes() <= SCAN_FIRST;
        if scanned {
            for (name, _) in source.tensors.in_file_order() {
                check_finite(source, name)?;
            }
        }
        if !candidates.ranks_open() {
            check_cache(&case, &spec)?;
        }
        Ok(Self { case, candidates, spec, max_position, decisions, scanned })
    }

    /// The source as its layers are read.
    pub fn model(&self) -> SourceModel<'a> {
        SourceModel { source: self.case.source, arch: self.case.arch, keeps_head_norms: self.spec.head_norms }
    }

    /// Refuse a tensor that holds NaN or infinity, where the first scan did not read it.
    ///
    /// # Errors
    /// [`ConvertError::NotFinite`].
    pub fn check_finite(&self, name: &str) -> Result<(), ConvertError> {
        if self.scanned { Ok(()) } else { check_finite(self.case.source, name) }
    }
}

/// Whether the output may have biases that the source has not. The portable profile, FP8 and the stock grid are for engines'
/// own classes, which skip them; on the stock grid with biases of the source's the output is not for those all the same.
fn has_room_for_biases(settings: &ConvertSettings, shape: &GqaShape) -> bool {
    let stock_grid = settings.rope_grid == Some(RopeGrid::Stock);
    settings.profile != Some(Profile::Portable)
        && settings.dtype != Some(OutputDtype::Fp8)
        && (!stock_grid || shape.qkv_bias || shape.out_bias)
}

/// Names, shapes and dtypes of the output for the first split.
fn spec(
    case: &Case<'_>,
    candidates: &Candidates,
    storage: Storage,
    kept: Vec<bool>,
    latent_norm: Option<LatentNorm>,
) -> TargetSpec {
    let Case { arch, shape, settings, target, .. } = *case;
    let compresses = settings.method.compresses();
    let Split { rope, rank } = candidates.splits[0];
    let geometry = Geometry {
        kv_lora_rank: rank,
        q_lora_rank: None,
        qk_nope_head_dim: candidates.nope,
        qk_rope_head_dim: rope,
        v_head_dim: shape.head_dim,
    };
    let profile = settings.profile.unwrap_or(Profile::Faithful);
    let unasked = if profile == Profile::Portable { Padding::Kernels } else { Padding::None };
    let mut spec = TargetSpec {
        class: target,
        geometry,
        padding: settings.pad.unwrap_or(unasked),
        profile,
        // What loses nothing keeps every frequency as often as there are KV heads.
        slots: if compresses { candidates.grid } else { RopeGrid::Free },
        bias: candidates.bias || latent_norm.is_some_and(LatentNorm::needs_bias),
        query_bias: candidates.query_bias,
        head_norms: arch.qk_norm.is_some() && !compresses,
        storage,
        plain_weights: candidates.plain_weights,
        latent_norm,
        kept,
    };
    spec.set_query_rank(candidates.q_rank, arch.hidden);
    spec
}

/// Make room for the constant by which the latent norm is neutralised, where it is. The widths that were asked for, or that a
/// budget allows, are those of the output, so the method gets one coordinate less, unless padding has room for it. What loses
/// nothing needs them all: its output is wider.
fn constant_slot(spec: &mut TargetSpec, candidates: &mut Candidates, compresses: bool) -> Option<String> {
    let form = spec.latent_norm.filter(|norm| norm.needs_bias())?;
    if !compresses || candidates.kv_rank_open {
        let rank = candidates.splits.first()?.rank;
        let slots = (rank + form.slots()).next_multiple_of(2) - rank;
        spec.latent_norm = Some(LatentNorm::Constant { slots });
        return Some(format!(
            "the latent has {slots} more values than the method's: a constant by which the class's norm of it is neutralised"
        ));
    }
    let plain = TargetSpec { latent_norm: None, ..spec.clone() };
    for split in &mut candidates.splits {
        let (without, with) = (plain.with_split(*split).output(), spec.with_split(*split).output());
        if without != with && split.rank > 1 {
            split.rank -= form.slots();
        }
    }
    *spec = spec.with_split(*candidates.splits.first()?);
    Some("one value of the cached latent is a constant, by which the class's norm of it is neutralised".to_owned())
}

/// Refuse an output whose cache is no smaller than the source's.
pub(super) fn check_cache(case: &Case<'_>, spec: &TargetSpec) -> Result<(), ConvertError> {
    let (new, old) = (spec.cache_values(), case.arch.cache_values());
    if !case.settings.method.compresses() || case.settings.force || new < old {
        return Ok(());
    }
    Err(ConvertError::refused(
        format!("the output would cache {new} values per token and layer, the source caches {old}: nothing is saved"),
        match spec.output() == spec.unpadded() {
            true => "lower `--kv-budget`, `--kv-lora-rank` or `--qk-rope-head-dim`, or say `--force`",
            false => "padding to kernels costs more than this model saves: `--pad none`, or say `--force`",
        },
    ))
}

/// The spec with ranks that a survey settled.
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
    spec.set_query_rank(q_rank, case.arch.hidden);
    let fitted = target::fit(spec, vec![split], case.settings.pad.is_some())?;
    decisions.extend(fitted.decisions);
    check_cache(case, &fitted.spec)?;
    Ok(fitted.spec)
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

/// Longest context of the output.
fn context(
    arch: &Architecture,
    shape: &GqaShape,
    settings: &ConvertSettings,
    target: Target,
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
        && !target.has_windows()
    {
        let elsewhere = Target::first(|class| class.has_windows());
        return Err(ConvertError::refused(
            format!(
                "the model attends within a sliding window of {window} tokens, its context is {asked}; no MLA class has windows"
            ),
            format!(
                "`--max-context {window}` converts it for contexts within the window, where the window changes nothing{}",
                elsewhere.map_or_else(String::new, |class| format!("; `--target {class}` has windows"))
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
