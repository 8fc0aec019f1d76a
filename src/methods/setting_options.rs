//! The options of a conversion that belong to no method, as data: name, help, values, default, how one is read into
//! [`ConvertSettings`] and how it is typed again. The command line, its reference and the command in a model card are made
//! from this table; what options mean together is checked in [`ConvertSettings::validate`].

use std::path::PathBuf;
use std::str::FromStr;

use super::options::{positive, positive_even, size};
use super::{Budget, ConvertSettings, METHODS, MethodChoice};
use crate::target::{OutputDtype, Padding, Profile, RopeGrid, TargetChoice};

const METHOD: &str = "Method and cache size";
const HYBRIDS: &str = "Weight factorisation and hybrids";
/// Heading of the options that say which text is calibrated on.
pub const CALIBRATION: &str = "Calibration";
const OUTPUT: &str = "Output";
const DEVICE: &str = "Device";

/// An option that belongs to no method.
#[derive(Debug)]
pub struct SettingOption {
    /// Name without dashes.
    pub name: &'static str,
    /// What it takes, as the help shows it; empty for a flag.
    pub value_name: &'static str,
    /// The values there are; empty: any that [`SettingOption::set`] reads.
    pub values: fn() -> Vec<&'static str>,
    /// Whether it may be given several times.
    pub repeatable: bool,
    /// The default as it would be typed; empty where leaving it out is the default.
    pub default: &'static str,
    /// What it does.
    pub help: &'static str,
    /// Group of the help it stands in.
    pub heading: &'static str,
    /// Reads a value, empty for a flag.
    pub set: fn(&mut ConvertSettings, &str) -> Result<(), String>,
    /// The values as they would be typed: none at the default, an empty one for a flag. Paths by their last part. `None`:
    /// the option changes nothing of the output.
    pub typed: Option<fn(&ConvertSettings) -> Vec<String>>,
}

/// What most options have in common.
const PLAIN: SettingOption = SettingOption {
    name: "",
    value_name: "",
    values: Vec::new,
    repeatable: false,
    default: "",
    help: "",
    heading: METHOD,
    set: |_, _| Ok(()),
    typed: None,
};

/// A number where one is given.
fn typed<T: ToString>(value: Option<T>) -> Vec<String> {
    value.map(|v| v.to_string()).into_iter().collect()
}

/// A value where it is not the default's.
fn changed<T: PartialEq>(
    settings: &ConvertSettings,
    of: fn(&ConvertSettings) -> T,
    show: fn(T) -> String,
) -> Vec<String> {
    let value = of(settings);
    if value == of(&ConvertSettings::default()) { Vec::new() } else { vec![show(value)] }
}

/// A value read by its type.
fn read<T: FromStr<Err = String>>(to: &mut T, value: &str) -> Result<(), String> {
    *to = value.parse()?;
    Ok(())
}

/// One of a few named values.
fn named<T: Copy>(all: &[(&str, T)], value: &str) -> Result<T, String> {
    let found = all.iter().find(|(name, _)| *name == value).map(|(_, value)| *value);
    found.ok_or_else(|| format!("expected one of {}", all.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")))
}

const PROFILES: [(&str, Profile); 2] = [("portable", Profile::Portable), ("faithful", Profile::Faithful)];
const PADDINGS: [(&str, Padding); 2] = [("kernels", Padding::Kernels), ("none", Padding::None)];
const GRIDS: [(&str, Option<RopeGrid>); 3] =
    [("auto", None), ("free", Some(RopeGrid::Free)), ("stock", Some(RopeGrid::Stock))];

/// The name of a value among some.
fn name_of<T: PartialEq>(all: &[(&'static str, T)], value: &T) -> Option<&'static str> {
    all.iter().find(|(_, v)| v == value).map(|(name, _)| *name)
}

/// A dtype by its name, none for `auto`.
fn dtype(value: &str) -> Result<Option<OutputDtype>, String> {
    match value {
        "auto" => Ok(None),
        _ => {
            OutputDtype::ALL.into_iter().find(|d| d.name() == value).map(Some).ok_or_else(|| "unknown dtype".to_owned())
        }
    }
}

/// Options before those of methods, in the order of the help.
pub const BEFORE_METHODS: &[SettingOption] = &[
    SettingOption {
        name: "method",
        value_name: "METHOD",
        values: || METHODS.iter().map(|entry| entry.name).collect(),
        default: METHODS[0].name,
        help: "How attention is factorised",
        set: |s, value| {
            s.method = MethodChoice::named(value).ok_or_else(|| "unknown method".to_owned())?;
            Ok(())
        },
        typed: Some(|s| vec![s.method.name().to_owned()]),
        ..PLAIN
    },
    SettingOption {
        name: "kv-budget",
        value_name: "VALUES|PERCENT",
        help: "Cache per token and layer: values (`192`) or a share of the source's (`50%`); the split into latent and \
               rotated width is searched [default: 50%, or what stock kernels take]",
        set: |s, value| {
            s.kv_budget = Some(value.parse()?);
            Ok(())
        },
        typed: Some(|s| typed(s.kv_budget)),
        ..PLAIN
    },
    SettingOption {
        name: "kv-lora-rank",
        value_name: "N",
        help: "Width of the cached latent, values",
        set: |s, value| {
            s.kv_lora_rank = Some(positive(value)?);
            Ok(())
        },
        typed: Some(|s| typed(s.kv_lora_rank)),
        ..PLAIN
    },
    SettingOption {
        name: "qk-rope-head-dim",
        value_name: "N",
        help: "Width of the cached rotated key, values, even",
        set: |s, value| {
            s.qk_rope_head_dim = Some(positive_even(value)?);
            Ok(())
        },
        typed: Some(|s| typed(s.qk_rope_head_dim)),
        ..PLAIN
    },
    SettingOption {
        name: "q-lora-rank",
        value_name: "N",
        help: "Width of a query latent, values [default: none, or what carrying query biases needs]",
        set: |s, value| {
            s.q_lora_rank = Some(positive(value)?);
            Ok(())
        },
        typed: Some(|s| typed(s.q_lora_rank)),
        ..PLAIN
    },
];

/// Options after those of methods, in the order of the help.
pub const AFTER_METHODS: &[SettingOption] = &[
    SettingOption {
        name: "mla-layers",
        value_name: "LIST|auto",
        help: "Layers that become MLA, such as `0,3-7`; `auto:N` or `auto:N%` takes those that conversion changes least, \
               `auto` half of them. The others keep their attention. Written for hf-remote [default: all]",
        heading: HYBRIDS,
        set: |s, value| {
            s.mla_layers = Some(value.parse()?);
            Ok(())
        },
        typed: Some(|s| typed(s.mla_layers.as_ref())),
        ..PLAIN
    },
    SettingOption {
        name: "rope-grid",
        value_name: "GRID",
        values: || GRIDS.iter().map(|g| g.0).collect(),
        default: "auto",
        help: "Frequencies of the rotated width: free loses least, stock loads in every engine; auto: free for \
               attention-aware",
        set: |s, value| {
            s.rope_grid = named(&GRIDS, value)?;
            Ok(())
        },
        typed: Some(|s| typed(s.rope_grid.and_then(|grid| name_of(&GRIDS, &Some(grid))))),
        ..PLAIN
    },
    SettingOption {
        name: "target",
        value_name: "CLASS",
        values: || TargetChoice::all().map(TargetChoice::name).collect(),
        default: "auto",
        help: "Model class to write for; auto: deepseek_v3 if it holds the source, else the first that does, with the reason",
        heading: OUTPUT,
        set: |s, value| {
            s.target = TargetChoice::named(value).ok_or_else(|| "unknown class".to_owned())?;
            Ok(())
        },
        typed: Some(|s| changed(s, |s| s.target, |t| t.name().to_owned())),
        ..PLAIN
    },
    SettingOption {
        name: "profile",
        value_name: "PROFILE",
        values: || PROFILES.iter().map(|p| p.0).collect(),
        help: "portable: what every engine's own class runs, padded to its kernels; faithful: biases and any frequencies, \
               for transformers' code [default: faithful]",
        heading: OUTPUT,
        set: |s, value| {
            s.profile = Some(named(&PROFILES, value)?);
            Ok(())
        },
        typed: Some(|s| typed(s.profile.and_then(|p| name_of(&PROFILES, &p)))),
        ..PLAIN
    },
    SettingOption {
        name: "pad",
        value_name: "WIDTHS",
        values: || PADDINGS.iter().map(|p| p.0).collect(),
        help: "Pad widths with zeros to those of serving kernels, at no change of the function [default: kernels for the \
               portable profile, else none]",
        heading: OUTPUT,
        set: |s, value| {
            s.pad = Some(named(&PADDINGS, value)?);
            Ok(())
        },
        typed: Some(|s| typed(s.pad.and_then(|p| name_of(&PADDINGS, &p)))),
        ..PLAIN
    },
    SettingOption {
        name: "dtype",
        value_name: "DTYPE",
        values: || std::iter::once("auto").chain(OutputDtype::ALL.map(OutputDtype::name)).collect(),
        default: "auto",
        help: "Dtype of the written weights; auto: the source's; fp8: e4m3 in blocks of 128 x 128, as DeepSeek-V3",
        heading: OUTPUT,
        set: |s, value| {
            s.dtype = dtype(value)?;
            Ok(())
        },
        typed: Some(|s| typed(s.dtype.map(OutputDtype::name))),
        ..PLAIN
    },
    SettingOption {
        name: "calib",
        value_name: "FILE",
        repeatable: true,
        help: "Text to calibrate on: .txt, or .jsonl with a `text` field; repeatable [default: built-in text]",
        heading: CALIBRATION,
        set: |s, value| {
            s.calibration.files.push(PathBuf::from(value));
            Ok(())
        },
        typed: Some(|s| {
            let name = |file: &PathBuf| file.file_name().map(|name| name.to_string_lossy().into_owned());
            s.calibration.files.iter().filter_map(name).collect()
        }),
        ..PLAIN
    },
    SettingOption {
        name: "calib-samples",
        value_name: "N",
        default: "128",
        help: "Windows of text",
        heading: CALIBRATION,
        set: |s, value| {
            s.calibration.samples = positive(value)?;
            Ok(())
        },
        typed: Some(|s| changed(s, |s| s.calibration.samples, |n| n.to_string())),
        ..PLAIN
    },
    SettingOption {
        name: "calib-seq-len",
        value_name: "TOKENS",
        default: "256",
        help: "Tokens per window",
        heading: CALIBRATION,
        set: |s, value| {
            s.calibration.seq_len = positive(value)?;
            Ok(())
        },
        typed: Some(|s| changed(s, |s| s.calibration.seq_len, |n| n.to_string())),
        ..PLAIN
    },
    SettingOption {
        name: "calib-max-seq-len",
        value_name: "TOKENS",
        help: "attention-aware: tokens of the longest calibration windows; half the text is in windows 4, 16, ... times as \
               long as --calib-seq-len, up to this, an eighth in windows of a sixteenth of it; as --calib-seq-len: all have \
               one length [default: 1024]",
        set: |s, value| {
            s.calibration.max_seq_len = Some(positive(value)?);
            Ok(())
        },
        typed: Some(|s| typed(s.calibration.max_seq_len)),
        ..PLAIN
    },
    SettingOption {
        name: "seed",
        value_name: "N",
        default: "42",
        help: "Seed of the choice of windows and of refinement",
        heading: CALIBRATION,
        set: |s, value| {
            s.calibration.seed = value.parse().map_err(|_| "expected an integer of at least 0".to_owned())?;
            Ok(())
        },
        typed: Some(|s| changed(s, |s| s.calibration.seed, |n| n.to_string())),
        ..PLAIN
    },
    SettingOption {
        name: "device",
        value_name: "DEVICE",
        default: "cpu",
        help: "Where to run the model: cpu, auto (a GPU that is no software, else the CPU), gpu[:N], vulkan, metal or \
               cuda[:N][:bf16]; the last bits of the output depend on it",
        heading: DEVICE,
        set: |s, value| read(&mut s.device, value),
        typed: Some(|s| changed(s, |s| s.device, |device| device.to_string())),
        ..PLAIN
    },
    SettingOption {
        name: "max-shard-size",
        value_name: "SIZE",
        default: "5GB",
        help: "Largest weight file; KB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024",
        heading: OUTPUT,
        set: |s, value| {
            s.max_shard_bytes = size(value)?;
            Ok(())
        },
        typed: Some(|s| changed(s, |s| s.max_shard_bytes, |n| n.to_string())),
        ..PLAIN
    },
    SettingOption {
        name: "max-context",
        value_name: "TOKENS",
        help: "Longest context the output claims, tokens; lets a sliding-window model be converted within its window",
        heading: OUTPUT,
        set: |s, value| {
            s.max_context = Some(positive(value)?);
            Ok(())
        },
        typed: Some(|s| typed(s.max_context)),
        ..PLAIN
    },
    SettingOption {
        name: "max-memory",
        value_name: "SIZE",
        help: "Memory to stay within; beyond it, hidden states of the calibration text wait on the disk [default: no limit]",
        heading: OUTPUT,
        set: |s, value| {
            s.max_memory = Some(size(value)?);
            Ok(())
        },
        ..PLAIN
    },
    SettingOption {
        name: "overwrite",
        help: "Replace an existing output folder",
        heading: OUTPUT,
        set: |s, _| {
            s.overwrite = true;
            Ok(())
        },
        ..PLAIN
    },
    SettingOption {
        name: "force",
        help: "Go on where the tool would refuse, such as for a cache that does not shrink",
        heading: OUTPUT,
        set: |s, _| {
            s.force = true;
            Ok(())
        },
        typed: Some(|s| s.force.then(String::new).into_iter().collect()),
        ..PLAIN
    },
];

/// A budget as it is typed.
impl std::fmt::Display for Budget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Budget::Values(n) => n.fmt(f),
            Budget::Percent(p) => write!(f, "{p}%"),
        }
    }
}

impl ConvertSettings {
    /// The options that make these settings, as they would be typed: name and value, empty for a flag; those at their defaults
    /// are left out, but for the method. Flags come last. What changes nothing of the output is left out too, and of paths
    /// all but the last part: model cards are published.
    pub fn arguments(&self) -> Vec<(&'static str, String)> {
        let of = |options: &[SettingOption]| {
            let one = |option: &SettingOption| {
                let name = option.name;
                option.typed.map(|typed| typed(self)).unwrap_or_default().into_iter().map(move |value| (name, value))
            };
            options.iter().flat_map(one).collect::<Vec<_>>()
        };
        let method = self.method.arguments().into_iter().map(|(name, value)| (name, value.unwrap_or_default()));
        let mut out: Vec<_> = of(BEFORE_METHODS).into_iter().chain(method).chain(of(AFTER_METHODS)).collect();
        out.sort_by_key(|(_, value)| value.is_empty());
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Settings from options as they are typed.
    fn settings(arguments: &[(&str, &str)]) -> ConvertSettings {
        let mut out = ConvertSettings::default();
        let mut own = Vec::new();
        for &(name, value) in arguments {
            match BEFORE_METHODS.iter().chain(AFTER_METHODS).find(|option| option.name == name) {
                Some(option) => (option.set)(&mut out, value).expect(name),
                None => own.push((name, value)),
            }
        }
        out.method = (out.method.entry().make)(&own).expect("options of the method");
        out
    }

    #[test]
    fn what_is_typed_again_makes_the_same_settings() {
        for typed in [
            &[("method", "attention-aware")][..],
            &[("method", "x-ecomla"), ("kv-energy", "0.9"), ("partial-rope", "2-norm"), ("mla-layers", "0,3-7")],
            &[("method", "x-ecomla"), ("published-layout", ""), ("force", "")],
            &[("method", "mha2mla"), ("kv-budget", "33.3%"), ("svd", "split"), ("device", "gpu:1"), ("seed", "7")],
            &[("method", "transmla"), ("kv-lora-rank", "8"), ("freqfold", "2"), ("balance-kv-ratio", "none")],
            &[("method", "attention-aware"), ("without", "phase"), ("without", "metric"), ("refine", "3")],
            &[("method", "exact"), ("target", "hf-remote"), ("dtype", "f16"), ("max-shard-size", "1000")],
            &[("method", "care"), ("rope-grid", "stock"), ("profile", "portable"), ("pad", "none"), ("calib", "a.txt")],
        ] {
            let made = settings(typed);
            let again = made.arguments();
            let again: Vec<(&str, &str)> = again.iter().map(|(name, value)| (*name, value.as_str())).collect();
            assert_eq!(settings(&again), made, "{typed:?} became {again:?}");
            let mut sorted = [typed.to_vec(), again.clone()];
            sorted.iter_mut().for_each(|list| list.sort_unstable());
            assert_eq!(sorted[0], sorted[1]);
        }
    }

    #[test]
    fn defaults_are_what_the_table_says_and_names_are_not_used_twice() {
        let mut names: Vec<&str> = METHODS.iter().flat_map(|m| m.options).map(|option| option.name).collect();
        names.sort_unstable();
        names.dedup();
        for option in BEFORE_METHODS.iter().chain(AFTER_METHODS) {
            assert!(!names.contains(&option.name), "--{} twice", option.name);
            names.push(option.name);
            for value in (option.values)() {
                assert!((option.set)(&mut ConvertSettings::default(), value).is_ok(), "--{} {value}", option.name);
            }
            if !option.default.is_empty() {
                let mut s = ConvertSettings::default();
                (option.set)(&mut s, option.default).expect(option.name);
                assert_eq!(s, ConvertSettings::default(), "--{}", option.name);
            }
        }
    }
}
