//! Options of the methods that factorise weights, and of hybrid models.

use anyhow::bail;
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use gqa2mla::convert::{Method, MlaLayers, WeightSettings};
use gqa2mla::methods::mha2mla::SvdKind;
use gqa2mla::methods::partial_rope::PartialRope;

use super::values;

fn partial_rope() -> impl TypedValueParser<Value = PartialRope> {
    PossibleValuesParser::new(PartialRope::ALL.map(PartialRope::name))
        .map(|s| PartialRope::ALL.into_iter().find(|p| p.name() == s).unwrap_or(PartialRope::High))
}

fn svd() -> impl TypedValueParser<Value = SvdKind> {
    PossibleValuesParser::new(SvdKind::ALL.map(SvdKind::name))
        .map(|s| SvdKind::ALL.into_iter().find(|k| k.name() == s).unwrap_or(SvdKind::Joint))
}

/// Options of x-ecomla and mha2mla, as typed.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Weight factorisation and hybrids")]
pub struct WeightOptions {
    /// x-ecomla: rank of each layer's queries by share of their energy, above 0 and at most 1 [default: 0.99]
    #[arg(long, value_name = "SHARE", value_parser = values::energy)]
    q_energy: Option<f64>,
    /// x-ecomla: rank of each layer's keys and values by share of their energy, above 0 and at most 1
    #[arg(long, value_name = "SHARE", value_parser = values::energy)]
    kv_energy: Option<f64>,
    /// x-ecomla: round ranks by energy up to multiples of this [default: 8]
    #[arg(long, value_name = "N", value_parser = values::positive)]
    rank_divisor: Option<usize>,
    /// x-ecomla, mha2mla: pairs of a head that keep RoPE [default: uniform for x-ecomla, high for mha2mla]
    #[arg(long, value_name = "RULE", value_parser = partial_rope())]
    partial_rope: Option<PartialRope>,
    /// mha2mla: decompose keys and values together, or each by themselves [default: joint]
    #[arg(long, value_name = "KIND", value_parser = svd())]
    svd: Option<SvdKind>,
    /// x-ecomla: rows and frequencies as the published code has them, for comparison
    #[arg(long)]
    published_layout: bool,
    /// Layers that become MLA, such as `0,3-7`; `auto:N` or `auto:N%` takes those that conversion changes least, `auto`
    /// half of them. The others keep their attention. Written for hf-remote [default: all]
    #[arg(long, value_name = "LIST|auto")]
    mla_layers: Option<MlaLayers>,
}

impl WeightOptions {
    /// Layers that become MLA.
    pub fn mla_layers(&self) -> Option<MlaLayers> {
        self.mla_layers.clone()
    }

    /// Check the options against the method.
    ///
    /// # Errors
    /// Options that the method would ignore, or that contradict each other.
    pub fn settings(&self, method: Method, widths: [bool; 2]) -> anyhow::Result<WeightSettings> {
        let x_ecomla = method == Method::XEcomla;
        let mha2mla = method == Method::Mha2mla;
        let ignored = [
            (self.q_energy.is_some() && !x_ecomla, "--q-energy", "--method x-ecomla"),
            (self.kv_energy.is_some() && !x_ecomla, "--kv-energy", "--method x-ecomla"),
            (self.rank_divisor.is_some() && !x_ecomla, "--rank-divisor", "--method x-ecomla"),
            (self.published_layout && !x_ecomla, "--published-layout", "--method x-ecomla"),
            (self.partial_rope.is_some() && !method.from_weights(), "--partial-rope", "--method x-ecomla or mha2mla"),
            (self.svd.is_some() && !mha2mla, "--svd", "--method mha2mla"),
            (self.mla_layers.is_some() && method == Method::Exact, "--mla-layers", "a method that compresses"),
        ];
        if let Some((_, option, wants)) = ignored.iter().find(|i| i.0) {
            bail!("--method {method} takes no {option}\n\nhint: leave the option out, or use {wants}");
        }
        if self.published_layout && self.partial_rope.is_some() {
            bail!("--published-layout chooses no pairs\n\nhint: leave --partial-rope out, or --published-layout");
        }
        let [kv_width, q_width] = widths;
        for (energy, name, fixed, width) in [
            (self.kv_energy, "--kv-energy", kv_width, "--kv-lora-rank or --kv-budget"),
            (self.q_energy, "--q-energy", q_width, "--q-lora-rank"),
        ] {
            if energy.is_some() && fixed {
                bail!("{name} finds the ranks, {width} fixes them\n\nhint: leave one of the two out");
            }
        }
        if self.rank_divisor.is_some() && self.kv_energy.is_none() && q_width {
            bail!("--rank-divisor rounds ranks by energy, and both ranks are fixed\n\nhint: leave the option out");
        }
        let defaults = WeightSettings::default();
        Ok(WeightSettings {
            q_energy: self.q_energy,
            kv_energy: self.kv_energy,
            rank_divisor: self.rank_divisor.unwrap_or(defaults.rank_divisor),
            partial_rope: self.partial_rope,
            svd: self.svd.unwrap_or(defaults.svd),
            published_layout: self.published_layout,
        })
    }
}
