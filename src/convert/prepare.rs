//! Everything that can be decided and checked before a byte is written.

use crate::arch::{ArchError, Architecture, GqaShape, check_tensors};
use crate::methods::partial_rope::PartialRope;
use crate::methods::{exact, transmla};
use crate::source::{Dtype, DtypeExt, ModelSource, scan_non_finite};
use crate::target::fp8::BLOCK;
use crate::target::{self, Emission, TargetSpec};
use crate::write::PlannedTensor;

use super::widths::widths;
use super::{
    ConvertError, ConvertSettings, Method, OutputDtype, Padding, PlannedGeometry, Profile, RopeGrid, TargetKind,
};
use super::{hybrid, weights};

/// Up to this many bytes every weight is scanned for NaN before anything starts; above, each layer when it is read.
const SCAN_FIRST: u64 = 8 << 30;

/// A query latent with a constant row is padded with zero rows to a multiple of this: an odd width would leave f32 tensors
/// unaligned behind bf16 ones.
const QUERY_LATENT_MULTIPLE: usize = 16;

/// A conversion that is known to be possible.
#[derive(Debug, Clone)]
pub struct Job<'a> {
    /// The source checkpoint.
    pub source: &'a ModelSource,
    /// Its architecture.
    pub arch: &'a Architecture,
    /// Its attention geometry.
    pub shape: GqaShape,
    /// What was asked.
    pub settings: &'a ConvertSettings,
    /// Names, shapes and dtypes of the output. The split between `r` and `d_R` may still be searched.
    pub spec: TargetSpec,
    /// Widths to search over, `(d_R, r)`, where the user left the split open; one entry otherwise.
    pub splits: Vec<(usize, usize)>,
    /// Decisions taken for the user.
    pub decisions: Vec<String>,
    /// Frequencies the slots may take.
    pub grid: RopeGrid,
    /// Longest context of the output.
    pub max_position: usize,
    /// Whether every weight was scanned for NaN already.
    scanned: bool,
}

impl<'a> Job<'a> {
    /// Check source and settings against each other.
    ///
    /// # Errors
    /// [`ConvertError`]; nothing was written.
    pub fn prepare(
        source: &'a ModelSource,
        arch: &'a Architecture,
        settings: &'a ConvertSettings,
    ) -> Result<Self, ConvertError> {
        let Some(&shape) = arch.gqa() else {
            return Err(ArchError::Unsupported {
                what: format!("converting `{}`, which is MLA already,", arch.model_type),
                hint: Some("give the GQA checkpoint it was made from".into()),
            }
            .into());
        };
        check_tensors(arch, &source.tensors)?;
        let mut decisions = Vec::new();
        let exact = settings.method == Method::Exact;
        let kept = hybrid::kept(settings, arch.layers)?;
        let kind = pick_target(arch, settings, &mut decisions)?;
        let remote = kind == TargetKind::HfRemote;
        let max_position = context(arch, &shape, settings, remote, &mut decisions)?;
        let (base, lossless) = dtypes(source, settings, kind, &mut decisions)?;
        let (grid, bias) = grid_and_bias(arch, &shape, settings, kind, &mut decisions)?;
        let splits = widths(arch, &shape, settings, grid, &mut decisions)?;
        let (rope, rank) = splits[0];
        let published_layout = settings.weights.published_layout;
        let (grid, bias) = match settings.method.from_weights() {
            true => (weights::grid(&shape, settings, rope), bias && !published_layout),
            false => (grid, bias),
        };
        let (d, hidden) = (shape.head_dim, arch.hidden);
        if exact && settings.q_lora_rank.is_some() {
            return Err(ConvertError::refused(
                "`--q-lora-rank` compresses queries, which `--method exact` does not",
                "use `--method transmla`",
            ));
        }
        if settings.q_lora_rank.is_some() && settings.method == Method::AttentionAware {
            return Err(ConvertError::refused(
                "`--q-lora-rank` is an option of `transmla` and `care`",
                "queries are not cached: leaving them whole costs no cache",
            ));
        }
        if settings.refine > 0 && arch.score_softcap.is_some() {
            return Err(ConvertError::refused(
                "`--refine` follows gradients of plain attention, and this model caps its scores",
                "leave the option out: the closed form and the refits know the cap",
            ));
        }
        if matches!(settings.method, Method::Transmla | Method::Care) {
            if shape.rotary_dim != d {
                return Err(ConvertError::refused(
                    format!(
                        "the model rotates {} of each head's {d} values, `--method {}` is defined for whole heads",
                        shape.rotary_dim, settings.method
                    ),
                    "use `--method attention-aware` or `exact`",
                ));
            }
            let limits =
                transmla::Limits { kv_heads: shape.kv_heads, head_dim: d, queries: (arch.heads * d).min(hidden) };
            let fold = match settings.freqfold {
                super::FreqFold::Fixed(fold) => fold,
                super::FreqFold::Auto => (d / rope.max(1)).max(1),
            };
            transmla::check(&limits, rope, rank, settings.q_lora_rank, fold)
                .map_err(|e| ConvertError::Refused { message: e.message, hint: e.hint })?;
        }
        let query_bias = shape.qkv_bias && !published_layout;
        // A constant row of the query latent carries what stock classes have no bias for.
        let constant_row = query_bias && !remote;
        let q_lora_rank = query_latent(weights::query_rank(arch, &shape, settings), constant_row, kind, hidden);
        let still = d - shape.rotary_dim;
        let geometry = PlannedGeometry {
            kv_lora_rank: rank,
            q_lora_rank,
            qk_nope_head_dim: match exact {
                true if remote => still,
                true => exact::lossless_nope_dim(rope, still, d),
                false if settings.method.from_weights() => weights::nope_dim(&shape, settings, rope),
                false => d,
            },
            qk_rope_head_dim: rope,
            v_head_dim: d,
        };
        let width = (geometry.qk_nope_head_dim + geometry.qk_rope_head_dim) as f64;
        let score_scale = shape.score_scale * arch.rope.amplitude.powi(2) * width.sqrt();
        let mut spec = TargetSpec {
            kind,
            geometry,
            portable: settings.profile == Some(Profile::Portable),
            pad: pads(settings),
            stock_grid: grid == RopeGrid::Stock && !exact,
            plain_scale: score_scale.log2().fract().abs() < 1e-12,
            bias,
            query_bias: query_bias && remote,
            qk_norm: arch.qk_norm.is_some() && exact,
            fp8: settings.dtype == Some(OutputDtype::Fp8),
            keep_dtypes: settings.dtype.is_none(),
            constant_row,
            base,
            lossless,
            // An amplitude that only part of a head has is divided out of the rest.
            plain_weights: exact && (still == 0 || arch.rope.amplitude == 1.0),
            stream_scale: if remote { 1.0 } else { TargetSpec::stream_scale(arch.norm_eps) },
            kept,
        };
        let open = weights::ranks_open(settings);
        let splits = if open { splits } else { fitting(splits, &mut spec, settings, &mut decisions)? };
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
        let job = Self { source, arch, shape, settings, spec, splits, decisions, grid, max_position, scanned };
        if settings.weights.kv_energy.is_none() {
            job.check_cache()?;
        }
        Ok(job)
    }

    /// Cache values per token per layer of the output.
    pub fn cache_values(&self) -> usize {
        self.spec.output().kv_lora_rank + self.spec.output().qk_rope_head_dim
    }

    /// Layers that become MLA.
    pub fn mla_layers(&self) -> Vec<usize> {
        (0..self.arch.layers).filter(|i| !self.spec.keeps(*i)).collect()
    }

    /// Cache values per token of the output, all layers.
    pub fn cache_values_per_token(&self) -> usize {
        let converted = self.mla_layers().len();
        converted * self.cache_values() + (self.arch.layers - converted) * self.arch.cache_values()
    }

    /// Refuse a tensor that holds NaN or infinity, where the first scan did not look at it.
    pub(super) fn check_finite(&self, name: &str) -> Result<(), ConvertError> {
        if self.scanned { Ok(()) } else { check_finite(self.source, name) }
    }

    fn check_cache(&self) -> Result<(), ConvertError> {
        let (new, old) = (self.cache_values(), self.arch.cache_values());
        if self.settings.method == Method::Exact || self.settings.force || new < old {
            return Ok(());
        }
        Err(ConvertError::refused(
            format!(
                "the output would cache {new} values per token and layer, the source caches {old}: nothing is saved"
            ),
            match self.spec.output() == self.spec.geometry {
                true => "lower `--kv-budget`, `--kv-lora-rank` or `--qk-rope-head-dim`, or say `--force`",
                false => "padding to kernels costs more than this model saves: `--pad none`, or say `--force`",
            },
        ))
    }

    /// Fix the split.
    pub fn set_split(&mut self, rope: usize, rank: usize) {
        set_split(&mut self.spec, rope, rank);
    }

    /// Fix ranks that were found by energy.
    ///
    /// # Errors
    /// A cache that does not shrink, widths that padding or FP8 do not allow.
    pub(super) fn set_ranks(&mut self, kv: usize, q: Option<usize>) -> Result<(), ConvertError> {
        let rope = self.spec.geometry.qk_rope_head_dim;
        let (row, kind) = (self.spec.constant_row, self.spec.kind);
        self.spec.geometry.q_lora_rank = query_latent(q, row, kind, self.arch.hidden);
        self.splits = fitting(vec![(rope, kv)], &mut self.spec, self.settings, &mut self.decisions)?;
        self.check_cache()
    }

    /// What is written, and where it comes from.
    pub fn emission(&self) -> Emission {
        Emission::new(self.arch, &self.spec, &|name| self.source.tensors.get(name).map_or(self.spec.base, |t| t.dtype))
    }

    /// Every tensor of the output, in writing order.
    pub fn planned_tensors(&self) -> Vec<PlannedTensor> {
        self.emission().planned()
    }
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
    let linear = settings.method != Method::Exact;
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

fn set_split(spec: &mut TargetSpec, rope: usize, rank: usize) {
    spec.geometry.qk_rope_head_dim = rope;
    spec.geometry.kv_lora_rank = rank;
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
    splits: Vec<(usize, usize)>,
    spec: &mut TargetSpec,
    settings: &ConvertSettings,
    decisions: &mut Vec<String>,
) -> Result<Vec<(usize, usize)>, ConvertError> {
    let at = |spec: &TargetSpec, (rope, rank): (usize, usize)| {
        let mut spec = spec.clone();
        set_split(&mut spec, rope, rank);
        spec
    };
    let kernel = |s: &TargetSpec| target::pad::kernel_shape(&s.geometry, s.stock_grid);
    let mut splits = splits;
    if spec.pad {
        let fit: Vec<_> = splits.iter().copied().filter(|split| kernel(&at(spec, *split)).is_some()).collect();
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
        let whole = |split: &(usize, usize)| at(spec, *split).output().kv_lora_rank.is_multiple_of(BLOCK);
        let rank = at(spec, splits[0]).output().kv_lora_rank;
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
    spec.geometry = at(spec, splits[0]).geometry;
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
    let exact = settings.method == Method::Exact;
    let remote = kind == TargetKind::HfRemote;
    match settings.dtype {
        Some(OutputDtype::Bf16) => return Ok((Dtype::BF16, false)),
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
        Some(OutputDtype::Fp8) => return Ok((Dtype::BF16, false)),
        None => {}
    }
    // The dtype most weight bytes have, a float type where two have as many.
    let mut bytes = std::collections::BTreeMap::new();
    for (_, t) in source.tensors.iter() {
        *bytes.entry(t.dtype).or_insert(0_u64) += t.bytes();
    }
    let own = bytes.into_iter().max_by_key(|(d, n)| (*n, d.is_float())).map_or(Dtype::F32, |(d, _)| d);
    Ok(match own {
        Dtype::BF16 if exact => {
            decisions.push(
                "tensors that a fold would round in bf16 are written in f32, the others as they are (`--dtype bf16` rounds them)".into(),
            );
            (Dtype::BF16, true)
        }
        Dtype::F16 if remote => (Dtype::F16, exact),
        Dtype::F16 => {
            decisions.push(
                "the source is f16, in which the neutralised latent norm underflows: converted tensors are written in f32".into(),
            );
            (Dtype::F32, false)
        }
        Dtype::F8_E4M3 => {
            decisions
                .push("the source is FP8: weights are written in bf16 (`--dtype fp8` quantises them again)".into());
            (Dtype::BF16, false)
        }
        Dtype::BF16 => (Dtype::BF16, false),
        _ => (Dtype::F32, false),
    })
}

/// Frequencies the slots may take, and whether the output has biases.
fn grid_and_bias(
    arch: &Architecture,
    shape: &GqaShape,
    settings: &ConvertSettings,
    kind: TargetKind,
    decisions: &mut Vec<String>,
) -> Result<(RopeGrid, bool), ConvertError> {
    let own = shape.qkv_bias || shape.out_bias;
    let portable = settings.profile == Some(Profile::Portable);
    if portable {
        check_portable(arch, shape, settings, kind)?;
    }
    match settings.method {
        Method::AttentionAware => {
            let stock = if portable { Some(RopeGrid::Stock) } else { None };
            let grid = settings.rope_grid.or(stock).unwrap_or(RopeGrid::Free);
            if settings.rope_grid.is_none() && settings.profile.is_none() && kind != TargetKind::HfRemote {
                decisions.push(
                    "rotated slots take free frequencies (LongRoPE factors) and o_proj a bias: transformers and vLLM's transformers backend run that; `--rope-grid stock` writes what every engine's own class runs, at some loss".into(),
                );
            }
            Ok((grid, own || grid == RopeGrid::Free))
        }
        Method::Exact | Method::Transmla | Method::Care | Method::XEcomla | Method::Mha2mla => {
            Ok((settings.rope_grid.unwrap_or(RopeGrid::Stock), own))
        }
    }
}

/// Refuse what no engine's own class runs, before it is written for them.
fn check_portable(
    arch: &Architecture,
    shape: &GqaShape,
    settings: &ConvertSettings,
    kind: TargetKind,
) -> Result<(), ConvertError> {
    let why = if !matches!(kind, TargetKind::DeepseekV3 | TargetKind::DeepseekV2) {
        Some(format!("the target `{}` is not a class that engines have of their own", kind.name()))
    } else if shape.qkv_bias || shape.out_bias {
        Some("the source has biases in its attention, which engines' own classes skip without a word".to_owned())
    } else if !["default", "llama3", "yarn"].contains(&arch.rope.kind.as_str()) {
        Some(format!("the source's RoPE is scaled by `{}`, which engines' own classes replace by YaRN", arch.rope.kind))
    } else if shape.rotary_dim != shape.head_dim {
        Some("the source rotates only part of a head, whose frequencies are on no stock grid".to_owned())
    } else if settings.method == Method::Exact && shape.kv_heads > 1 {
        Some(format!("`--method exact` keeps every frequency {} times, which no stock grid does", shape.kv_heads))
    } else if settings.method == Method::Mha2mla && shape.kv_heads > 1 {
        Some(format!(
            "`--method mha2mla` keeps a frequency for each of {} KV heads, which no stock grid does",
            shape.kv_heads
        ))
    } else if settings.method == Method::XEcomla && weights::rule(settings) != PartialRope::Uniform {
        Some("only `--partial-rope uniform` lies on the stock grid".to_owned())
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
