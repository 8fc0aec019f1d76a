//! `shard`: one weight file per rank of a tensor-parallel group that shares the latents out (algorithms.md 2.4).

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::rotate::{ROTATION_FILE, copy, is_fp8, pretty, put, side_files};
use super::slicing::rms_corrections;
use super::statistics::{LatentMoments, latent_moments, latent_windows};
use super::weights::{LatentNames, check_slices, need_mla, refused};
use super::{LatentWeights, Sharing, Transform, refitted_ranks};
use crate::arch::{Architecture, MlaShape};
use crate::convert::{CalibrationSettings, ConvertError};
use crate::observe::{Event, Observer};
use crate::runtime::{Device, DeviceChoice, RankTensors};
use crate::source::{Dtype, DtypeExt, ModelSource, StoredTensor, TensorView};
use crate::write::{Leftover, PlannedTensor, ShardPlan, StagedWriter, Staging, StagingOptions};

/// Version of `tpla.json`.
pub const SHARDS_SCHEMA: u32 = 1;
/// What describes the ranks in a sharded folder.
pub const SHARDS_FILE: &str = "tpla.json";

/// What `shard` shall do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ShardSettings {
    /// How latents are shared out.
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

/// How a rank holds a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Held {
    /// All of it, on every rank.
    Whole,
    /// Rank 0 holds it, the others zeros of its shape: it is added to a sum over the ranks.
    FirstRank,
    /// A run of rows.
    Rows,
    /// A run of columns.
    Columns,
    /// The rows of the rank's slice of the latent, then those of the rotated key.
    LatentRows,
    /// The rank's slice of the norm's gain, times its correction.
    LatentGain,
    /// The columns of the rank's slice of the latent, those of keys times `logit_scale`, or fitted ones (`refit`).
    LatentColumns,
}

/// One rank.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RankEntry {
    /// Its number.
    pub rank: usize,
    /// Its weight file.
    pub file: String,
    /// First coordinate of its slice of the latent.
    pub latent_begin: usize,
    /// One past the last.
    pub latent_end: usize,
    /// Bytes of its weights.
    pub weight_bytes: u64,
}

/// Figures of one layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ShardedLayer {
    /// Layer index.
    pub layer: usize,
    /// Factor on each rank's gain (`a_t`), folded in; 1 where nothing was measured.
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
    /// What turned the latents, by the source's `rotation.json`; `none` where it has none.
    pub transform: String,
    /// Which directions belong to which slice.
    pub order: String,
    /// Settings.
    pub settings: ShardSettings,
    /// Latent width of the whole model.
    pub kv_lora_rank: usize,
    /// Rotated width, cached by every rank.
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

/// A tensor of one rank's file.
struct Piece {
    planned: PlannedTensor,
    cut: Cut,
}

enum Cut {
    Whole,
    Zeros,
    Rows(Vec<Range<usize>>),
    Columns(Range<usize>),
    /// Of the layer's [`RankTensors`].
    Gain(usize),
    KvB(usize),
}

/// Write `source` as one weight file per rank into the folder `output`: `rank-T-of-N.safetensors`, the source's
/// `config.json` and side files, and `tpla.json`. One folder, so that all ranks appear together, in one rename.
///
/// Attention is shared out by the latent (every rank runs all heads), MLPs and experts by their intermediate width as in
/// plain tensor parallelism; biases that are added behind a sum are on rank 0 alone. Everything else is whole on every rank.
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
    let (rank, sharing) = (shape.kv_lora_rank, settings.sharing);
    check_slices(rank, sharing.ranks)?;
    if is_fp8(source) {
        return Err(refused(
            "the source is FP8: slices of its weights do not begin where the blocks of its scales do",
            "`gqa2mla rotate` writes such a model in bf16; shard that",
        ));
    }
    let calibrated = settings.calibrate || settings.refit;
    let windows = match calibrated {
        true => latent_windows(source, arch, &settings.calibration, rank)?,
        false => Vec::new(),
    };
    let held = roles(arch, shape, &sharing);
    let files: Vec<(String, Vec<Piece>)> = (0..sharing.ranks)
        .map(|t| {
            (format!("rank-{t}-of-{}.safetensors", sharing.ranks), pieces(source, arch, shape, settings, &held, t))
        })
        .collect();
    let planned: Vec<(String, Vec<PlannedTensor>)> =
        files.iter().map(|(f, p)| (f.clone(), p.iter().map(|p| p.planned.clone()).collect())).collect();
    let plan = ShardPlan::of_files(&planned)?;
    let options = StagingOptions {
        overwrite: settings.overwrite,
        source: Some(source.dir.clone()),
        needed_bytes: plan.file_bytes(),
        leftover: Leftover::Refuse,
    };
    let ranks = plan.shards().iter().enumerate().map(|(t, s)| {
        let columns = sharing.columns(rank, t);
        RankEntry {
            rank: t,
            file: s.file.clone(),
            latent_begin: columns.start,
            latent_end: columns.end,
            weight_bytes: s.data_bytes(),
        }
    });
    let ranks: Vec<RankEntry> = ranks.collect();
    let staging = Staging::create(output, &options)?;
    let (mut moments, mut refitted) = (None, None);
    if calibrated {
        let device = Device::open(settings.device)?;
        let found = latent_moments(source, arch, &device, &windows, observer)?;
        if settings.refit {
            let how = (Transform::None, &sharing);
            refitted = Some(refitted_ranks(source, arch, &device, (&windows, &found), how, observer)?);
        }
        moments = Some(found);
    }
    let mut writer = StagedWriter::new(staging, plan);
    observer.event(Event::Phase { name: "shard", steps: Some(sharing.ranks as u64) });
    for (t, (_, pieces)) in files.iter().enumerate() {
        let mut own = OfRank {
            source,
            arch,
            shape,
            sharing: &sharing,
            moments: moments.as_deref(),
            t,
            at: None,
            refitted: refitted.as_deref(),
        };
        for piece in pieces {
            write_piece(piece, &mut own, &mut writer)?;
            observer.event(Event::Written { tensor: piece.planned.name.clone() });
        }
        observer.event(Event::Step { done: t as u64 + 1, tokens: 0 });
    }
    source.check_unchanged()?;
    side_files(source, false, &mut writer)?;
    let (transform, order) = rotation_of(source, &sharing);
    let layers = (0..arch.layers).map(|layer| ShardedLayer {
        layer,
        rms_correction: match moments.as_ref() {
            Some(m) if shape.latent_norm && !sharing.shared_rms => rms_corrections(&m[layer], sharing.ranks),
            _ => vec![1.0; sharing.ranks],
        },
        logit_scale: vec![sharing.logit_scale; sharing.ranks],
    });
    let report = ShardReport {
        schema_version: SHARDS_SCHEMA,
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
        output: output.to_owned(),
        source: source.spec.clone(),
        source_fingerprint: source.fingerprint().into_iter().map(|f| (f.file, f.header_sha256)).collect(),
        transform,
        order,
        settings: settings.clone(),
        kv_lora_rank: rank,
        qk_rope_head_dim: shape.qk_rope_head_dim,
        cache_values_per_rank: rank / sharing.ranks + shape.qk_rope_head_dim,
        cache_values: arch.cache_values(),
        calibration_tokens: windows.iter().map(Vec::len).sum(),
        ranks,
        held,
        sums: vec![
            "o_proj: the ranks' outputs are summed".to_owned(),
            "down_proj: the ranks' outputs are summed, where the intermediate width is shared out".to_owned(),
        ],
        layers: layers.collect(),
    };
    let mut document = serde_json::to_value(&report).unwrap_or_default();
    if let Some(map) = document.as_object_mut() {
        map.remove("output");
    }
    writer.write_file(SHARDS_FILE, &pretty(&document))?;
    let published = writer.finish()?;
    if let Some(left) = published.left_behind {
        observer.event(Event::Warning(format!("could not be removed: {}", left.display())));
    }
    Ok(ShardReport { output: published.path, ..report })
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

/// How the linear layers and norms are held that are not whole on every rank, by role and by what of them.
fn roles(arch: &Architecture, shape: &MlaShape, sharing: &Sharing) -> BTreeMap<String, Held> {
    let mut out = BTreeMap::new();
    let mut hold = |role: &str, held: Held| out.insert(role.to_owned(), held);
    hold("kv_b.weight", Held::LatentColumns);
    if !sharing.shared_rms || !shape.latent_norm {
        hold("kv_a.weight", Held::LatentRows);
        hold("kv_a.bias", Held::LatentRows);
        hold("kv_a_norm", Held::LatentGain);
    }
    hold("o.bias", Held::FirstRank);
    let shared_out = |width: usize| width.is_multiple_of(sharing.ranks);
    let mut mlp = |[gate, up, down]: [&str; 3], width: usize| {
        if shared_out(width) {
            hold(&format!("{gate}.weight"), Held::Rows);
            hold(&format!("{up}.weight"), Held::Rows);
            hold(&format!("{gate}.bias"), Held::Rows);
            hold(&format!("{up}.bias"), Held::Rows);
            hold(&format!("{down}.weight"), Held::Columns);
            hold(&format!("{down}.bias"), Held::FirstRank);
        }
    };
    mlp(["gate", "up", "down"], arch.intermediate);
    if let Some(moe) = &arch.moe {
        mlp(["expert_gate", "expert_up", "expert_down"], moe.width);
        if let Some(width) = moe.shared_width {
            mlp(["shared_gate", "shared_up", "shared_down"], width);
        }
    }
    out
}

/// The tensors of rank `t`, those of wide dtypes first, so that none begins askew.
fn pieces(
    source: &ModelSource,
    arch: &Architecture,
    shape: &MlaShape,
    settings: &ShardSettings,
    held: &BTreeMap<String, Held>,
    t: usize,
) -> Vec<Piece> {
    let sharing = &settings.sharing;
    let mut by_name: BTreeMap<String, (Held, usize)> = BTreeMap::new();
    for layer in 0..arch.layers {
        let names = arch.names.layer(layer);
        let latent = LatentNames::of(arch, shape, layer);
        for (role, held) in held {
            let own: Vec<String> = match role.as_str() {
                "kv_b.weight" => vec![latent.kv_b.clone()],
                "kv_a.weight" => vec![latent.kv_a.clone()],
                "kv_a.bias" => latent.bias.clone().into_iter().collect(),
                "kv_a_norm" => latent.gain.clone().into_iter().collect(),
                _ => {
                    let Some((stem, what)) = role.split_once('.') else { continue };
                    let experts = arch.moe.as_ref().filter(|_| arch.is_sparse(layer)).map_or(0, |m| m.experts);
                    match stem.starts_with("expert_") {
                        true => (0..experts).map(|e| format!("{}.{what}", names.expert(stem, e))).collect(),
                        false if names.has(stem) => vec![format!("{}.{what}", names.role(stem))],
                        false => Vec::new(),
                    }
                }
            };
            by_name.extend(own.into_iter().map(|name| (name, (*held, layer))));
        }
    }
    let rank = shape.kv_lora_rank;
    let run = |n: usize| n / sharing.ranks * t..n / sharing.ranks * (t + 1);
    let piece = |(name, info): (&str, &StoredTensor)| {
        let (mut shape_of, mut dtype) = (info.shape.clone(), info.dtype);
        let rows = shape_of.first().copied().unwrap_or(0);
        let cut = match by_name.get(name) {
            None | Some((Held::Whole, _)) => Cut::Whole,
            Some((Held::FirstRank, _)) => {
                if t == 0 {
                    Cut::Whole
                } else {
                    Cut::Zeros
                }
            }
            Some((Held::Rows, _)) => {
                shape_of[0] = rows / sharing.ranks;
                Cut::Rows(vec![run(rows)])
            }
            Some((Held::Columns, _)) => {
                let columns = shape_of.get(1).copied().unwrap_or(0);
                shape_of[1] = columns / sharing.ranks;
                Cut::Columns(run(columns))
            }
            Some((Held::LatentRows, _)) => {
                shape_of[0] = rank / sharing.ranks + rows - rank;
                Cut::Rows(vec![sharing.columns(rank, t), rank..rows])
            }
            Some((Held::LatentGain, layer)) => {
                (shape_of[0], dtype) = (rank / sharing.ranks, Dtype::F32);
                Cut::Gain(*layer)
            }
            Some((Held::LatentColumns, layer)) => {
                shape_of[1] = rank / sharing.ranks;
                match sharing.logit_scale == 1.0 && !settings.refit {
                    true => Cut::Columns(sharing.columns(rank, t)),
                    false => {
                        dtype = Dtype::F32;
                        Cut::KvB(*layer)
                    }
                }
            }
        };
        Piece { planned: PlannedTensor { name: name.to_owned(), dtype, shape: shape_of }, cut }
    };
    let mut out: Vec<Piece> = source.tensors.in_file_order().map(piece).collect();
    out.sort_by_key(|p| std::cmp::Reverse(p.planned.dtype.byte_size()));
    out
}

/// What one rank holds of the layer at work.
struct OfRank<'a> {
    source: &'a ModelSource,
    arch: &'a Architecture,
    shape: &'a MlaShape,
    sharing: &'a Sharing,
    /// By layer.
    moments: Option<&'a [LatentMoments]>,
    /// The rank.
    t: usize,
    at: Option<(usize, RankTensors)>,
    /// By layer and rank, where they were fitted.
    refitted: Option<&'a [Vec<RankTensors>]>,
}

impl OfRank<'_> {
    fn layer(&mut self, layer: usize) -> Result<&RankTensors, ConvertError> {
        if let Some(fitted) = self.refitted.and_then(|r| r.get(layer)?.get(self.t)) {
            return Ok(&self.at.insert((layer, fitted.clone())).1);
        }
        let tensors = match self.at.take() {
            Some((at, tensors)) if at == layer => tensors,
            _ => {
                let weights = LatentWeights::load(self.source, self.arch, layer)?;
                weights.of_rank(self.shape, self.sharing, self.moments.map(|m| &m[layer]), self.t)
            }
        };
        Ok(&self.at.insert((layer, tensors)).1)
    }
}

fn write_piece(piece: &Piece, own: &mut OfRank<'_>, writer: &mut StagedWriter) -> Result<(), ConvertError> {
    let (Piece { planned, cut }, source) = (piece, own.source);
    let name = &planned.name;
    match cut {
        Cut::Whole => copy(source, name, writer),
        Cut::Zeros => {
            let bytes = planned.shape.iter().product::<usize>() * planned.dtype.byte_size();
            Ok(writer.write_tensor(name, &vec![0; bytes])?)
        }
        Cut::Rows(runs) => {
            let mut bytes = Vec::new();
            for rows in runs {
                bytes.extend_from_slice(&source.tensors.rows(name, Some(rows.clone()))?.bytes);
            }
            let dtype = source.tensors.get(name).map_or(planned.dtype, |t| t.dtype);
            Ok(writer.write_view(name, &TensorView { name, dtype, shape: &planned.shape, bytes: bytes.into() })?)
        }
        Cut::Columns(columns) => {
            let view = source.tensors.view(name)?;
            let size = view.dtype.byte_size();
            let width = view.shape.get(1).copied().unwrap_or(0) * size;
            let (from, to) = (columns.start * size, columns.end * size);
            let bytes: Vec<u8> =
                view.bytes.chunks_exact(width.max(1)).flat_map(|row| &row[from..to]).copied().collect();
            let shape = [view.shape.first().copied().unwrap_or(0), columns.len()];
            Ok(writer.write_view(name, &TensorView { name, dtype: view.dtype, shape: &shape, bytes: bytes.into() })?)
        }
        Cut::Gain(layer) => {
            let values: Vec<f64> = own.layer(*layer)?.gain.iter().map(|g| f64::from(*g)).collect();
            put(writer, planned, &values)
        }
        Cut::KvB(layer) => {
            let values: Vec<f64> = own.layer(*layer)?.kv_b.iter().map(|v| f64::from(*v)).collect();
            put(writer, planned, &values)
        }
    }
}
