//! Latents in other coordinates and shared out to ranks, judged by the reference runtime.

mod rotate;
mod shard;

use std::collections::BTreeMap;
use std::path::Path;

use gqa2mla::convert::{CalibrationSettings, ConvertSettings, Target};
use gqa2mla::latent::{RotateSettings, RotationReport, ShardReport, ShardSettings, Sharing, Transform, rotate, shard};
use gqa2mla::observe::Silent;
use gqa2mla::runtime::DeviceChoice;
use gqa2mla::write::Leftover;

use crate::common::judge;
use crate::common::models::{fixture, open};

const NATIVE: [&str; 5] =
    ["pico-deepseek-v3", "pico-deepseek-v3-bias", "pico-deepseek-v2", "pico-youtu", "pico-minicpm3"];

fn settings(transform: Transform, slices: usize) -> RotateSettings {
    RotateSettings {
        transform,
        slices,
        calibration: CalibrationSettings { samples: 24, seq_len: 128, ..CalibrationSettings::default() },
        dtype: None,
        device: DeviceChoice::Cpu,
        max_shard_bytes: 5_000_000_000,
        overwrite: false,
        leftover: Leftover::Refuse,
    }
}

fn turn(from: &Path, to: &Path, settings: &RotateSettings) -> Result<RotationReport, String> {
    let (source, arch) = open(from);
    rotate(&source, &arch, settings, to, &|_| Vec::new(), &Silent).map_err(|e| e.to_string())
}

fn shard_to(from: &Path, to: &Path, sharing: Sharing) -> Result<ShardReport, String> {
    let (source, arch) = open(from);
    let settings = ShardSettings {
        sharing,
        calibrate: false,
        refit: false,
        calibration: CalibrationSettings { samples: 24, seq_len: 128, ..CalibrationSettings::default() },
        device: DeviceChoice::Cpu,
        overwrite: false,
    };
    shard(&source, &arch, &settings, to, &Silent).map_err(|e| e.to_string())
}

/// The trained fixture at half its cache, written for `target`.
fn converted(to: &Path, target: Target) {
    let calibration = CalibrationSettings { samples: 32, seq_len: 128, ..CalibrationSettings::default() };
    let settings = ConvertSettings { target: target.into(), calibration, ..ConvertSettings::default() };
    judge::converted(&fixture("pico-trained"), to, &settings).expect("converts");
}

/// Bytes of every tensor of a model, by name.
fn tensor_bytes(dir: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let (source, _) = open(dir);
    let one = |name: &str| {
        let view = source.tensors.view(name).expect("reads");
        (name.to_owned(), (view.shape.to_vec(), view.bytes.to_vec()))
    };
    source.tensors.names().map(one).collect()
}
