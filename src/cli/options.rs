//! Groups of options that several commands share, and their way to validated settings.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};

use gqa2mla::convert::{CalibrationSettings, ConvertSettings, MethodChoice};
use gqa2mla::methods::METHODS;
use gqa2mla::methods::setting_options::{AFTER_METHODS, BEFORE_METHODS, CALIBRATION, SettingOption};

use super::method_args::{MethodArgs, given, typed_arg};
use super::values::{self, Count};

/// Parser of a method's name, for any command.
pub fn method() -> impl TypedValueParser<Value = MethodChoice> {
    PossibleValuesParser::new(METHODS.iter().map(|entry| entry.name))
        .map(|s| MethodChoice::named(&s).unwrap_or_default())
}

/// Everything that decides what `convert` writes, as typed.
#[derive(Debug, Clone, Default)]
pub struct ConvertOptions {
    given: Given,
    own: MethodArgs,
}

impl ConvertOptions {
    /// Check the options against each other.
    ///
    /// # Errors
    /// Options that contradict each other, or that the method would ignore.
    pub fn settings(&self) -> anyhow::Result<ConvertSettings> {
        let mut settings = self.given.settings()?;
        settings.method = self.own.method(&settings.method)?;
        settings.validate()?;
        Ok(settings)
    }
}

impl Args for ConvertOptions {
    fn augment_args(command: Command) -> Command {
        let command = BEFORE_METHODS.iter().fold(command, |command, option| command.arg(arg(option)));
        AFTER_METHODS.iter().fold(MethodArgs::augment_args(command), |command, option| command.arg(arg(option)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for ConvertOptions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let all = BEFORE_METHODS.iter().chain(AFTER_METHODS);
        Ok(Self { given: Given::read(all, matches), own: MethodArgs::from_arg_matches(matches)? })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Options that were given or have a default: each with its value, empty for a flag.
#[derive(Debug, Clone, Default)]
struct Given(Vec<(&'static SettingOption, String)>);

impl Given {
    fn read(options: impl Iterator<Item = &'static SettingOption>, matches: &ArgMatches) -> Self {
        let of = |option: &'static SettingOption| {
            given(matches, option.name, option.value_name).into_iter().map(move |value| (option, value))
        };
        Self(options.flat_map(of).collect())
    }

    /// The settings that these options make of the defaults.
    fn settings(&self) -> anyhow::Result<ConvertSettings> {
        let mut settings = ConvertSettings::default();
        for (option, value) in &self.0 {
            (option.set)(&mut settings, value).map_err(|why| anyhow::anyhow!("--{} {value}: {why}", option.name))?;
        }
        Ok(settings)
    }
}

/// An option as the command line has it.
fn arg(option: &'static SettingOption) -> Arg {
    let arg = Arg::new(option.name).long(option.name).help(option.help).help_heading(option.heading);
    let check = |value: &str| (option.set)(&mut ConvertSettings::default(), value);
    let arg = typed_arg(arg, option.value_name, option.repeatable, (option.values)(), check);
    if option.default.is_empty() { arg } else { arg.default_value(option.default) }
}

/// Calibration text, as `convert` has it, for other commands.
#[derive(Debug, Clone, Default)]
pub struct CalibrationOptions(Given);

impl CalibrationOptions {
    fn options() -> impl Iterator<Item = &'static SettingOption> {
        AFTER_METHODS.iter().filter(|option| option.heading == CALIBRATION)
    }

    /// The settings; every value was read once before.
    pub fn settings(&self) -> CalibrationSettings {
        self.0.settings().map(|settings| settings.calibration).unwrap_or_default()
    }
}

impl Args for CalibrationOptions {
    fn augment_args(command: Command) -> Command {
        Self::options().fold(command, |command, option| command.arg(arg(option)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for CalibrationOptions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(Self(Given::read(Self::options(), matches)))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
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
    use gqa2mla::convert::{Budget, OutputDtype, Padding, Profile, RopeGrid, TargetChoice};
    use gqa2mla::methods::attention_aware::{AttentionAware, Step, Steps};
    use gqa2mla::methods::transmla::{FreqFold, Rorope};
    use gqa2mla::runtime::DeviceChoice;
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
            "--method mha2mla --published-layout",
            "--method x-ecomla --svd split",
            "--method exact --mla-layers 1",
            "--method magic",
        ] {
            assert!(settings(bad).is_err(), "{bad}");
        }
    }
}
