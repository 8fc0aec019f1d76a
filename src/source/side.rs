//! The files of a model folder that are neither weights nor `config.json`.

use std::path::{Path, PathBuf};

use fs_err as fs;

use super::SourceError;
use super::path::resolve_regular;

/// A file to be carried over to the converted model: tokenizer, generation settings, licence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SideFile {
    /// Name in the model folder.
    pub name: String,
    /// Path to read it from.
    pub path: PathBuf,
    /// Size in bytes.
    pub size: u64,
}

/// Larger files next to a model are data or media, not settings.
const MAX_SIDE_BYTES: u64 = 256 << 20;

/// Files of a model beside its weights: tokenizers of every make, templates, settings of generation.
const COPIED: [&str; 20] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "qwen.tiktoken",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "SYSTEM_PROMPT.txt",
];

/// Beginnings of the names of files that say what may be done with a model; they go where it goes.
const TERMS: [&str; 8] =
    ["LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY", "THIRD_PARTY", "ACCEPTABLE_USE", "ATTRIBUTION"];

/// Files this program writes itself, or that describe weights it replaces.
const REPLACED: [&str; 5] = ["config.json", "README.md", "manifest.json", "conversion.json", "params.json"];

/// Whether a top-level file called `name` belongs with a converted model. Anything that is not known to does not: a folder
/// may hold data, code and other formats of the same weights.
pub(super) fn wanted(name: &str) -> bool {
    let upper = name.to_ascii_uppercase();
    let text = |ending: &str| ending.is_empty() || [".TXT", ".MD", ".RST", ".PDF"].contains(&ending);
    let terms = |start: &&str| {
        upper.strip_prefix(start).is_some_and(|rest| text(&rest[rest.find('.').unwrap_or(rest.len())..]))
    };
    // A tokenizer for some versions of transformers, such as `tokenizer.5.03.0.json`.
    let versioned = name.strip_prefix("tokenizer.").and_then(|rest| rest.strip_suffix(".json"));
    let version = |v: &str| !v.is_empty() && v.chars().all(|c| c.is_ascii_digit() || c == '.');
    COPIED.contains(&name)
        || versioned.is_some_and(version)
        || (TERMS.iter().any(terms) && !name.chars().any(char::is_control))
}

/// Side files of `dir` sorted by name, and the names of regular files that are left behind (weights, `config.json`
/// and `README.md` not counted).
pub(super) fn side_files(dir: &Path) -> Result<(Vec<SideFile>, Vec<String>), SourceError> {
    let mut files = Vec::new();
    let mut skipped = Vec::new();
    for entry in fs::read_dir(dir)? {
        let Ok(name) = entry?.file_name().into_string() else { continue };
        // Folders, pipes and links that lead elsewhere are none of the model's files.
        let Ok((path, size)) = resolve_regular(dir, &name) else { continue };
        if wanted(&name) && size <= MAX_SIDE_BYTES {
            files.push(SideFile { name, path, size });
        } else if !name.ends_with(".safetensors")
            && !name.ends_with(".index.json")
            && !REPLACED.contains(&name.as_str())
        {
            skipped.push(name);
        }
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    skipped.sort();
    Ok((files, skipped))
}

#[cfg(test)]
mod tests {
    use super::wanted;

    #[test]
    fn what_is_copied() {
        for name in [
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.json",
            "merges.txt",
            "generation_config.json",
            "special_tokens_map.json",
            "chat_template.jinja",
            "added_tokens.json",
            "LICENSE",
            "LICENSE.txt",
            "LICENSE-MIT",
            "license.md",
            "NOTICE",
            "USE_POLICY.md",
            "tekken.json",
            "tokenizer.model",
            "spiece.model",
            "tokenizer.5.03.0.json",
        ] {
            assert!(wanted(name), "{name}");
        }
        for name in [
            "config.json",
            "README.md",
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "consolidated.00.pth",
            "x.gguf",
            "model.onnx",
            "tf_model.h5",
            "flax_model.msgpack",
            "modeling_x.py",
            "license.py",
            "golden.json",
            "training_args.json",
            "trainer_state.json",
            "notes.txt",
            ".gitattributes",
            "PYTORCH_MODEL.BIN",
            "tokenizer.x.json",
        ] {
            assert!(!wanted(name), "{name}");
        }
    }
}
