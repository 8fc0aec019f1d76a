//! Opening a model: from what the user typed to checked files.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::side::{SideFile, side_files};
use super::{SourceError, TensorDirectory, Tokenizer, WeightFingerprint, config, index};
use crate::observe::{Event, Observer};

/// How to open a model.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct OpenOptions {
    /// Use only the local hub cache. `None`: as `HF_HUB_OFFLINE` says.
    pub hub_offline: Option<bool>,
    /// Branch, tag or commit on the hub, where the id does not carry one (`org/name@revision`). `None`: `main`.
    pub revision: Option<String>,
    /// Folder of the hub cache. `None`: `HF_HUB_CACHE`, else `$HF_HOME/hub`, else `~/.cache/huggingface/hub`.
    pub hub_cache: Option<PathBuf>,
    /// Address of the hub. `None`: `HF_ENDPOINT`, else the public hub.
    pub hub_endpoint: Option<String>,
    /// How long the hub may say nothing during a download. `None`: `HF_HUB_DOWNLOAD_TIMEOUT` seconds, else a minute.
    pub hub_stall: Option<std::time::Duration>,
    /// Open quantised weights too, where they are only inspected: a converted model with FP8 blocks, say.
    pub allow_quantised: bool,
}

/// A checkpoint on disk, every file of it checked.
#[derive(Debug)]
#[non_exhaustive]
pub struct ModelSource {
    /// Folder that holds the files.
    pub dir: PathBuf,
    /// What the user typed.
    pub spec: String,
    /// Commit on the hub, where the model came from there.
    pub revision: Option<String>,
    /// `config.json`, an object.
    pub config: Value,
    /// All tensors.
    pub tensors: TensorDirectory,
    /// Files to carry over, sorted by name.
    pub files: Vec<SideFile>,
    /// Names of files that are not carried over (code, media, pickled weights), sorted.
    pub skipped: Vec<String>,
}

impl ModelSource {
    /// Opens `spec`: an existing folder, else a hub id `org/name[@revision]`, which is downloaded to the hub cache.
    ///
    /// A download takes only `config.json`, safetensors weights with their index, and the tokenizer and generation
    /// files; every file is checked against the size (and for large files the hash) the hub announces.
    /// `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE` and `HF_HUB_DOWNLOAD_TIMEOUT` are honoured.
    ///
    /// # Errors
    /// Anything missing, malformed, quantised or unreachable; see [`SourceError`].
    pub fn open(spec: &str, options: &OpenOptions, observer: &dyn Observer) -> Result<Self, SourceError> {
        let path = Path::new(spec);
        if path.is_dir() {
            return Self::open_folder(path, spec, None, options, observer);
        }
        if path.exists() {
            return Err(SourceError::NotAFolder { path: path.to_owned() });
        }
        Self::open_hub(spec, options, observer)
    }

    #[cfg(feature = "hub")]
    fn open_hub(spec: &str, options: &OpenOptions, observer: &dyn Observer) -> Result<Self, SourceError> {
        let snapshot = super::hub::fetch(spec, options, observer)?;
        Self::open_folder(&snapshot.dir, spec, Some(snapshot.commit), options, observer)
    }

    #[cfg(not(feature = "hub"))]
    fn open_hub(spec: &str, _: &OpenOptions, _: &dyn Observer) -> Result<Self, SourceError> {
        Err(SourceError::HubDisabled { spec: spec.to_owned() })
    }

    fn open_folder(
        dir: &Path,
        spec: &str,
        revision: Option<String>,
        options: &OpenOptions,
        observer: &dyn Observer,
    ) -> Result<Self, SourceError> {
        let config = config::read_config(dir)?;
        if !options.allow_quantised {
            // Before the weights: a quantised model may have them in a form the reader would refuse less clearly.
            config::refuse_quantised(&config, &TensorDirectory::default())?;
        }
        let (tensors, warnings) = index::open_weights(dir)?;
        for text in warnings {
            observer.event(Event::Warning(text));
        }
        if !options.allow_quantised {
            config::refuse_quantised(&config, &tensors)?;
        }
        let (files, skipped) = side_files(dir)?;
        Ok(ModelSource { dir: dir.to_owned(), spec: spec.to_owned(), revision, config, tensors, files, skipped })
    }

    /// The tokenizer of the model.
    ///
    /// # Errors
    /// As [`Tokenizer::from_dir`].
    pub fn tokenizer(&self) -> Result<Tokenizer, SourceError> {
        Tokenizer::from_dir(&self.dir)
    }

    /// Identity of every weight file, for provenance.
    pub fn fingerprint(&self) -> Vec<WeightFingerprint> {
        self.tensors.fingerprint()
    }

    /// Checks that no weight file changed since the model was opened; to be called before anything is published.
    ///
    /// # Errors
    /// [`SourceError::Changed`].
    pub fn check_unchanged(&self) -> Result<(), SourceError> {
        self.tensors.check_unchanged()
    }
}
