//! Copies of models, for tests that change one.

use std::path::{Path, PathBuf};

use super::models::{fixture, open};

/// Copies a folder with all that is in it.
pub fn copy_folder(from: &Path, to: &Path) {
    fs_err::create_dir_all(to).expect("made");
    for entry in fs_err::read_dir(from).expect("readable").flatten() {
        let place = to.join(entry.file_name());
        if entry.file_type().expect("known").is_dir() {
            copy_folder(&entry.path(), &place);
        } else {
            fs_err::copy(entry.path(), place).expect("copied");
        }
    }
}

/// A copy of a fixture whose config was changed and whose tensors `zeroed` are zeros.
pub fn changed(
    name: &str,
    dir: &Path,
    config: impl Fn(&mut serde_json::Map<String, serde_json::Value>),
    zeroed: &[&str],
) -> PathBuf {
    let to = dir.join("changed");
    copy_folder(&fixture(name), &to);
    let path = to.join("config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs_err::read(&path).expect("readable")).expect("JSON");
    config(json.as_object_mut().expect("an object"));
    fs_err::write(&path, json.to_string()).expect("written");
    let weights = to.join("model.safetensors");
    let mut bytes = fs_err::read(&weights).expect("readable");
    let (source, _) = open(&fixture(name));
    for tensor in zeroed {
        let info = source.tensors.get(tensor).expect("there");
        bytes[info.begin as usize..info.end as usize].fill(0);
    }
    fs_err::write(&weights, bytes).expect("written");
    to
}

/// A copy of a model in one file of f32 weights, each tensor of which `change` was given by name.
pub fn rewritten(from: &Path, to: &Path, change: impl Fn(&str, &mut [f32])) {
    copy_folder(from, to);
    let (source, _) = open(from);
    let weights = to.join("model.safetensors");
    let mut bytes = fs_err::read(&weights).expect("readable");
    for (name, info) in source.tensors.iter() {
        assert_eq!(info.dtype, gqa2mla::source::Dtype::F32, "{name}");
        let place = &mut bytes[info.begin as usize..info.end as usize];
        let mut values: Vec<f32> =
            place.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        change(name, &mut values);
        place.copy_from_slice(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
    }
    fs_err::write(&weights, bytes).expect("written");
}
