//! The options of caches compressed across layers.

use clap::Args;
use gqa2mla::arch::Architecture;
use gqa2mla::observe::{Event, Observer};
use gqa2mla::runtime::{XkvBytes, XkvSettings};

use super::Context;

/// Compression of the prompt's cache.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Compressed prompt (xKV)")]
pub struct XkvOption {
    /// Keep the prompt's cache as factors of rank RANK_K (keys, or latents) and RANK_V (values; MLA has none) that groups
    /// of LAYERS share, as xKV does: `256,384,4`; on the CPU only
    #[arg(long, value_name = "RANK_K,RANK_V,LAYERS")]
    pub xkv: Option<XkvSettings>,
}

/// Name of the option.
pub const OPTION: &str = "--xkv";

/// Say what the user should know of these settings.
pub fn notes(settings: &XkvSettings, arch: &Architecture, context: &Context) {
    if arch.mla().is_some() && settings.rank_v != 0 {
        let text = format!(
            "MLA caches one latent for keys and values: the second number of {OPTION}, {}, is not used",
            settings.rank_v
        );
        context.progress.event(Event::Note(text));
    }
}

/// Warn where nothing is saved.
pub fn judge(bytes: XkvBytes, context: &Context) {
    if bytes.compressed >= bytes.exact {
        let text = "the factors take no less than the cache they replace: lower the ranks, or give a longer prompt";
        context.progress.event(Event::Warning(text.to_owned()));
    }
}
