//! Groups of options that several commands share, and their way to validated settings.

use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};

use gqa2mla::convert::{
    Budget, CalibrationSettings, ConvertSettings, MethodChoice, MlaLayers, OutputDtype, Padding, Profile, RopeGrid,
    TargetChoice,
};
use gqa2mla::methods::METHODS;
use gqa2mla::runtime::DeviceChoice;

use super::method_args::MethodArgs;
use super::values::{self, Count};

/// Parser of a method's name, for any command.
pub fn method() -> impl TypedValueParser<Value = MethodChoice> {
    PossibleValuesParser::new(METHODS.iter().map(|entry| entry.name))
        .map(|s| MethodChoice::named(&s).unwrap_or_default())
}

fn target() -> impl TypedValueParser<Value = TargetChoice> {
    PossibleValuesParser::new(TargetChoice::all().map(TargetChoice::name))
        .map(|s| TargetChoice::named(&s).unwrap_or_default())
}

fn profile() -> impl TypedValueParser<Value = Profile> {
    PossibleValuesParser::new(["portable", "faithful"])
        .map(|s| if s == "portable" { Profile::Portable } else { Profile::Faithful })
}

fn padding() -> impl TypedValueParser<Value = Padding> {
    PossibleValuesParser::new(["kernels", "none"])
        .map(|s| if s == "kernels" { Padding::Kernels } else { Padding::None })
}

fn rope_grid() -> impl TypedValueParser<Value = Auto<RopeGrid>> {
    PossibleValuesParser::new(["auto", "free", "stock"]).map(|s| {
        Auto(match s.as_str() {
            "free" => Some(RopeGrid::Free),
            "stock" => Some(RopeGrid::Stock),
            _ => None,
        })
    })
}

fn dtype() -> impl TypedValueParser<Value = Auto<OutputDtype>> {
    PossibleValuesParser::new(std::iter::once("auto").chain(OutputDtype::ALL.map(OutputDtype::name)))
        .map(|s| Auto(OutputDtype::ALL.into_iter().find(|d| d.name() == s)))
}

/// A choice or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Auto<T>(Option<T>);

/// Everything that decides what `convert` writes, as typed.
#[derive(Debug, Clone, Args)]
pub struct ConvertOptions {
    #[command(flatten)]
    choice: MethodOptions,
    #[command(flatten)]
    own: MethodArgs,
    #[command(flatten)]
    layers: LayerOptions,
    #[command(flatten)]
    calibration: CalibrationOptions,
    #[command(flatten)]
    output: OutputOptions,
    /// Where to run the model: cpu, auto (a GPU that is no software, else the CPU), gpu[:N], vulkan, metal or cuda[:N][:bf16];
    /// the last bits of the output depend on it
    #[arg(long, value_name = "DEVICE", default_value = "cpu", help_heading = "Device")]
    device: DeviceChoice,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Method and cache size")]
struct MethodOptions {
    /// How attention is factorised
    #[arg(long, value_name = "METHOD", default_value = "attention-aware", value_parser = method())]
    method: MethodChoice,
    /// Cache per token and layer: values (`192`) or a share of the source's (`50%`); the split into latent and rotated
    /// width is searched [default: 50%, or what stock kernels take]
    #[arg(long, value_name = "VALUES|PERCENT")]
    kv_budget: Option<Budget>,
    /// Width of the cached latent, values
    #[arg(long, value_name = "N", value_parser = values::positive)]
    kv_lora_rank: Option<usize>,
    /// Width of the cached rotated key, values, even
    #[arg(long, value_name = "N", value_parser = values::positive_even)]
    qk_rope_head_dim: Option<usize>,
    /// Width of a query latent, values [default: none, or what carrying query biases needs]
    #[arg(long, value_name = "N", value_parser = values::positive)]
    q_lora_rank: Option<usize>,
    /// attention-aware: tokens of the longest calibration windows; half the text is in windows 4, 16, ... times as long as
    /// --calib-seq-len, up to this, an eighth in windows of a sixteenth of it; as --calib-seq-len: all have one length
    /// [default: 1024]
    #[arg(long, value_name = "TOKENS", value_parser = values::positive)]
    calib_max_seq_len: Option<usize>,
    /// Frequencies of the rotated width: free loses least, stock loads in every engine; auto: free for attention-aware
    #[arg(long, value_name = "GRID", default_value = "auto", value_parser = rope_grid())]
    rope_grid: Auto<RopeGrid>,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Weight factorisation and hybrids")]
struct LayerOptions {
    /// Layers that become MLA, such as `0,3-7`; `auto:N` or `auto:N%` takes those that conversion changes least, `auto`
    /// half of them. The others keep their attention. Written for hf-remote [default: all]
    #[arg(long, value_name = "LIST|auto")]
    mla_layers: Option<MlaLayers>,
}

/// Calibration text.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Calibration")]
pub struct CalibrationOptions {
    /// Text to calibrate on: .txt, or .jsonl with a `text` field; repeatable [default: built-in text]
    #[arg(long, value_name = "FILE")]
    calib: Vec<PathBuf>,
    /// Windows of text
    #[arg(long, value_name = "N", default_value = "128", value_parser = values::positive)]
    calib_samples: usize,
    /// Tokens per window
    #[arg(long, value_name = "TOKENS", default_value = "256", value_parser = values::positive)]
    calib_seq_len: usize,
    /// Seed of the choice of windows and of refinement
    #[arg(long, value_name = "N", default_value = "42")]
    seed: u64,
}

impl CalibrationOptions {
    /// Validated.
    pub fn settings(&self) -> CalibrationSettings {
        CalibrationSettings {
            files: self.calib.clone(),
            samples: self.calib_samples,
            seq_len: self.calib_seq_len,
            max_seq_len: None,
            seed: self.seed,
        }
    }
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Output")]
struct OutputOptions {
    /// Model class to write for; auto: deepseek_v3 if it holds the source, else the first that does, with the reason
    #[arg(long, value_name = "CLASS", default_value = "auto", value_parser = target())]
    target: TargetChoice,
    /// portable: what every engine's own class runs, padded to its kernels; faithful: biases and any frequencies, for
    /// transformers' code [default: faithful]
    #[arg(long, value_name = "PROFILE", value_parser = profile())]
    profile: Option<Profile>,
    /// Pad widths with zeros to those of serving kernels, at no change of the function [default: kernels for the portable
    /// profile, else none]
    #[arg(long, value_name = "WIDTHS", value_parser = padding())]
    pad: Option<Padding>,
    /// Dtype of the written weights; auto: the source's; fp8: e4m3 in blocks of 128 x 128, as DeepSeek-V3
    #[arg(long, value_name = "DTYPE", default_value = "auto", value_parser = dtype())]
    dtype: Auto<OutputDtype>,
    /// Largest weight file; KB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = values::size)]
    max_shard_size: u64,
    /// Longest context the output claims, tokens; lets a sliding-window model be converted within its window
    #[arg(long, value_name = "TOKENS", value_parser = values::positive)]
    max_context: Option<usize>,
    /// Memory to stay within; beyond it, hidden states of the calibration text wait on the disk [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = values::size)]
    max_memory: Option<u64>,
    /// Replace an existing output folder
    #[arg(long)]
    overwrite: bool,
    /// Go on where the tool would refuse, such as for a cache that does not shrink
    #[arg(long)]
    force: bool,
}

impl ConvertOptions {
    /// Check the options against each other.
    ///
    /// # Errors
    /// Options that contradict each other, or that the method would ignore.
    pub fn settings(&self) -> anyhow::Result<ConvertSettings> {
        let c = &self.choice;
        let settings = ConvertSettings {
            method: self.own.method(&c.method)?,
            kv_lora_rank: c.kv_lora_rank,
            qk_rope_head_dim: c.qk_rope_head_dim,
            q_lora_rank: c.q_lora_rank,
            kv_budget: c.kv_budget,
            mla_layers: self.layers.mla_layers.clone(),
            target: self.output.target,
            profile: self.output.profile,
            pad: self.output.pad,
            rope_grid: c.rope_grid.0,
            dtype: self.output.dtype.0,
            calibration: CalibrationSettings { max_seq_len: c.calib_max_seq_len, ..self.calibration.settings() },
            device: self.device,
            max_shard_bytes: self.output.max_shard_size,
            max_context: self.output.max_context,
            overwrite: self.output.overwrite,
            force: self.output.force,
            max_memory: self.output.max_memory,
            leftover: ConvertSettings::default().leftover,
        };
        settings.validate()?;
        Ok(settings)
    }
}

/// Which tokens models are measured on.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Text")]
pub struct TextOptions {
    /// Text to measure on, UTF-8 [default: built-in text that no calibration uses]
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Tokens per window, at most what the models allow
    #[arg(long, value_name = "TOKENS", default_value = "512", value_parser = window)]
    pub seq_len: usize,
    /// Windows to measure, or `all`
    #[arg(long, value_name = "N|all", default_value = "8", value_parser = values::count_or_all)]
    pub windows: Count,
    /// Take every Nth window of the text
    #[arg(long, value_name = "N", default_value = "1", value_parser = values::positive)]
    pub every: usize,
}

/// A window predicts every token but its first.
fn window(s: &str) -> Result<usize, String> {
    match values::positive(s) {
        Ok(n) if n >= 2 => Ok(n),
        _ => Err("expected an integer of at least 2: the first token of a window is not predicted".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use gqa2mla::methods::attention_aware::{AttentionAware, Step, Steps};
    use gqa2mla::methods::transmla::{FreqFold, Rorope};
    use gqa2mla::write::Leftover;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Probe {
        #[command(flatten)]
        options: ConvertOptions,
    }

    fn settings(args: &str) -> anyhow::Result<ConvertSettings> {
        let args = std::iter::once("probe").chain(args.split_whitespace());
        Probe::try_parse_from(args)?.options.settings()
    }

    #[test]
    fn no_options_are_the_documented_defaults() {
        assert_eq!(settings("").expect("defaults"), ConvertSettings::default());
    }

    #[test]
    fn every_option_arrives() {
        let s = settings(
            "--method transmla --kv-lora-rank 128 --qk-rope-head-dim 64 --q-lora-rank 96 --freqfold 4 \
             --balance-kv-ratio none --rope-grid stock --dtype f32 --calib a.txt --calib b.jsonl --calib-samples 3 \
             --calib-seq-len 17 --seed 7 --target deepseek_v3 --profile faithful --pad none --max-shard-size 1MiB --max-context 99 --max-memory 4GiB --overwrite --force \
             --device gpu:1",
        )
        .expect("valid");
        let expected = ConvertSettings {
            method: Rorope { freqfold: FreqFold::Fixed(4), balance_kv_ratio: None, ..Rorope::default() }.into(),
            kv_lora_rank: Some(128),
            qk_rope_head_dim: Some(64),
            q_lora_rank: Some(96),
            kv_budget: None,
            mla_layers: None,
            target: TargetChoice::named("deepseek_v3").expect("a class"),
            profile: Some(Profile::Faithful),
            pad: Some(Padding::None),
            rope_grid: Some(RopeGrid::Stock),
            dtype: Some(OutputDtype::F32),
            calibration: CalibrationSettings {
                files: vec!["a.txt".into(), "b.jsonl".into()],
                samples: 3,
                seq_len: 17,
                max_seq_len: None,
                seed: 7,
            },
            device: DeviceChoice::Gpu(Some(1)),
            max_shard_bytes: 1 << 20,
            max_context: Some(99),
            overwrite: true,
            force: true,
            max_memory: Some(4 << 30),
            leftover: Leftover::Refuse,
        };
        assert_eq!(s, expected);
        let s = settings("--kv-budget 33.3% --without metric --without phase --refine 10").expect("valid");
        assert_eq!(s.kv_budget, Some(Budget::Percent(33.3)));
        let steps = Steps::default().without(Step::Metric).without(Step::Phase);
        assert_eq!(s.method, AttentionAware { steps, refine: 10, fit_tokens: None }.into());
    }

    #[test]
    fn options_that_would_be_ignored_are_refused() {
        for bad in [
            "--method exact --kv-budget 50%",
            "--method exact --kv-lora-rank 64",
            "--freqfold 2",
            "--method transmla --without metric",
            "--method care --refine 3",
            "--method care --fit-tokens 4096",
            "--fit-tokens 0",
            "--method care --calib-max-seq-len 4096",
            "--calib-max-seq-len 0",
            "--kv-budget 192 --kv-lora-rank 128 --qk-rope-head-dim 64",
            "--kv-budget 64 --qk-rope-head-dim 64",
            "--qk-rope-head-dim 63",
            "--kv-budget 0%",
            "--kv-budget 101%",
            "--kv-budget -5",
            "--without nothing",
            "--method magic",
        ] {
            assert!(settings(bad).is_err(), "{bad}");
        }
    }
}
