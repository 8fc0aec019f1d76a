//! The tokenizer of a model, from `tokenizer.json`.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::SourceError;
use super::path::read_small;

/// Largest `tokenizer.json` read; the largest in the field are about 35 MB, and a hostile one takes some twenty times its
/// size to be read.
const MAX_TOKENIZER_BYTES: u64 = 48 << 20;

/// Text to token ids and back, as `tokenizer.json` says: what `tok(text)` gives in transformers by default.
///
/// One deviation is known: transformers 5 rebuilds the pre-tokenizer of some classes (`GPT2Tokenizer`) and drops what
/// the file says, such as the splitting of digits the model was trained with. The file is followed here.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model folder.
    ///
    /// # Errors
    /// [`SourceError::Tokenizer`] when the file is missing or not understood.
    pub fn from_dir(dir: &Path) -> Result<Self, SourceError> {
        let path = dir.join("tokenizer.json");
        if fs_err::symlink_metadata(&path).is_err() {
            let slow = ["tokenizer.model", "vocab.txt", "tekken.json"].iter().any(|f| dir.join(f).exists());
            let hint = if slow {
                "only the old tokenizer files are present; load it once with transformers' `AutoTokenizer` and \
                 `save_pretrained`, which writes `tokenizer.json`"
            } else {
                "copy `tokenizer.json` of the model into the folder"
            };
            return Err(SourceError::Tokenizer { path, reason: "no such file".to_owned(), hint });
        }
        let content = read_small(dir, "tokenizer.json", MAX_TOKENIZER_BYTES)?;
        Self::from_bytes(&content, path)
    }

    /// Reads the content of a `tokenizer.json`; `path` is what errors name.
    ///
    /// # Errors
    /// [`SourceError::Tokenizer`] when it is not understood.
    pub fn from_bytes(content: &[u8], path: PathBuf) -> Result<Self, SourceError> {
        let bad = |reason: String| SourceError::Tokenizer {
            path: path.clone(),
            reason,
            hint: "download the file again; if it is intact it needs a newer version of this program",
        };
        if let Some(reason) = multiplies(content) {
            return Err(bad(reason));
        }
        let read = contained(|| tokenizers::Tokenizer::from_bytes(content));
        let mut inner = read.map_err(|e| bad(e.to_owned()))?.map_err(|e| bad(e.to_string()))?;
        // A file may carry the truncation and padding of its training; `tok(text)` in transformers switches both off.
        inner.with_truncation(None).map_err(|e| bad(e.to_string()))?;
        inner.with_padding(None);
        Ok(Tokenizer { inner, path })
    }

    /// Token ids of `text` with the special tokens its post-processor adds, as `tok(text)` in transformers.
    ///
    /// The text is encoded in one piece: cutting it changes merges and whitespace runs of some pre-tokenizers.
    ///
    /// # Errors
    /// [`SourceError::Tokenizer`] when the model of the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, SourceError> {
        self.encode_with(text, true)
    }

    /// As [`Tokenizer::encode`], with a choice about special tokens: a rendered chat template already holds them.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, SourceError> {
        // `encode_fast` skips the offsets into the text, which nobody reads here; the ids are the same.
        let encoding = contained(|| self.inner.encode_fast(text, add_special_tokens));
        let encoding = encoding.map_err(|e| self.failed(e))?.map_err(|e| self.failed(e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids`, special tokens included.
    ///
    /// # Errors
    /// [`SourceError::Tokenizer`] when the decoder fails. Ids outside the vocabulary are left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String, SourceError> {
        self.decode_with(ids, false)
    }

    /// Text of `ids` without special tokens, for people to read.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn decode_plain(&self, ids: &[u32]) -> Result<String, SourceError> {
        self.decode_with(ids, true)
    }

    fn decode_with(&self, ids: &[u32], plain: bool) -> Result<String, SourceError> {
        contained(|| self.inner.decode(ids, plain)).map_err(|e| self.failed(e))?.map_err(|e| self.failed(e))
    }

    /// Number of tokens, added ones included. The embedding of the model may have more rows (padding).
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Id of a token given by its text, such as `<|im_end|>`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    fn failed(&self, e: impl std::fmt::Display) -> SourceError {
        SourceError::Tokenizer {
            path: self.path.clone(),
            reason: e.to_string(),
            hint: "check that the tokenizer belongs to the model",
        }
    }
}

thread_local! {
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is in a call whose panics become errors: a panic hook need not tell of them.
#[doc(hidden)]
pub fn panics_are_contained() -> bool {
    CONTAINED.get()
}

/// Runs a call into the tokenizer library, which panics on some files that contradict themselves. Nothing of what it worked
/// on is used afterwards.
fn contained<T>(f: impl FnOnce() -> T) -> Result<T, &'static str> {
    let before = CONTAINED.replace(true);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
    CONTAINED.set(before);
    result.map_err(|_| "the file contradicts itself")
}

/// Most that the replacements of a tokenizer may lengthen a text, together. Real ones write a blank as three bytes.
const MAX_GROWTH: f64 = 32.0;

/// Why the replacements of a tokenizer file cannot be allowed: thirty of them that each double the text are a file of a few
/// lines, and a text that no memory holds. What is no such file is left to the library to refuse.
fn multiplies(content: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Replacing {
        normalizer: Option<Value>,
        decoder: Option<Value>,
    }
    let file: Replacing = serde_json::from_slice(content).ok()?;
    for (name, part) in [("normalizer", file.normalizer), ("decoder", file.decoder)] {
        let growth = part.as_ref().map_or(1.0, growth);
        if growth > MAX_GROWTH {
            return Some(format!(
                "its {name} may make a text {growth:.0} times as long, more than {MAX_GROWTH} is refused"
            ));
        }
    }
    None
}

/// How many times as long the replacements of a normalizer or decoder can make a text, at most.
fn growth(part: &Value) -> f64 {
    let length = |v: &Value| v.as_str().map_or(0.0, |s| s.len() as f64);
    let own = match part["type"].as_str() {
        Some("Replace") => match part["pattern"].get("String") {
            // Between all the bytes.
            Some(pattern) if length(pattern) == 0.0 => f64::INFINITY,
            Some(pattern) => (length(&part["content"]) / length(pattern)).max(1.0),
            // A pattern may match single bytes.
            None => length(&part["content"]).max(1.0),
        },
        Some("Prepend") => (1.0 + length(&part["prepend"]) / 64.0).max(1.0),
        _ => 1.0,
    };
    let parts = ["normalizers", "decoders"].iter().filter_map(|k| part[*k].as_array()).flatten();
    parts.fold(own, |product, p| product * growth(p))
}
