//! A run that dies, or meets a full disk, before every single call that changes the disk.

use std::path::{Path, PathBuf};

use fs_err as fs;

use super::{CalibrationSettings, ConvertError, ConvertSettings, MethodChoice, convert};
use crate::arch::Architecture;
use crate::methods::exact::Exact;
use crate::observe::Silent;
use crate::source::{ModelSource, OpenOptions};
use crate::write::ops::faults::{Fault, with};
use crate::write::{Leftover, WriteError, verify_manifest};

struct Scene {
    source: ModelSource,
    arch: Architecture,
    settings: ConvertSettings,
}

impl Scene {
    fn new(method: MethodChoice) -> Self {
        let compresses = method.compresses();
        let model = if compresses { "pico-trained" } else { "pico-llama" };
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(model);
        let source = ModelSource::open(&folder.display().to_string(), &OpenOptions::default(), &Silent).unwrap();
        let arch = Architecture::from_config(&source.config).unwrap();
        let settings = ConvertSettings {
            method,
            kv_lora_rank: compresses.then_some(24),
            qk_rope_head_dim: compresses.then_some(8),
            calibration: CalibrationSettings { samples: 4, seq_len: 32, ..CalibrationSettings::default() },
            // A few shards, so that layers begin and end within them.
            max_shard_bytes: if compresses { 300_000 } else { 60_000 },
            overwrite: true,
            ..ConvertSettings::default()
        };
        Scene { source, arch, settings }
    }

    fn run(&self, to: &Path, leftover: Leftover) -> Result<(), ConvertError> {
        let settings = ConvertSettings { leftover, ..self.settings.clone() };
        convert(&self.source, &self.arch, &settings, to, &|_| Vec::new(), &Silent).map(|_| ())
    }
}

fn manifest(dir: &Path) -> String {
    assert!(verify_manifest(dir).unwrap().is_clean());
    fs::read_to_string(dir.join("manifest.json")).unwrap()
}

/// Every `step`-th point of a run that replaces an older model.
fn survives(method: MethodChoice, step: usize) {
    let dir = tempfile::tempdir().unwrap();
    let scene = Scene::new(method.clone());
    let whole = dir.path().join("whole");
    let (result, points) = with(None, || scene.run(&whole, Leftover::Refuse));
    result.unwrap();
    assert!(points > 50, "{points} points");
    let (old, new) = ("an older model".to_owned(), manifest(&whole));
    for fault in [Fault::Death, Fault::Full] {
        // The last points of a run that replaces are beyond those of one that does not.
        for at in (0..points + 4).step_by(step) {
            let parent = dir.path().join(format!("{at}"));
            fs::create_dir(&parent).unwrap();
            let to = parent.join("out");
            fs::create_dir(&to).unwrap();
            fs::write(to.join("config.json"), &old).unwrap();
            let (result, _) = with(Some((at, fault)), || scene.run(&to, Leftover::Refuse));
            let place = format!("{method}, {fault:?} at {at}");
            // Untouched or complete, at any moment.
            match fs::read_to_string(to.join("config.json")).unwrap() {
                text if text == old => assert!(result.is_err(), "{place}"),
                _ => assert_eq!(manifest(&to), new, "{place}"),
            }
            if let (Fault::Full, Err(e)) = (fault, &result) {
                let full = matches!(e, ConvertError::Write(WriteError::Full { .. } | WriteError::NotSynced { .. }));
                assert!(full, "{place}: {e}");
                assert!(!parent.join(".out.lock").exists(), "{place}: the lock is held");
            }
            // As another process would: this one never holds a lock it lost.
            let _ = fs::remove_file(parent.join(".out.lock"));
            scene.run(&to, Leftover::Resume).unwrap_or_else(|e| panic!("{place}: {e}"));
            assert_eq!(manifest(&to), new, "{place}");
            fs::remove_dir_all(&parent).unwrap();
        }
    }
}

#[test]
fn exact_survives_a_fault_at_every_point() {
    survives(Exact.into(), 1);
}

#[test]
fn attention_aware_survives_faults_all_along() {
    survives(MethodChoice::default(), 7);
}

#[test]
fn what_a_clean_failure_leaves_is_only_what_can_be_resumed() {
    let scene = Scene::new(Exact.into());
    let dir = tempfile::tempdir().unwrap();
    let (_, points) = with(None, || scene.run(&dir.path().join("whole"), Leftover::Refuse));
    for at in 0..points {
        let parent = dir.path().join(format!("{at}"));
        fs::create_dir(&parent).unwrap();
        let (result, _) = with(Some((at, Fault::Full)), || scene.run(&parent.join("out"), Leftover::Refuse));
        let left: Vec<PathBuf> = fs::read_dir(&parent).unwrap().map(|e| e.unwrap().path()).collect();
        if result.is_err() && !parent.join("out").exists() {
            let journalled = left.iter().all(|p| p.join("journal").exists());
            assert!(left.len() <= 1 && journalled, "full at {at}: {left:?}");
        }
    }
}
