//! The compressed caches of one group of layers.

use ndarray::{Array2, ArrayView2};

use super::{XkvError, XkvSettings};
use crate::factor::shared::{SharedFactors, shared_factors};
use crate::runtime::attention::{Cache, CompressedPrompt, Factored};
use crate::runtime::{Backend, Cpu, HeadColumns, Layer, RawKv, Rotation, RuntimeError};

/// What a group of layers keeps of one sequence.
pub(crate) struct GroupCache {
    keys: SharedFactors,
    values: Option<SharedFactors>,
    /// Shared keys of MLA, rotated, one `[P, d_R]` per layer.
    rope_keys: Vec<Array2<f32>>,
    /// Exact rows of the tokens after the prompt, one cache per layer.
    tails: Vec<Cache<Array2<f32>>>,
}

impl std::fmt::Debug for GroupCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GroupCache").field("layers", &self.tails.len()).finish()
    }
}

impl GroupCache {
    /// Compress the prompt's rows in layers `first ..`, position 0 on, and make room for `capacity` tokens after it.
    pub(crate) fn new(
        first: usize,
        raws: Vec<RawKv>,
        layers: &[&Layer<'_, Cpu>],
        settings: &XkvSettings,
        rotation: &Rotation,
        capacity: usize,
    ) -> Result<Self, RuntimeError> {
        let failed = |error| XkvError::Factor { first, last: first + layers.len() - 1, error };
        let factors = |parts: Vec<ArrayView2<'_, f32>>, rank: usize, what: &'static str| {
            let rows = parts.first().map_or(0, |p| p.nrows());
            let columns: usize = parts.iter().map(|p| p.ncols()).sum();
            // Of a whole group the ranks were checked; one left at the end may have less.
            shared_factors(&parts, rank.min(rows).min(columns), what).map_err(failed)
        };
        let keys = factors(raws.iter().map(|r| r.keys.view()).collect(), settings.rank_k, "keys")?;
        let values: Vec<_> = raws.iter().filter_map(|r| Some(r.values.as_ref()?.view())).collect();
        let values = match values.is_empty() {
            true => None,
            false => Some(factors(values, settings.rank_v, "values")?),
        };
        let turned = |mut key: Array2<f32>| {
            let positions: Vec<usize> = (0..key.nrows()).collect();
            let columns = HeadColumns::dense(key.ncols());
            Cpu.rope(&mut key, rotation, &positions, columns, 1);
            key
        };
        let rope_keys = raws.into_iter().filter_map(|r| r.rope_key).map(turned).collect();
        let tails = layers.iter().map(|layer| layer.cache(capacity)).collect();
        Ok(Self { keys, values, rope_keys, tails })
    }

    /// Layer `index` of the group on rows at `positions`, in place.
    pub(crate) fn decode(
        &mut self,
        index: usize,
        layer: &Layer<'_, Cpu>,
        x: &mut Array2<f32>,
        at: (&Rotation, std::ops::Range<usize>),
    ) -> Result<(), RuntimeError> {
        let prompt = CompressedPrompt {
            keys: Factored { left: &self.keys.left, right: &self.keys.right[index] },
            values: self.values.as_ref().map(|v| Factored { left: &v.left, right: &v.right[index] }),
            rope_key: self.rope_keys.get(index),
        };
        layer.decode_compressed(x, &prompt, &mut self.tails[index], at)
    }

    /// Bytes allocated for the prompt.
    pub(crate) fn prompt_bytes(&self) -> usize {
        let factors = [Some(&self.keys), self.values.as_ref()];
        let matrices = factors.into_iter().flatten().flat_map(|f| std::iter::once(&f.left).chain(&f.right));
        matrices.chain(&self.rope_keys).map(|m| m.len() * size_of::<f32>()).sum()
    }

    /// Bytes allocated for the tokens after it.
    pub(crate) fn tail_bytes(&self) -> usize {
        self.tails.iter().map(|tail| tail.bytes(&Cpu)).sum()
    }
}
