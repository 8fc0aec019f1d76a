//! The files of a model folder that are no weights.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use serde::Serialize;
use serde_json::Value;

use super::publisher::Publisher;
use crate::arch::Architecture;
use crate::error::ConvertError;
use crate::source::ModelSource;
use crate::write::WriteError;

/// The report of a conversion, which goes with a model whose latents are rotated or shared out later.
const CONVERSION_FILE: &str = "conversion.json";

/// Files that the caller wants beside the weights, such as a model card: name and content, made of the report.
pub type Extras<'a, R> = &'a dyn Fn(&R) -> Vec<(String, Vec<u8>)>;

/// `config.json` of the output.
#[derive(Debug, Clone, Copy)]
pub enum Config<'a> {
    /// One that the command made. It has to be readable by the rules this tool reads models with.
    Made(&'a Value),
    /// The source's, whose class the output is loaded by: the code it names goes with it, and the report of the conversion.
    Kept {
        /// Top-level keys that no longer hold, such as the quantisation of a model that was widened.
        without: &'a [&'a str],
        /// Top-level keys with other values.
        with: &'a [(&'a str, Value)],
    },
}

/// What a command did: shown to the user, and kept in the folder.
pub trait Report: Serialize {
    /// Name of its file in the folder.
    const FILE: &'static str;

    /// What is written: the part that the same inputs and settings give again, on any machine, under any path.
    ///
    /// # Errors
    /// A report that is no JSON.
    fn document(&self) -> Result<Value, ConvertError> {
        let mut value = serde_json::to_value(self).map_err(not_json)?;
        if let Some(map) = value.as_object_mut() {
            map.remove("output");
        }
        Ok(value)
    }
}

/// sha256 of the header of each of the source's weight files, by file name: what a report says about where a model is from.
pub fn fingerprint(source: &ModelSource) -> BTreeMap<String, String> {
    source.fingerprint().into_iter().map(|f| (f.file, f.header_sha256)).collect()
}

impl Publisher<'_> {
    /// Check that the source's weights did not change while they were read, and write everything that is neither weights nor
    /// report: `config.json`, the `own` files of the command (name, content), and the source's tokenizer, settings of
    /// generation and licence.
    ///
    /// # Errors
    /// A source that changed; a config that this tool could not read again; [`WriteError::BadFile`] for a name that is not
    /// plain or is taken; I/O errors.
    pub fn side_files(&mut self, config: Config<'_>, own: &[(&str, &[u8])]) -> Result<(), ConvertError> {
        self.source.check_unchanged()?;
        match config {
            Config::Made(config) => {
                // What is published has to be readable.
                Architecture::from_config(config)?;
                self.json("config.json", config)?;
            }
            Config::Kept { without, with } => {
                let mut config = self.source.config.clone();
                if let Some(map) = config.as_object_mut() {
                    without.iter().for_each(|key| drop(map.remove(*key)));
                    map.extend(with.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
                }
                self.json("config.json", &config)?;
            }
        }
        for (name, content) in own {
            self.writer.write_file(name, content)?;
        }
        for file in self.source.files.iter().filter(|file| !own.iter().any(|(name, _)| *name == file.name)) {
            self.writer.copy_file(&file.name, &file.path)?;
        }
        if matches!(config, Config::Kept { .. }) {
            for name in code_files(&self.source.config).iter().map(String::as_str).chain([CONVERSION_FILE]) {
                let path = self.source.dir.join(name);
                if path.is_file() {
                    self.writer.copy_file(name, &path)?;
                }
            }
        }
        Ok(())
    }

    /// Write what `extras` makes of the report, and the reproducible part of the report itself.
    ///
    /// # Errors
    /// [`WriteError::BadFile`] for a name that is not plain or is taken; I/O errors.
    pub fn report<R: Report>(&mut self, report: &R, extras: Extras<'_, R>) -> Result<(), ConvertError> {
        for (name, bytes) in extras(report) {
            self.writer.write_file(&name, &bytes)?;
        }
        self.json(R::FILE, &report.document()?)
    }

    /// Indented JSON with a final newline.
    fn json(&mut self, name: &str, value: &Value) -> Result<(), ConvertError> {
        let mut bytes = serde_json::to_vec_pretty(value).map_err(not_json)?;
        bytes.push(b'\n');
        Ok(self.writer.write_file(name, &bytes)?)
    }
}

fn not_json(error: serde_json::Error) -> ConvertError {
    WriteError::from(io::Error::from(error)).into()
}

/// Files of the classes that a config maps to code beside it: `modeling_x.Class` is the class of `modeling_x.py`.
fn code_files(config: &Value) -> BTreeSet<String> {
    let mapped = config.get("auto_map").and_then(Value::as_object);
    let file = |value: &Value| value.as_str().and_then(|v| v.split_once('.')).map(|(module, _)| format!("{module}.py"));
    mapped.into_iter().flat_map(|map| map.values().filter_map(file)).collect()
}
