//! Decoding with the prompt's cache compressed across layers: xKV (arXiv 2503.18893).
//!
//! Singular subspaces of the caches of neighbouring layers are alike ([`crate::analyze`]). So after an exact prefill, groups
//! of `G` layers keep of the prompt, in place of `X = [X_1 | ... | X_G]` (keys before RoPE; values by themselves; of MLA the
//! latents before their norm), one left factor `A [P, r]` and a right factor `B_i [r, w]` per layer, the best approximation
//! of rank `r` for this prompt. Only the factors stay allocated: no layer's cache of the prompt outlives its group. When
//! attention needs keys and values, they are reconstructed tile by tile, then rotated (normed). Tokens after the prompt are
//! cached as they are, and so is MLA's shared rotated key.
//!
//! The published code (abdelfattah-lab/xKV) puts the reconstructed matrices back into a cache of full size; here the bytes
//! are really not there. On the processor only.

mod cache;
mod error;
mod session;

use std::str::FromStr;

use serde::Serialize;

pub(crate) use cache::GroupCache;
pub use error::XkvError;
pub use session::XkvSession;

use crate::arch::{Architecture, Attention};

/// How a prompt's cache is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct XkvSettings {
    /// Rank of a group's keys, or latents.
    pub rank_k: usize,
    /// Rank of a group's values; MLA does not use it.
    pub rank_v: usize,
    /// Layers per group. What is left at the end is a group by itself, its ranks cut to what it can have.
    pub group: usize,
}

impl FromStr for XkvSettings {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let parts: Vec<usize> = s.split(',').map(|p| p.trim().parse().unwrap_or(usize::MAX)).collect();
        match parts[..] {
            [rank_k, rank_v, group] if parts.iter().all(|n| *n < 1 << 31) => Ok(Self { rank_k, rank_v, group }),
            _ => Err("expected three integers RANK_K,RANK_V,LAYERS, such as 256,384,4".to_owned()),
        }
    }
}

impl XkvSettings {
    /// Whether a model can have such groups, and a prompt of `tokens` such ranks.
    ///
    /// # Errors
    /// [`XkvError::Group`], [`XkvError::Rank`].
    pub fn check(&self, arch: &Architecture, tokens: usize) -> Result<(), XkvError> {
        let layers = arch.layers;
        if arch.hybrid.is_some() {
            return Err(XkvError::Hybrid);
        }
        if self.group == 0 || self.group > layers {
            return Err(XkvError::Group { group: self.group, layers });
        }
        let (keys, values) = match &arch.attention {
            Attention::Gqa(a) => (a.kv_heads * a.head_dim, Some(a.kv_heads * a.head_dim)),
            Attention::Mla(a) => (a.kv_lora_rank, None),
        };
        let check = |what: &'static str, rank: usize, width: usize| {
            let max = tokens.min(self.group * width);
            if rank == 0 || rank > max {
                return Err(XkvError::Rank { what, rank, tokens, group: self.group, width });
            }
            Ok(())
        };
        check("rank_k", self.rank_k, keys)?;
        values.map_or(Ok(()), |width| check("rank_v", self.rank_v, width))
    }
}

/// Bytes of the caches of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct XkvBytes {
    /// Allocated for the factors, and for MLA's shared rotated keys.
    pub compressed: usize,
    /// Allocated for the exact caches of the same tokens before they were dropped.
    pub exact: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_three_integers() {
        assert_eq!("256,384,4".parse(), Ok(XkvSettings { rank_k: 256, rank_v: 384, group: 4 }));
        for bad in ["", "1,2", "1,2,3,4", "a,2,3", "-1,2,3", "1,2,99999999999999999999", "1.5,2,3"] {
            assert!(bad.parse::<XkvSettings>().is_err(), "{bad}");
        }
    }
}
