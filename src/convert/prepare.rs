//! Everything that can be decided and checked before a byte is written.

use crate::arch::{ArchError, Architecture, GqaShape, check_tensors};
use crate::methods::{exact, transmla};
use crate::source::{Dtype, ModelSource, scan_non_finite};
use crate::target::TargetSpec;
use crate::write::PlannedTensor;

use super::{Budget, ConvertError, ConvertSettings, Method, OutputDtype, PlannedGeometry, RopeGrid};

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
        if arch.mlp_bias {
            return Err(ConvertError::refused(
                "`mlp_bias` is true, and the target `deepseek_v3` has no biases in its MLP",
                "no stock class combines MLA with MLP biases of this kind",
            ));
        }
        let mut decisions = Vec::new();
        let max_position = context(arch, &shape, settings, &mut decisions)?;
        let (base, lossless) = dtypes(source, settings, &mut decisions);
        let (grid, bias) = grid_and_bias(&shape, settings, &mut decisions);
        let splits = widths(arch, &shape, settings, grid, &mut decisions)?;
        let (rope, rank) = splits[0];
        let (d, hidden) = (shape.head_dim, arch.hidden);
        let exact = settings.method == Method::Exact;
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
        if matches!(settings.method, Method::Transmla | Method::Care) {
            let limits =
                transmla::Limits { kv_heads: shape.kv_heads, head_dim: d, queries: (arch.heads * d).min(hidden) };
            let fold = match settings.freqfold {
                super::FreqFold::Fixed(fold) => fold,
                super::FreqFold::Auto => (d / rope.max(1)).max(1),
            };
            transmla::check(&limits, rope, rank, settings.q_lora_rank, fold)
                .map_err(|e| ConvertError::Refused { message: e.message, hint: e.hint })?;
        }
        let query_bias = shape.qkv_bias;
        let q_lora_rank = match (settings.q_lora_rank, query_bias) {
            (None, false) => None,
            (None, true) => Some((hidden + 1).next_multiple_of(QUERY_LATENT_MULTIPLE)),
            (Some(rank), true) => Some((rank + 1).next_multiple_of(QUERY_LATENT_MULTIPLE)),
            (Some(rank), false) => Some(rank),
        };
        let geometry = PlannedGeometry {
            kv_lora_rank: rank,
            q_lora_rank,
            qk_nope_head_dim: if exact { exact::lossless_nope_dim(shape.kv_heads, d) } else { d },
            qk_rope_head_dim: rope,
            v_head_dim: d,
        };
        let width = (geometry.qk_nope_head_dim + geometry.qk_rope_head_dim) as f64;
        let score_scale = (d as f64).powf(-0.5) * arch.rope.amplitude.powi(2) * width.sqrt();
        let spec = TargetSpec {
            geometry,
            plain_scale: score_scale.log2().fract().abs() < 1e-12,
            bias,
            constant_row: query_bias,
            base,
            lossless,
            plain_weights: exact,
            stream_scale: TargetSpec::stream_scale(arch.norm_eps),
        };
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
        job.check_cache()?;
        Ok(job)
    }

    /// Cache values per token per layer of the output.
    pub fn cache_values(&self) -> usize {
        self.spec.geometry.kv_lora_rank + self.spec.geometry.qk_rope_head_dim
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
            "lower `--kv-budget`, `--kv-lora-rank` or `--qk-rope-head-dim`, or say `--force`",
        ))
    }

    /// Fix the split.
    pub fn set_split(&mut self, rope: usize, rank: usize) {
        self.spec.geometry.qk_rope_head_dim = rope;
        self.spec.geometry.kv_lora_rank = rank;
    }

    /// Every tensor of the output, in writing order.
    pub fn planned_tensors(&self) -> Vec<PlannedTensor> {
        let (arch, spec) = (self.arch, &self.spec);
        let names = &arch.names;
        let (v, d, i) = (arch.vocab, arch.hidden, arch.intermediate);
        let plain =
            |name: String, from: &str, shape: Vec<usize>| PlannedTensor { name, dtype: self.copied_dtype(from), shape };
        let mut out = vec![PlannedTensor {
            name: "model.embed_tokens.weight".into(),
            dtype: self.stream_dtype(&names.embed),
            shape: vec![v, d],
        }];
        for layer in 0..arch.layers {
            let from = names.layer(layer);
            let to = format!("model.layers.{layer}.");
            out.push(plain(format!("{to}input_layernorm.weight"), &from.role("input_norm"), vec![d]));
            out.extend(spec.planned_attention(arch, layer));
            out.push(plain(format!("{to}mlp.gate_proj.weight"), &from.weight("gate"), vec![i, d]));
            out.push(plain(format!("{to}mlp.up_proj.weight"), &from.weight("up"), vec![i, d]));
            out.push(PlannedTensor {
                name: format!("{to}mlp.down_proj.weight"),
                dtype: self.stream_dtype(&from.weight("down")),
                shape: vec![d, i],
            });
            out.push(plain(format!("{to}post_attention_layernorm.weight"), &from.role("post_norm"), vec![d]));
        }
        out.push(plain("model.norm.weight".into(), &names.final_norm, vec![d]));
        let head = if arch.tied_head { &names.embed } else { &names.head };
        out.push(plain("lm_head.weight".into(), head, vec![v, d]));
        out
    }

    /// Dtype of a tensor that is copied: its own, unless a dtype was asked for.
    fn copied_dtype(&self, name: &str) -> Dtype {
        match self.settings.dtype {
            Some(_) => self.spec.base,
            None => self.source.tensors.get(name).map_or(self.spec.base, |t| t.dtype),
        }
    }

    /// Dtype of a tensor that is the source's times the stream scale.
    fn stream_dtype(&self, name: &str) -> Dtype {
        if self.spec.stream_scale == 1.0 { self.copied_dtype(name) } else { self.spec.scaled_dtype() }
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

fn context(
    arch: &Architecture,
    shape: &GqaShape,
    settings: &ConvertSettings,
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
    {
        return Err(ConvertError::refused(
            format!(
                "the model attends within a sliding window of {window} tokens, its context is {asked}; no MLA class has windows"
            ),
            format!(
                "`--max-context {window}` converts it for contexts within the window, where the window changes nothing"
            ),
        ));
    }
    if asked != arch.max_position {
        decisions.push(format!("max_position_embeddings becomes {asked} instead of {}", arch.max_position));
    }
    Ok(asked)
}

fn dtypes(source: &ModelSource, settings: &ConvertSettings, decisions: &mut Vec<String>) -> (Dtype, bool) {
    let exact = settings.method == Method::Exact;
    match settings.dtype {
        Some(OutputDtype::Bf16) => (Dtype::Bf16, false),
        Some(OutputDtype::F32) => (Dtype::F32, false),
        None => {
            // The dtype most weight bytes have.
            let mut bytes = std::collections::BTreeMap::new();
            for (_, t) in source.tensors.iter() {
                *bytes.entry(t.dtype).or_insert(0_u64) += t.bytes();
            }
            let own = bytes.into_iter().max_by_key(|(_, n)| *n).map_or(Dtype::F32, |(d, _)| d);
            match own {
                Dtype::Bf16 if exact => {
                    decisions.push(
                        "tensors that a fold would round in bf16 are written in f32, the others as they are (`--dtype bf16` rounds them)".into(),
                    );
                    (Dtype::Bf16, true)
                }
                Dtype::F16 => {
                    decisions.push(
                        "the source is f16, in which the neutralised latent norm underflows: converted tensors are written in f32".into(),
                    );
                    (Dtype::F32, false)
                }
                Dtype::Bf16 => (Dtype::Bf16, false),
                _ => (Dtype::F32, false),
            }
        }
    }
}

fn grid_and_bias(shape: &GqaShape, settings: &ConvertSettings, decisions: &mut Vec<String>) -> (RopeGrid, bool) {
    let own = shape.qkv_bias || shape.out_bias;
    match settings.method {
        Method::AttentionAware => {
            let grid = settings.rope_grid.unwrap_or(RopeGrid::Free);
            if settings.rope_grid.is_none() {
                decisions.push(
                    "rotated slots take free frequencies (LongRoPE factors) and o_proj a bias: transformers and vLLM's transformers backend run that; `--rope-grid stock` writes what every engine's own class runs, at some loss".into(),
                );
            }
            (grid, own || grid == RopeGrid::Free)
        }
        Method::Exact | Method::Transmla | Method::Care => (settings.rope_grid.unwrap_or(RopeGrid::Stock), own),
    }
}

/// Candidate `(d_R, r)`: one where the user fixed them, several where the split is to be searched.
fn widths(
    arch: &Architecture,
    shape: &GqaShape,
    settings: &ConvertSettings,
    grid: RopeGrid,
    decisions: &mut Vec<String>,
) -> Result<Vec<(usize, usize)>, ConvertError> {
    let (g, d) = (shape.kv_heads, shape.head_dim);
    let source = arch.cache_values();
    if settings.method == Method::Exact {
        if settings.kv_lora_rank.is_some() || settings.qk_rope_head_dim.is_some() || settings.kv_budget.is_some() {
            return Err(ConvertError::refused(
                "`--method exact` keeps every value of the cache: it takes no rank and no budget",
                "use `--method attention-aware` to compress",
            ));
        }
        return Ok(vec![(g * d, g * d)]);
    }
    let budget = match settings.kv_budget {
        Some(Budget::Values(n)) => Some(n),
        Some(Budget::Percent(p)) => Some(((source as f64 * p / 100.0).round() as usize).max(1)),
        None => None,
    };
    let (rope, rank) = (settings.qk_rope_head_dim, settings.kv_lora_rank);
    if let (Some(b), Some(rope), Some(rank)) = (budget, rope, rank)
        && rope + rank != b
    {
        return Err(ConvertError::refused(
            format!(
                "--qk-rope-head-dim {rope} and --kv-lora-rank {rank} make {}, --kv-budget asks for {b}",
                rope + rank
            ),
            "leave one of the three out",
        ));
    }
    let budget = match (budget, rope, rank) {
        (_, Some(rope), Some(rank)) => rope + rank,
        (Some(b), _, _) => b,
        (None, Some(rope), None) => default_budget(source, decisions).max(rope + 2),
        (None, None, Some(rank)) => rank + d.min(64),
        (None, None, None) => default_budget(source, decisions),
    };
    let most_rope = if grid == RopeGrid::Stock || settings.method != Method::AttentionAware { d } else { g * d };
    let valid = |rope: usize| -> bool {
        rope >= 2
            && rope.is_multiple_of(2)
            && rope < budget
            && rope <= most_rope
            && budget - rope <= 2 * g * d - rope
            && (most_rope == g * d && grid == RopeGrid::Free || d % rope == 0)
    };
    let fixed = match (rope, rank) {
        (Some(rope), _) => Some(rope),
        // Pairs turn: an odd remainder leaves one value of the budget unused.
        (None, Some(rank)) => Some(budget.saturating_sub(rank) / 2 * 2),
        (None, None) => None,
    };
    if let Some(rope) = fixed {
        if valid(rope) {
            return Ok(vec![(rope, rank.unwrap_or(budget - rope))]);
        }
        return Err(ConvertError::refused(
            format!(
                "qk_rope_head_dim {rope} with kv_lora_rank {} cannot be made from {g} KV heads of size {d}",
                budget.saturating_sub(rope)
            ),
            format!(
                "qk_rope_head_dim has to be even, at most {most_rope}{}, and kv_lora_rank at most {} - qk_rope_head_dim",
                if most_rope == g * d && grid == RopeGrid::Free {
                    String::new()
                } else {
                    format!(" and a divisor of {d}")
                },
                2 * g * d
            ),
        ));
    }
    let mut ropes: Vec<usize> = (1..=most_rope / 2).map(|p| 2 * p).filter(|&r| valid(r)).collect();
    if ropes.is_empty() {
        return Err(ConvertError::refused(
            format!("no split of {budget} values per token and layer fits {g} KV heads of size {d}"),
            format!("the cache can have from 3 to {} values; the source's has {source}", 2 * g * d),
        ));
    }
    if settings.method != Method::AttentionAware {
        // As published: 64 rotated dimensions, or what fits.
        let want = 64.min(d).min((budget / 2).max(2));
        let rope = ropes.iter().copied().filter(|&r| r <= want).max().unwrap_or(ropes[0]);
        return Ok(vec![(rope, budget - rope)]);
    }
    if grid == RopeGrid::Free {
        // A coarse ladder around a sixth to a half of the budget: the optimum is flat (docs/methods.md).
        let ladder: Vec<usize> = [1.0 / 6.0, 0.21, 0.25, 0.29, 1.0 / 3.0, 0.38]
            .iter()
            .map(|f| ((budget as f64 * f / 8.0).round() as usize * 8).max(2))
            .filter(|r| ropes.contains(r))
            .collect();
        if !ladder.is_empty() {
            ropes = ladder;
            ropes.dedup();
        }
    }
    ropes.retain(|&r| r * 2 <= budget || budget < 8);
    if ropes.is_empty() {
        ropes.push(2);
    }
    Ok(ropes.into_iter().map(|r| (r, budget - r)).collect())
}

fn default_budget(source: usize, decisions: &mut Vec<String>) -> usize {
    // Widths that serving kernels are built for, if one saves at least a third.
    for kernel in [576, 320] {
        if kernel * 3 <= source * 2 {
            decisions.push(format!(
                "cache of {kernel} values per token and layer: the width serving kernels are built for, {:.0}% of the source's {source}",
                100.0 * kernel as f64 / source as f64
            ));
            return kernel;
        }
    }
    decisions
        .push(format!("cache of half the source's {source} values: no kernel width (576, 320) saves a third of it"));
    source / 2
}

/// FreqFolds to try for TransMLA's rope step.
pub(super) fn folds(job: &Job<'_>) -> Vec<usize> {
    match job.settings.freqfold {
        super::FreqFold::Fixed(f) => vec![f],
        super::FreqFold::Auto => transmla::candidate_folds(job.shape.head_dim, job.spec.geometry.qk_rope_head_dim),
    }
}
