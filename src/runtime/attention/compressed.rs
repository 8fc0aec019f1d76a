//! Decoding over a prompt whose keys and values are kept as low-rank factors.

use std::ops::Range;

use ndarray::{Array2, Axis, concatenate, s};

use super::{AttentionBlock, Cache, Kind};
use crate::runtime::cpu::{TiledAttention, product};
use crate::runtime::{Backend, Cpu, HeadColumns, Rotation, RuntimeError};

/// Prompt rows that are reconstructed at a time.
const TILE: usize = 256;

/// `left right^T`, one row per token.
#[derive(Clone, Copy)]
pub(in crate::runtime) struct Factored<'a> {
    /// `[P, r]`.
    pub left: &'a Array2<f32>,
    /// `[w, r]`.
    pub right: &'a Array2<f32>,
}

impl Factored<'_> {
    fn rows(&self, rows: Range<usize>) -> Array2<f32> {
        product(self.left.slice(s![rows, ..]), self.right.view())
    }
}

/// What is kept of a prompt's tokens in one layer: [`super::RawKv`] by factors.
#[derive(Clone, Copy)]
pub(in crate::runtime) struct CompressedPrompt<'a> {
    /// Keys before RoPE, or latents before their norm.
    pub keys: Factored<'a>,
    /// Values of GQA.
    pub values: Option<Factored<'a>>,
    /// Shared key of MLA, rotated, `[P, d_R]`.
    pub rope_key: Option<&'a Array2<f32>>,
}

impl CompressedPrompt<'_> {
    fn tokens(&self) -> usize {
        self.keys.left.nrows()
    }

    fn tiles(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        tiles(self.tokens())
    }
}

fn tiles(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(TILE).map(move |first| first..rows.min(first + TILE))
}

impl AttentionBlock<Cpu> {
    /// As [`AttentionBlock::decode`] for rows at `positions` of one sequence, after a compressed prompt: rows from position
    /// `P` on are in `tail`, the new ones are appended to it. Keys of the prompt are reconstructed tile by tile, then
    /// rotated (latents: normed). `rotation` covers every position from 0 on.
    pub(in crate::runtime) fn decode_compressed(
        &self,
        x: &Array2<f32>,
        prompt: &CompressedPrompt<'_>,
        tail: &mut Cache<Array2<f32>>,
        (rotation, positions): (&Rotation, Range<usize>),
    ) -> Result<Array2<f32>, RuntimeError> {
        let held = prompt.tokens();
        let slots: Vec<usize> = (positions.start - held..positions.end - held).collect();
        let (first, behind) = (positions.start, positions.end - held);
        let positions: Vec<usize> = positions.collect();
        match (&self.kind, tail) {
            (Kind::Gqa(a), Cache::Gqa { k, v }) => {
                let new = a.expand(&Cpu, x, rotation, &positions)?;
                Cpu.write_rows(k, &slots, &new.k);
                Cpu.write_rows(v, &slots, &new.v);
                let Some(values) = prompt.values else {
                    return Err(RuntimeError::Variant { expected: "gqa", found: "mla" });
                };
                let turned = HeadColumns { width: a.shape.rotary_dim, ..HeadColumns::dense(a.shape.head_dim) };
                let mut attention = TiledAttention::new(new.q.view(), &new.shape, self.cap, first);
                for tile in prompt.tiles() {
                    let mut keys = prompt.keys.rows(tile.clone());
                    let places: Vec<usize> = tile.clone().collect();
                    Cpu.rope(&mut keys, rotation, &places, turned, a.shape.kv_heads);
                    attention.add(tile.start, keys.view(), values.rows(tile).view());
                }
                for tile in tiles(behind) {
                    let rows = s![tile.clone(), ..];
                    attention.add(held + tile.start, k.slice(rows), v.slice(rows));
                }
                Ok(attention.finish())
            }
            (Kind::Mla(a), Cache::Mla(rows)) => {
                let latent = a.latent(&Cpu, x, rotation, &positions)?;
                Cpu.write_rows(rows, &slots, &latent);
                let q = a.queries(&Cpu, x, rotation, &positions)?;
                let Some(rope_key) = prompt.rope_key else {
                    return Err(RuntimeError::Variant { expected: "mla", found: "gqa" });
                };
                let (q, shape) = a.absorb(&Cpu, &q);
                let mut attention = TiledAttention::new(q.view(), &shape, self.cap, first);
                for tile in prompt.tiles() {
                    let mut latent = prompt.keys.rows(tile.clone());
                    if let Some(gain) = &a.kv_a_norm {
                        latent = Cpu.rms_norm(&latent, gain, a.shape.latent_eps);
                    }
                    let key = rope_key.slice(s![tile.clone(), ..]);
                    let both = concatenate(Axis(1), &[latent.view(), key])
                        .map_err(|_| RuntimeError::Width { expected: latent.nrows(), found: key.nrows() })?;
                    attention.add(tile.start, both.view(), both.view());
                }
                for tile in tiles(behind) {
                    let part = rows.slice(s![tile.clone(), ..]);
                    attention.add(held + tile.start, part, part);
                }
                Ok(a.unabsorb(&Cpu, &attention.finish()))
            }
            (Kind::Gqa(_), _) => Err(RuntimeError::Variant { expected: "gqa", found: "mla" }),
            (Kind::Mla(_), _) => Err(RuntimeError::Variant { expected: "mla", found: "gqa" }),
        }
    }
}
