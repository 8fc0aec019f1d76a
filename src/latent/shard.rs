//! `shard`: one weight file per rank of a tensor-parallel group that shares the latents out (docs/maths.md, 12).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::held::{Holding, RankCuts, Slice, SlicedTensor, holdings, roles};
use super::rotate::ROTATION_FILE;
use super::slicing::rms_corrections;
use super::statistics::{LatentMoments, latent_moments, latent_windows};
use super::weights::{check_slices, is_fp8, need_mla, refused};
use super::{Held, LatentWeights, Sharing, Transform, refitted_ranks};
use crate::arch::{Architecture, MlaShape, check_tensors};
use crate::calibrate::CalibrationSettings;
use crate::error::ConvertError;
use crate::observe::{Event, Observer};
use crate::publish::{self, Compute, Config, Place, Publisher};
use crate::runtime::{Device, DeviceChoice, RankTensors};
use crate::source::ModelSource;
use crate::target::Emit;
use crate::write::{Leftover, PlannedTensor, ShardPlan};

/// Version of `tpla.json`.
pub const SHARDS_SCHEMA: u32 = 1;
/// What describes the ranks in a sharded folder.
pub const SHARDS_FILE: &str = "tpla.json";

/// What `shard` is asked to do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ShardSettings {
    /// How the latents are shared out.
    pub sharing: Sharing,
    /// Whether to calibrate the sizes of slices that are normed by themselves.
    pub calibrate: bool,
    /// Whether to fit each rank's keys and values to its slice (`refitted_ranks`); calibrates.
    pub refit: bool,
    /// Calibration text.
    pub calibration: CalibrationSettings,
    /// Where calibration runs the model.
    pub device: DeviceChoice,
    /// Replace an existing output folder.
    #[serde(skip)]
    pub overwrite: bool,
}

/// One rank of the group.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RankEntry {
    /// Its number.
    pub rank: usize,
    /// Its weight file.
    pub file: String,
    /// First coordinate of its slice of the latent.
    pub latent_begin: usize,
    /// One past the last coordinate.
    pub latent_end: usize,
    /// Bytes of its weights.
    pub weight_bytes: u64,
}

/// Figures of one layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ShardedLayer {
    /// Layer index.
    pub layer: usize,
    /// Factor `a_t` on each rank's gain, folded in; 1 where nothing was measured.
    pub rms_correction: Vec<f64>,
    /// Factor on each rank's scores of its slice, folded in.
    pub logit_scale: Vec<f64>,
}

/// What `shard` did: `tpla.json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ShardReport {
    /// Version of this document.
    pub schema_version: u32,
    /// Tool version.
    pub tool_version: String,
    /// Where the output is.
    pub output: PathBuf,
    /// The model as the user named it.
    pub source: String,
    /// sha256 of each source weight file's header, by file name.
    pub source_fingerprint: BTreeMap<String, String>,
    /// What rotated the latents, by the source's `rotation.json`; `none` where it has none.
    pub transform: String,
    /// Which directions belong to which slice.
    pub order: String,
    /// Settings.
    pub settings: ShardSettings,
    /// Latent width of the whole model.
    pub kv_lora_rank: usize,
    /// Width of the RoPE key, cached by every rank.
    pub qk_rope_head_dim: usize,
    /// Values that a rank caches per token and layer.
    pub cache_values_per_rank: usize,
    /// Values that the whole model caches.
    pub cache_values: usize,
    /// Calibration tokens.
    pub calibration_tokens: usize,
    /// The ranks.
    pub ranks: Vec<RankEntry>,
    /// How tensors are held, by role; what is not named is whole on every rank.
    pub held: BTreeMap<String, Held>,
    /// Where the ranks' results are summed.
    pub sums: Vec<String>,
    /// Figures by layer.
    pub layers: Vec<ShardedLayer>,
}

impl publish::Report for ShardReport {
    const FILE: &'static str = SHARDS_FILE;
}

/// Write `source` as one weight file per rank into the folder `output`: `rank-T-of-N.safetensors`, the source's
/// `config.json` and side files, and `tpla.json`. One folder, so that all ranks appear together, in one rename.
///
/// Attention is shared out by the latent (every rank runs all heads), MLPs and experts by their intermediate width as in
/// plain tensor parallelism; biases that are added after a sum are on rank 0 alone. Everything else is whole on every rank.
/// Phases reported: `calibrate`, `refit`, `shard`.
///
/// # Errors
/// [`ConvertError`]: a GQA model, ranks that do not divide the latent, FP8 weights, text or files that cannot be used.
pub fn shard(
    source: &ModelSource,
    arch: &Architecture,
    settings: &ShardSettings,
    output: &Path,
    observer: &dyn Observer,
) -> Result<ShardReport, ConvertError> {
    let shape = need_mla(source, arch)?;
    check_tensors(arch, &source.tensors)?;
    check_slices(shape.kv_lora_rank, settings.sharing.ranks)?;
    if is_fp8(source) {
        return Err(refused(
            "the source is FP8: slices of its weights do not begin where the blocks of its scales do",
            "`gqa2mla rotate` writes such a model in bf16; shard that",
        ));
    }
    if LatentWeights::has_constant(source, arch, 0)? {
        return Err(refused(
            "one value of the latent is a constant that neutralises its norm: only the rank that holds it would norm its slice right",
            "`gqa2mla rotate` folds the constant away; shard what it writes",
        ));
    }
    let windows = match settings.calibrate || settings.refit {
        true => latent_windows(source, arch, &settings.calibration, shape.kv_lora_rank)?,
        false => Vec::new(),
    };
    let RankFiles { lists, plan, entries, held } = RankFiles::new(source, arch, shape, settings)?;
    let place = Place { output, overwrite: settings.overwrite, leftover: Leftover::Refuse, bytes: plan.file_bytes() };
    let staging = publish::stage(source, &place)?;
    let measured = Measured::on(source, arch, settings, &windows, observer)?;
    let mut publisher = Publisher::new(source, staging, plan, observer);
    observer.event(Event::Phase { name: "shard", steps: Some(settings.sharing.ranks as u64) });
    for (t, list) in lists.iter().enumerate() {
        let sharing = &settings.sharing;
        publisher
            .write(list, &mut RankLayers { source, arch, shape, sharing, measured: &measured, t, current: None })?;
        observer.event(Event::Step { done: t as u64 + 1, tokens: 0 });
    }
    publisher.side_files(Config::Kept { without: &[], with: &[] }, &[])?;
    let (transform, order) = rotation_of(source, &settings.sharing);
    let report = ShardReport {
        schema_version: SHARDS_SCHEMA,
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
        output: output.to_owned(),
        source: source.spec.clone(),
        source_fingerprint: publish::fingerprint(source),
        transform,
        order,
        settings: settings.clone(),
        kv_lora_rank: shape.kv_lora_rank,
        qk_rope_head_dim: shape.qk_rope_head_dim,
        cache_values_per_rank: shape.kv_lora_rank / settings.sharing.ranks + shape.qk_rope_head_dim,
        cache_values: arch.cache_values(),
        calibration_tokens: windows.iter().map(Vec::len).sum(),
        ranks: entries,
        held,
        sums: vec![
            "o_proj: the ranks' outputs are summed".to_owned(),
            "down_proj: the ranks' outputs are summed, where the intermediate width is shared out".to_owned(),
        ],
        layers: (0..arch.layers).map(|layer| measured.figures(layer, shape, &settings.sharing)).collect(),
    };
    publisher.report(&report, &|_| Vec::new())?;
    Ok(ShardReport { output: publisher.finish()?, ..report })
}

/// The files of all ranks.
struct RankFiles {
    /// Tensors of each rank, in the order in which they are written.
    lists: Vec<Vec<Emit<SlicedTensor>>>,
    plan: ShardPlan,
    /// What the report says of each.
    entries: Vec<RankEntry>,
    /// How tensors are held, by role.
    held: BTreeMap<String, Held>,
}

impl RankFiles {
    fn new(
        source: &ModelSource,
        arch: &Architecture,
        shape: &MlaShape,
        settings: &ShardSettings,
    ) -> Result<Self, ConvertError> {
        let sharing = &settings.sharing;
        let held = roles(arch, shape, sharing);
        let by_name: BTreeMap<String, Holding> = holdings(arch, shape, &held);
        let computed = settings.refit || sharing.logit_scale != 1.0;
        let list = |t| RankCuts { by_name: &by_name, sharing, rank: shape.kv_lora_rank, computed, t }.list(source);
        let lists: Vec<Vec<Emit<SlicedTensor>>> = (0..sharing.ranks).map(list).collect();
        let file = |(t, list): (usize, &Vec<Emit<SlicedTensor>>)| {
            let planned: Vec<PlannedTensor> = list.iter().map(|e| e.planned.clone()).collect();
            (format!("rank-{t}-of-{}.safetensors", sharing.ranks), planned)
        };
        let files: Vec<_> = lists.iter().enumerate().map(file).collect();
        let plan = ShardPlan::of_files(&files)?;
        let entries = plan.shards().iter().enumerate().map(|(t, s)| {
            let columns = sharing.columns(shape.kv_lora_rank, t);
            RankEntry {
                rank: t,
                file: s.file.clone(),
                latent_begin: columns.start,
                latent_end: columns.end,
                weight_bytes: s.data_bytes(),
            }
        });
        let entries = entries.collect();
        Ok(Self { lists, plan, entries, held })
    }
}

/// What was measured on calibration text.
#[derive(Default)]
struct Measured {
    /// Moments of latents, by layer; none without calibration.
    moments: Vec<LatentMoments>,
    /// What the ranks hold, by layer and rank, where they were fitted.
    refitted: Vec<Vec<RankTensors>>,
}

impl Measured {
    fn on(
        source: &ModelSource,
        arch: &Architecture,
        settings: &ShardSettings,
        windows: &[Vec<u32>],
        observer: &dyn Observer,
    ) -> Result<Self, ConvertError> {
        if !settings.calibrate && !settings.refit {
            return Ok(Self::default());
        }
        let device = Device::open(settings.device)?;
        let moments = latent_moments(source, arch, &device, windows, observer)?;
        let refitted = if settings.refit {
            let how = (Transform::None, &settings.sharing);
            refitted_ranks(source, arch, &device, (windows, &moments), how, observer)?
        } else {
            Vec::new()
        };
        Ok(Self { moments, refitted })
    }

    /// What the report says of `layer`.
    fn figures(&self, layer: usize, shape: &MlaShape, sharing: &Sharing) -> ShardedLayer {
        let rms_correction = match self.moments.get(layer) {
            Some(moments) if shape.latent_norm && !sharing.shared_rms => rms_corrections(moments, sharing.ranks),
            _ => vec![1.0; sharing.ranks],
        };
        ShardedLayer { layer, rms_correction, logit_scale: vec![sharing.logit_scale; sharing.ranks] }
    }
}

/// What rank `t` holds of the layers, made as its tensors are written.
struct RankLayers<'a> {
    source: &'a ModelSource,
    arch: &'a Architecture,
    shape: &'a MlaShape,
    sharing: &'a Sharing,
    measured: &'a Measured,
    /// The rank.
    t: usize,
    /// The layer that is being written.
    current: Option<(usize, RankTensors)>,
}

impl RankLayers<'_> {
    fn layer(&mut self, layer: usize) -> Result<&RankTensors, ConvertError> {
        let measured = self.measured;
        if let Some(fitted) = measured.refitted.get(layer).and_then(|ranks| ranks.get(self.t)) {
            return Ok(fitted);
        }
        let tensors = match self.current.take() {
            Some((at, tensors)) if at == layer => tensors,
            _ => {
                let weights = LatentWeights::load(self.source, self.arch, layer)?;
                weights.of_rank(self.shape, self.sharing, measured.moments.get(layer), self.t)
            }
        };
        Ok(&self.current.insert((layer, tensors)).1)
    }
}

impl Compute<SlicedTensor> for RankLayers<'_> {
    fn values(&mut self, key: &SlicedTensor) -> Result<Option<Cow<'_, [f64]>>, ConvertError> {
        let tensors = self.layer(key.layer)?;
        Ok(Some(match key.slice {
            Slice::Gain => tensors.gain.iter().map(|g| f64::from(*g)).collect(),
            Slice::KvB => tensors.kv_b.iter().map(|v| f64::from(*v)).collect(),
        }))
    }
}

/// Transform and order by the source's `rotation.json`.
fn rotation_of(source: &ModelSource, sharing: &Sharing) -> (String, String) {
    let path = source.dir.join(ROTATION_FILE);
    // A report takes some hundred bytes per layer.
    let small = fs_err::metadata(&path).is_ok_and(|m| m.is_file() && m.len() < 64 << 20);
    let bytes = small.then(|| fs_err::read(path).ok()).flatten();
    let report: serde_json::Value = bytes.and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default();
    let text = |v: &serde_json::Value| v.as_str().map(str::to_owned);
    let blocks = "slice t holds the t-th run of the latent's coordinates";
    (
        text(&report["settings"]["transform"]).unwrap_or_else(|| "none".to_owned()),
        match text(&report["order"]) {
            Some(order) if report["settings"]["slices"] == sharing.ranks => order,
            Some(order) => format!("{blocks}; turned for {} slices: {order}", report["settings"]["slices"]),
            None => blocks.to_owned(),
        },
    )
}
