//! Which part of every tensor a rank holds.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::Serialize;

use super::Sharing;
use super::weights::LatentNames;
use crate::arch::{Architecture, MlaShape};
use crate::source::{Dtype, DtypeExt, ModelSource, StoredTensor};
use crate::target::{Cut, Emit, Origin};
use crate::write::PlannedTensor;

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
    /// The rows of the rank's slice of the latent, then those of the RoPE key.
    LatentRows,
    /// The rank's slice of the norm's gain, times its correction.
    LatentGain,
    /// The columns of the rank's slice of the latent, those of keys times `logit_scale`, or fitted ones (`refit`).
    LatentColumns,
}

/// How the linear layers and norms are held that are not whole on every rank, by role and by which of their tensors.
pub(super) fn roles(arch: &Architecture, shape: &MlaShape, sharing: &Sharing) -> BTreeMap<String, Held> {
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

/// How a tensor is held, and of which layer it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Holding {
    held: Held,
    layer: usize,
}

/// The tensors that are not whole on every rank, by name. `held` is what [`roles`] gives.
pub(super) fn holdings(
    arch: &Architecture,
    shape: &MlaShape,
    held: &BTreeMap<String, Held>,
) -> BTreeMap<String, Holding> {
    let mut out = BTreeMap::new();
    for layer in 0..arch.layers {
        for (role, held) in held {
            let names = names_of_role(arch, shape, layer, role);
            out.extend(names.into_iter().map(|name| (name, Holding { held: *held, layer })));
        }
    }
    out
}

/// Names of the tensors of `layer` that a key of [`roles`] stands for; those of routed experts are many.
fn names_of_role(arch: &Architecture, shape: &MlaShape, layer: usize, role: &str) -> Vec<String> {
    let names = arch.names.layer(layer);
    let latent = LatentNames::of(arch, shape, layer);
    match role {
        "kv_b.weight" => return vec![latent.kv_b],
        "kv_a.weight" => return vec![latent.kv_a],
        "kv_a.bias" => return latent.bias.into_iter().collect(),
        "kv_a_norm" => return latent.gain.into_iter().collect(),
        _ => {}
    }
    let Some((stem, what)) = role.split_once('.') else { return Vec::new() };
    let experts = arch.moe.as_ref().filter(|_| arch.is_sparse(layer)).map_or(0, |m| m.experts);
    match stem.starts_with("expert_") {
        true => (0..experts).map(|e| format!("{}.{what}", names.expert(stem, e))).collect(),
        false if names.has(stem) => vec![format!("{}.{what}", names.role(stem))],
        false => Vec::new(),
    }
}

/// A tensor of one rank that is computed from the weights around the latent of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SlicedTensor {
    pub layer: usize,
    pub slice: Slice,
}

/// Which of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slice {
    /// The slice of the norm's gain, corrected.
    Gain,
    /// The columns of `kv_b_proj`, scaled or fitted.
    KvB,
}

/// What rank `t` writes.
pub(super) struct RankCuts<'a> {
    /// Tensors that are not whole on every rank.
    pub by_name: &'a BTreeMap<String, Holding>,
    pub sharing: &'a Sharing,
    /// Latent width of the whole model.
    pub rank: usize,
    /// Whether `kv_b_proj` is scaled or fitted, and not just cut.
    pub computed: bool,
    /// The rank.
    pub t: usize,
}

impl RankCuts<'_> {
    /// The tensors of the rank, widest dtypes first, so that every one is aligned.
    pub fn list(&self, source: &ModelSource) -> Vec<Emit<SlicedTensor>> {
        let emit = |(name, info): (&str, &StoredTensor)| self.emit(name, info);
        let mut out: Vec<Emit<SlicedTensor>> = source.tensors.in_file_order().map(emit).collect();
        out.sort_by_key(|e| std::cmp::Reverse(e.planned.dtype.byte_size()));
        out
    }

    fn emit(&self, name: &str, info: &StoredTensor) -> Emit<SlicedTensor> {
        let Self { sharing, rank, t, .. } = *self;
        let (mut shape, mut dtype) = (info.shape.clone(), info.dtype);
        let size = |axis: usize| info.shape.get(axis).copied().unwrap_or(0);
        let stored = |cut: Cut| Origin::Stored { name: name.to_owned(), cut };
        // The dimension that is cut, and what is left of it.
        let mut cut = |axis: usize, left: usize| shape.iter_mut().skip(axis).take(1).for_each(|n| *n = left);
        let from = match self.by_name.get(name) {
            None | Some(Holding { held: Held::Whole, .. }) => stored(Cut::Whole),
            Some(Holding { held: Held::FirstRank, .. }) if t == 0 => stored(Cut::Whole),
            Some(Holding { held: Held::FirstRank, .. }) => Origin::Zero,
            Some(Holding { held: Held::Rows, .. }) => {
                cut(0, size(0) / sharing.ranks);
                stored(Cut::Rows(vec![self.run(size(0))]))
            }
            Some(Holding { held: Held::Columns, .. }) => {
                cut(1, size(1) / sharing.ranks);
                stored(Cut::Columns(self.run(size(1))))
            }
            Some(Holding { held: Held::LatentRows, .. }) => {
                cut(0, rank / sharing.ranks + size(0) - rank);
                stored(Cut::Rows(vec![sharing.columns(rank, t), rank..size(0)]))
            }
            Some(Holding { held: Held::LatentGain, layer }) => {
                cut(0, rank / sharing.ranks);
                dtype = Dtype::F32;
                Origin::Computed(SlicedTensor { layer: *layer, slice: Slice::Gain })
            }
            Some(Holding { held: Held::LatentColumns, layer }) => {
                cut(1, rank / sharing.ranks);
                if self.computed {
                    dtype = Dtype::F32;
                    Origin::Computed(SlicedTensor { layer: *layer, slice: Slice::KvB })
                } else {
                    stored(Cut::Columns(sharing.columns(rank, t)))
                }
            }
        };
        Emit { planned: PlannedTensor { name: name.to_owned(), dtype, shape }, from }
    }

    /// The rank's share of `n` rows or columns.
    fn run(&self, n: usize) -> Range<usize> {
        let width = n / self.sharing.ranks;
        width * self.t..width * (self.t + 1)
    }
}
