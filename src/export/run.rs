//! From an MLA folder to the folder of another class, dtype or padding.

use std::path::Path;

use super::cast;
use super::cut::Extent;
use super::layer::Reader;
use super::report::{EXPORT_SCHEMA, ExportReport, ExportSettings, Route};
use crate::arch::{Activation, Architecture, Attention, MlaShape, check_tensors};
use crate::error::ConvertError;
use crate::mla::Split;
use crate::observe::{Event, Observer};
use crate::publish::{self, Config, Extras, Nothing, Place, Publisher};
use crate::source::ModelSource;
use crate::target::{
    self, Emission, LatentNorm, Origin, OutputDtype, Padding, Profile, RopeConfig, RopeGrid, Storage, Target,
    TargetChoice, TargetSpec, Wanted,
};
use crate::write::{Leftover, PlannedTensor, ShardPlan};

/// Relative error of a latent norm below which the folder is taken to be exact, as conversions of method `exact` are.
const EXACT: f64 = 1.0 / (1 << 18) as f64;
/// Root mean square of an input norm's gain below which the gain is taken to be scaled for the latents' sake.
const SCALED: f64 = 1.0 / 512.0;

/// Files beside the weights that the caller wants in the folder: name and content, made of the report.
pub type ExportExtras<'a> = Extras<'a, ExportReport>;

/// Write the MLA model `source` for another class, dtype or padding into the folder `output`.
///
/// The function is the same, to the rounding of the dtype that is written. The folder appears, complete, in one rename; on any
/// error it is as it was. Phases reported: `read`, `export`.
///
/// # Errors
/// [`ConvertError`]: a GQA model; what the class has no place for; files that cannot be used.
pub fn export(
    source: &ModelSource,
    arch: &Architecture,
    settings: &ExportSettings,
    output: &Path,
    extras: ExportExtras<'_>,
    observer: &dyn Observer,
) -> Result<ExportReport, ConvertError> {
    let Attention::Mla(shape) = &arch.attention else {
        return Err(ConvertError::refused(
            format!("`{}` ({}) has no latent: its attention is grouped-query", source.spec, arch.model_type),
            "convert it first (`gqa2mla convert`)",
        ));
    };
    check_tensors(arch, &source.tensors)?;
    let own = Target::of_model_type(&arch.model_type);
    let mut job = Job { source, arch, shape, settings, output, own, input_factor: 1.0, observer };
    job.input_factor = job.input_factor()?;
    match job.obstacle()? {
        Some(why) => job.cast(&why, extras),
        None => job.rewrite(extras),
    }
}

struct Job<'a> {
    source: &'a ModelSource,
    arch: &'a Architecture,
    shape: &'a MlaShape,
    settings: &'a ExportSettings,
    output: &'a Path,
    /// The folder's class, where this tool writes it.
    own: Option<Target>,
    /// See [`Reader::input_factor`].
    input_factor: f64,
    observer: &'a dyn Observer,
}

/// What is known of the layers before the first is written.
struct Survey {
    extent: Extent,
    norm_error: f64,
    constant_keys: bool,
}

impl Job<'_> {
    fn reader(&self) -> Reader<'_> {
        let Self { source, arch, shape, input_factor, .. } = *self;
        Reader { source, arch, shape, input_factor }
    }

    /// What undoes the scaling of the input norms for the latents' sake; 1 where they are not scaled.
    fn input_factor(&self) -> Result<f64, ConvertError> {
        if self.arch.layers == 0 || !self.shape.latent_norm {
            return Ok(1.0);
        }
        let gain = self.reader().input_gain(0)?;
        let rms = (gain.iter().map(|g| g * g).sum::<f64>() / gain.len().max(1) as f64).sqrt();
        Ok(if rms < SCALED { 1.0 / LatentNorm::SmallRows.input_scale() } else { 1.0 })
    }

    /// Why the attention cannot be read into the neutral form, if it cannot.
    fn obstacle(&self) -> Result<Option<String>, ConvertError> {
        if self.arch.hybrid.is_some() {
            return Ok(Some("some of its layers have grouped-query attention".to_owned()));
        }
        if self.arch.qk_norm.is_some() {
            return Ok(Some("its queries and keys are normed".to_owned()));
        }
        if self.shape.latent_norm {
            let stored = self.reader().read(0)?;
            if !stored.is_neutral(self.shape.latent_eps) {
                return Ok(Some("the norm of its latents does something, and is no conversion's".to_owned()));
            }
        }
        Ok(None)
    }

    /// Every weight in another dtype.
    fn cast(&self, why: &str, extras: ExportExtras<'_>) -> Result<ExportReport, ConvertError> {
        let same = self.settings.target.is_none() || self.settings.target == self.own;
        let dtype = cast::dtype(self.settings, same, why)?;
        let list = cast::emission(self.source, self.arch, dtype);
        let planned: Vec<PlannedTensor> = list.iter().map(|e| e.planned.clone()).collect();
        let mut publisher = self.publisher(&planned)?;
        self.observer.event(Event::Phase { name: "export", steps: None });
        publisher.write(&list, &mut Nothing)?;
        let name = serde_json::Value::from(target::torch_name(dtype));
        publisher.side_files(
            Config::Kept { without: &["quantization_config", "dtype"], with: &[("torch_dtype", name)] },
            &[],
        )?;
        let report = ExportReport {
            geometry: self.stored_geometry(),
            decisions: vec![format!("{why}: every weight is cast, and nothing else changes")],
            ..self.report(Route::Cast, self.arch.model_type.clone())
        };
        self.publish(publisher, report, extras)
    }

    /// The attention read into the neutral form and written for the class.
    fn rewrite(&self, extras: ExportExtras<'_>) -> Result<ExportReport, ConvertError> {
        let mut decisions = Vec::new();
        let class = self.class(&mut decisions)?;
        let survey = self.survey()?;
        if survey.constant_keys && self.arch.score_softcap.is_some() {
            return Err(ConvertError::refused(
                "keys have a constant, which capped attention scores do not lose in the softmax",
                "export the folder in its own class",
            ));
        }
        let (spec, rope) = self.spec(class, &survey, &mut decisions)?;
        decisions.extend(rope.note.clone());
        for decision in &decisions {
            self.observer.event(Event::Note(decision.clone()));
        }
        let own_dtype = |name: &str| self.source.tensors.get(name).map_or(spec.storage.base(), |t| t.dtype);
        let mut emission = Emission::new(self.arch, &spec, &own_dtype);
        self.scale_inputs(&mut emission);
        let mut publisher = self.publisher(&emission.planned())?;
        self.observer.event(Event::Phase { name: "export", steps: Some(self.arch.layers as u64) });
        publisher.write(&emission.first, &mut Nothing)?;
        for layer in 0..self.arch.layers {
            let stored = self.reader().read(layer)?;
            let gain = stored.input.clone();
            let (mla, _) = stored.neutral(self.arch, self.shape);
            let tensors = spec.attention_tensors(self.arch, layer, &survey.extent.cut(&mla), &gain);
            publisher.write(&emission.layers[layer], &mut tensors.as_slice())?;
            self.observer.event(Event::Step { done: layer as u64 + 1, tokens: 0 });
        }
        publisher.write(&emission.last, &mut Nothing)?;
        let config = spec.config(self.arch, &self.source.config, &rope, self.arch.max_position);
        let tokenizer = publish::tokenizer_files(self.source, class, self.observer);
        let code = class.files().iter().map(|(name, text)| (*name, text.as_bytes()));
        let own: Vec<_> = code.chain(tokenizer.iter().map(|(name, text)| (name.as_str(), text.as_slice()))).collect();
        publisher.side_files(Config::Made(&config), &own)?;
        let report = ExportReport {
            geometry: spec.output(),
            latent_norm: spec.latent_norm,
            cache_values_per_token_per_layer: spec.cache_values(),
            norm_error: survey.norm_error,
            decisions,
            ..self.report(Route::Rewritten, class.model_type().to_owned())
        };
        self.publish(publisher, report, extras)
    }

    /// The class that is written, known to hold the model.
    fn class(&self, decisions: &mut Vec<String>) -> Result<Target, ConvertError> {
        let choice = self.settings.target.or(self.own).map_or(TargetChoice::Auto, TargetChoice::Class);
        let wanted = Wanted { arch: self.arch, choice, linear_norms: false, two_kinds: false };
        let class = target::select(&wanted, decisions)?;
        let windowed = self.arch.windows.iter().flatten().any(|w| *w < self.arch.max_position);
        if windowed && !class.has_windows() {
            return Err(ConvertError::refused(
                format!("the target `{class}` has no place for sliding windows"),
                Target::first(|other| other.has_windows())
                    .map_or_else(String::new, |other| format!("`--target {other}` has windows")),
            ));
        }
        if self.arch.mtp_layers > 0 {
            decisions.push("layers that predict further tokens are left out".to_owned());
        }
        Ok(class)
    }

    /// What all layers use.
    ///
    /// # Errors
    /// A layer whose latent norm does something, unlike the first's.
    fn survey(&self) -> Result<Survey, ConvertError> {
        self.observer.event(Event::Phase { name: "read", steps: Some(self.arch.layers as u64) });
        let mut all: Option<Survey> = None;
        for layer in 0..self.arch.layers {
            let stored = self.reader().read(layer)?;
            let eps = self.shape.latent_eps;
            if !stored.is_neutral(eps) {
                return Err(ConvertError::refused(
                    format!("the norm of the latents of layer {layer} does something, that of layer 0 does not"),
                    "no conversion of this tool is like that: is the checkpoint intact?",
                ));
            }
            let norm_error = stored.error_without_norms(eps);
            let (mla, constant_keys) = stored.neutral(self.arch, self.shape);
            let extent = Extent::of(&mla);
            all = Some(match all {
                None => Survey { extent, norm_error, constant_keys },
                Some(before) => Survey {
                    extent: before.extent.and(extent),
                    norm_error: before.norm_error.max(norm_error),
                    constant_keys: before.constant_keys || constant_keys,
                },
            });
            self.observer.event(Event::Step { done: layer as u64 + 1, tokens: 0 });
        }
        all.ok_or_else(|| ConvertError::refused("the model has no layers", "is config.json this model's?"))
    }

    /// Names, shapes and dtypes of the output, and its frequencies.
    fn spec(
        &self,
        class: Target,
        Survey { extent, norm_error, .. }: &Survey,
        decisions: &mut Vec<String>,
    ) -> Result<(TargetSpec, RopeConfig), ConvertError> {
        let norm_error = *norm_error;
        let Self { arch, settings, .. } = *self;
        let geometry = extent.geometry();
        let portable = settings.profile == Profile::Portable;
        let biases = !portable && settings.dtype != Some(OutputDtype::Fp8);
        // Where f16 is wanted, or the norm was neutralised no better before.
        let exact = settings.dtype != Some(OutputDtype::F16) && norm_error < EXACT;
        let mut latent_norm = LatentNorm::of(class, biases, exact);
        if let Some(norm) = latent_norm.filter(|norm| norm.needs_bias()) {
            // An even width keeps tensors of different dtypes aligned.
            let rank = geometry.kv_lora_rank;
            let slots = (rank + norm.slots()).next_multiple_of(2) - rank;
            latent_norm = Some(LatentNorm::Constant { slots });
        }
        let own = self.source.tensors.main_dtype();
        let (storage, decision) = Storage::choose(settings.dtype, own, (class, latent_norm), true)?;
        decisions.extend(decision.map(str::to_owned));
        let kept = extent.kept_pairs();
        let frequencies: Vec<f64> = kept.iter().map(|p| arch.rope.inv_freq[*p]).collect();
        let unasked = if portable { Padding::Kernels } else { Padding::None };
        let mut spec = TargetSpec {
            class,
            geometry,
            padding: settings.pad.unwrap_or(unasked),
            profile: settings.profile,
            slots: RopeGrid::Free,
            bias: extent.bias || latent_norm.is_some_and(LatentNorm::needs_bias),
            query_bias: extent.query_bias,
            head_norms: false,
            storage,
            plain_weights: false,
            latent_norm,
            kept: Vec::new(),
        };
        // Before padding, which a stock grid restricts.
        let unpadded = TargetSpec { padding: Padding::None, ..spec.clone() };
        let narrow = unpadded.rope(&frequencies, arch, &self.source.config, arch.max_position);
        if narrow.kind != "longrope" {
            spec.slots = RopeGrid::Stock;
        }
        if portable {
            self.check_portable(class, extent, &narrow)?;
        }
        spec.set_query_rank(geometry.q_lora_rank, arch.hidden);
        let split = Split { rope: geometry.qk_rope_head_dim, rank: geometry.kv_lora_rank };
        let fitted = target::fit(spec, vec![split], settings.pad.is_some())?;
        decisions.extend(fitted.decisions);
        let rope = fitted.spec.rope(&frequencies, arch, &self.source.config, arch.max_position);
        Ok((fitted.spec, rope))
    }

    /// Refuse what engines' own classes do not run.
    fn check_portable(&self, class: Target, extent: &Extent, rope: &RopeConfig) -> Result<(), ConvertError> {
        let why = if !class.is_portable() {
            format!("the target `{class}` is not a class that engines have of their own")
        } else if extent.bias || extent.query_bias {
            "its attention has biases, which engines' own classes skip without a word".to_owned()
        } else if rope.kind == "longrope" {
            "its frequencies are on no stock grid".to_owned()
        } else if self.arch.activation != Activation::Silu {
            format!("the activation `{}` is not SiLU", self.arch.activation.name())
        } else {
            return Ok(());
        };
        Err(ConvertError::refused(
            format!("the portable profile cannot hold this model: {why}"),
            "`--profile faithful` keeps it, for transformers and vLLM's transformers backend; for engines' own classes, \
             convert the source again with `--profile portable`",
        ))
    }

    /// Undo the scaling of the input norms, which are copied otherwise.
    fn scale_inputs(&self, emission: &mut Emission) {
        let names = (0..self.arch.layers).map(|layer| self.arch.names.layer(layer));
        let stored: std::collections::BTreeSet<String> =
            names.filter(|n| n.has("input_norm")).map(|n| n.role("input_norm")).collect();
        for emit in emission.layers.iter_mut().flatten() {
            if let Origin::Source { part, scale, offset } = &mut emit.from
                && stored.contains(&part.name)
            {
                *scale *= self.input_factor;
                *offset *= self.input_factor;
            }
        }
    }

    fn publisher(&self, planned: &[PlannedTensor]) -> Result<Publisher<'_>, ConvertError> {
        let shards = ShardPlan::new(planned, self.settings.max_shard_bytes)?;
        let leftover = match self.settings.leftover {
            Leftover::Resume => Leftover::Refuse,
            other => other,
        };
        let place =
            Place { output: self.output, overwrite: self.settings.overwrite, leftover, bytes: shards.file_bytes() };
        let staging = publish::stage(self.source, &place)?;
        Ok(Publisher::new(self.source, staging, shards, self.observer))
    }

    fn stored_geometry(&self) -> crate::mla::Geometry {
        crate::mla::Geometry {
            kv_lora_rank: self.shape.kv_lora_rank,
            q_lora_rank: self.shape.q_lora_rank,
            qk_nope_head_dim: self.shape.qk_nope_head_dim,
            qk_rope_head_dim: self.shape.qk_rope_head_dim,
            v_head_dim: self.shape.v_head_dim,
        }
    }

    /// The report of an export that changes nothing.
    fn report(&self, route: Route, class: String) -> ExportReport {
        ExportReport {
            schema_version: EXPORT_SCHEMA,
            tool_version: env!("CARGO_PKG_VERSION").to_owned(),
            output: self.output.to_owned(),
            source: self.source.spec.clone(),
            source_fingerprint: publish::fingerprint(self.source),
            settings: self.settings.clone(),
            route,
            source_class: self.arch.model_type.clone(),
            class,
            geometry: self.stored_geometry(),
            latent_norm: None,
            cache_values_per_token_per_layer: self.arch.cache_values(),
            source_cache_values_per_token_per_layer: self.arch.cache_values(),
            norm_error: 0.0,
            decisions: Vec::new(),
        }
    }

    fn publish(
        &self,
        mut publisher: Publisher<'_>,
        report: ExportReport,
        extras: ExportExtras<'_>,
    ) -> Result<ExportReport, ConvertError> {
        publisher.report(&report, extras)?;
        Ok(ExportReport { output: publisher.finish()?, ..report })
    }
}
