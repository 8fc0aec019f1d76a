//! What a run remembers, and how the next one goes on with it.
//!
//! The plan goes to the journal whole, once it is made, and an entry follows for each layer. That one says how far the weight
//! files are, with their hashes, and names the files that hold the hidden states of the calibration tokens; all of that is on
//! the disk before the entry is.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::ConvertError;
use crate::factor::decompose;
use crate::methods::{Case, LayerReport};
use crate::observe::{Event, Observer};
use crate::plan::Blueprint;
use crate::source::{sha256, sha256_file};
use crate::stream::{StateFile, load};
use crate::write::exact_json::{freeze, thaw};
use crate::write::{JournalRecord, Mark, Progress, ShardPlan, Staging, verify_marks};

/// Journal entry of the plan.
const PLAN: &str = "plan";
/// Journal entry of a layer.
const LAYER: &str = "layer";

/// A finished layer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Finished {
    /// Layer index.
    pub layer: usize,
    /// Its figures.
    pub report: LayerReport,
    /// Radians per token of each rotated slot.
    pub frequencies: Vec<f64>,
    /// How far the weight files are.
    pub mark: Mark,
    /// Hidden states at the input of the next layer, by stream; none after the last layer, or where there are none.
    pub streams: BTreeMap<String, StateFile>,
}

/// What an unfinished run left, in the order it was made.
#[derive(Debug, Default)]
pub(crate) struct Saved {
    plan: Option<Blueprint>,
    layers: Vec<Finished>,
    /// Journal entries up to and including the plan's, and each layer's.
    entries: Vec<usize>,
}

/// Where a run begins.
#[derive(Debug, Default)]
pub(super) struct Start {
    /// Layers that are finished.
    pub layers: Vec<Finished>,
    /// The weight files up to there.
    pub progress: Progress,
    /// Hidden states at the input of the first layer to convert, by stream.
    pub streams: BTreeMap<String, StateFile>,
    /// Journal entries to keep.
    pub entries: usize,
}

impl Saved {
    /// Reads a journal. What makes no sense ends it.
    pub fn read(record: &JournalRecord) -> Self {
        let mut saved = Saved::default();
        for (n, entry) in record.entries.iter().enumerate() {
            if let Some(value) = entry.get(PLAN) {
                let Some(plan) = thaw(value) else { break };
                saved.plan = Some(plan);
                saved.entries = vec![n + 1];
                saved.layers.clear();
            } else if let Some(value) = entry.get(LAYER) {
                let Some(finished) = thaw::<Finished>(value) else { break };
                if saved.plan.is_none() || finished.layer != saved.layers.len() {
                    break;
                }
                saved.layers.push(finished);
                saved.entries.push(n + 1);
            }
        }
        saved
    }

    /// The plan. `None`: it has to be made.
    pub fn plan(&self) -> Option<Blueprint> {
        self.plan.clone()
    }

    /// Layers that the journal says are finished.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Checks what lies on the disk, and goes back to the last layer for which all of it is whole.
    ///
    /// # Errors
    /// I/O errors.
    pub(super) fn start(
        mut self,
        staging: &Staging,
        plan: &ShardPlan,
        streams: &[&str],
        last: usize,
    ) -> Result<Start, ConvertError> {
        let marks: Vec<Mark> = self.layers.iter().map(|l| l.mark.clone()).collect();
        let mut good = verify_marks(staging.dir(), plan, &marks)?;
        // The first stands for no layer.
        while good.len() > 1 {
            let count = good.len() - 1;
            let finished = &self.layers[count - 1];
            let mut states = BTreeMap::new();
            let needed: &[&str] = if count == last { &[] } else { streams };
            for name in needed {
                if let Some(file) = finished.streams.get(*name)
                    && load(staging.root(), file)?.is_some()
                {
                    states.insert((*name).to_owned(), file.clone());
                }
            }
            if states.len() == needed.len() {
                self.layers.truncate(count);
                let progress = good.pop().unwrap_or_default();
                let entries = self.entries.get(count).copied().unwrap_or_default();
                return Ok(Start { layers: self.layers, progress, streams: states, entries });
            }
            good.pop();
        }
        Ok(Start { entries: self.entries.first().copied().unwrap_or_default(), ..Start::default() })
    }
}

/// Adds the plan to the journal.
///
/// # Errors
/// I/O errors.
pub(super) fn planned(staging: &mut Staging, plan: &Blueprint, observer: &dyn Observer) -> Result<(), ConvertError> {
    staging.append(&json!({ PLAN: freeze(plan) }))?;
    // From here on there is something to lose.
    staging.keep(true);
    observer.event(Event::Checkpoint { folder: staging.root().to_owned(), done: 0 });
    Ok(())
}

/// Adds a finished layer to the journal, and tells the observer.
pub(super) fn finished(staging: &mut Staging, layer: &Finished, observer: &dyn Observer) -> Result<(), ConvertError> {
    staging.append(&json!({ LAYER: freeze(layer) }))?;
    observer.event(Event::Checkpoint { folder: staging.root().to_owned(), done: layer.layer as u64 + 1 });
    Ok(())
}

/// Everything that decides what a run writes, by the name a user knows it by.
///
/// # Errors
/// Files that cannot be read.
pub(super) fn identity(case: &Case<'_>, windows: &[Vec<u32>]) -> Result<BTreeMap<String, String>, ConvertError> {
    let mut out = BTreeMap::new();
    let mut add = |name: String, value: String| drop(out.insert(name, value));
    add("the version of gqa2mla".into(), env!("CARGO_PKG_VERSION").into());
    add("the machine's architecture".into(), std::env::consts::ARCH.into());
    if let Some(library) = decompose::reported() {
        add("the linear algebra".into(), library);
    }
    add("the model".into(), case.source.spec.clone());
    if let Some(revision) = &case.source.revision {
        add("the model's revision".into(), revision.clone());
    }
    add("`config.json`".into(), sha256(case.source.config.to_string().as_bytes()));
    for file in case.source.fingerprint() {
        add(format!("the size of `{}`", file.file), file.bytes.to_string());
        add(format!("the header of `{}`", file.file), file.header_sha256);
        if let Some(time) = file.modified {
            add(format!("the modification time of `{}`", file.file), time.to_string());
        }
    }
    for file in &case.source.files {
        let digest = sha256_file(&file.path).map_err(crate::source::SourceError::from)?;
        add(format!("`{}`", file.name), digest.sha256);
    }
    flatten("", &serde_json::to_value(case.settings).unwrap_or_default(), &mut add);
    let tokens: Vec<u8> = windows.iter().flatten().flat_map(|t| t.to_le_bytes()).collect();
    if !windows.is_empty() {
        add("the calibration text".into(), sha256(&tokens));
    }
    Ok(out)
}

fn flatten(name: &str, value: &Value, add: &mut impl FnMut(String, String)) {
    match value {
        Value::Object(map) => {
            let inner = |key: &String| if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
            map.iter().for_each(|(key, value)| flatten(&inner(key), value, add));
        }
        other => add(format!("setting `{name}`"), other.to_string()),
    }
}
