//! Language models inside multimodal ones.

use serde_json::{Map, Value};

use super::{ArchError, Architecture};
use crate::source::TensorDirectory;

/// Where multimodal classes keep their language model: what `model.` of a plain model becomes, and the head.
const PLACES: [(&str, &str); 4] = [
    ("language_model.model.", "language_model.lm_head.weight"),
    ("model.language_model.", "lm_head.weight"),
    ("model.language_model.model.", "model.language_model.lm_head.weight"),
    ("model.text_model.", "lm_head.weight"),
];

/// The config of the language model in a multimodal config; `None` where there is none.
///
/// What such configs say once for all parts (dtype, tied head, special tokens) is added where the part is silent.
pub fn language_config(config: &Value) -> Option<Value> {
    let map = config.as_object()?;
    let mut text = map.get("text_config")?.as_object()?.clone();
    for key in ["tie_word_embeddings", "torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id"] {
        if let (Some(value), false) = (map.get(key), text.contains_key(key)) {
            text.insert(key.to_owned(), value.clone());
        }
    }
    Some(Value::Object(text))
}

/// An unknown type that wraps a language model is told as that.
pub(super) fn explain(map: &Map<String, Value>, error: ArchError) -> ArchError {
    let inner = map.get("text_config").and_then(Value::as_object);
    match (error, inner) {
        (ArchError::UnknownFamily { model_type, .. }, Some(text)) => {
            let of = text.get("model_type").and_then(Value::as_str).unwrap_or("unnamed");
            ArchError::Unsupported {
                what: format!("`{model_type}`, a multimodal model around a language model of type `{of}`,"),
                hint: Some("`--text-only` takes the language model alone".into()),
            }
        }
        (error, _) => error,
    }
}

impl Architecture {
    /// Take the names of the language model from inside a multimodal checkpoint; everything else in it is read past.
    ///
    /// # Errors
    /// [`ArchError::Mismatch`] when it is in none of the known places.
    pub fn look_inside(&mut self, tensors: &TensorDirectory) -> Result<(), ArchError> {
        if tensors.get(&self.names.embed).is_some() {
            return Ok(());
        }
        let rest = self.names.embed.strip_prefix("model.").unwrap_or(&self.names.embed).to_owned();
        match PLACES.iter().find(|(body, _)| tensors.get(&format!("{body}{rest}")).is_some()) {
            Some((body, head)) => {
                self.names.move_inside("model.", body, head);
                Ok(())
            }
            None => Err(ArchError::Mismatch {
                lines: vec![format!("no language model is found: no tensor name ends with `{rest}` in a known place")],
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_said_once_holds_for_the_part() {
        let config = json!({
            "model_type": "llava", "torch_dtype": "bfloat16", "tie_word_embeddings": true,
            "text_config": { "model_type": "llama", "tie_word_embeddings": false }
        });
        let text = language_config(&config).unwrap();
        assert_eq!(text["model_type"], "llama");
        assert_eq!(text["torch_dtype"], "bfloat16");
        assert_eq!(text["tie_word_embeddings"], false);
        assert!(language_config(&json!({ "model_type": "llama" })).is_none());
        let error = Architecture::from_config(&config).unwrap_err().to_string();
        assert!(error.contains("`llava`") && error.contains("--text-only"), "{error}");
    }
}
