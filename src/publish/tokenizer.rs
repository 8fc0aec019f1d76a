//! The tokenizer files of an output.

use crate::observe::{Event, Observer};
use crate::source::ModelSource;
use crate::target::{self, Target, TokenizerFiles};

/// Largest tokenizer that is read into memory.
const MAX_BYTES: u64 = 48 << 20;

/// Files of the source's tokenizer as the class `class` has to have them, where those are others: names and contents. Why they
/// are others is reported as a note.
pub fn tokenizer_files(source: &ModelSource, class: Target, observer: &dyn Observer) -> Vec<(String, Vec<u8>)> {
    let read = |name: &str| {
        let file = source.files.iter().find(|f| f.name == name && f.size <= MAX_BYTES)?;
        fs_err::read(&file.path).ok()
    };
    let model_type = source.config.get("model_type").and_then(serde_json::Value::as_str).unwrap_or_default();
    let fitted = read("tokenizer.json").map_or_else(TokenizerFiles::default, |tokenizer| {
        let config = read("tokenizer_config.json");
        target::tokenizer_files(model_type, class.brings_code(), config.as_deref(), &tokenizer)
    });
    if let Some(note) = fitted.note {
        observer.event(Event::Note(note));
    }
    fitted.files
}
