//! What `check` says of one folder.

use serde::Serialize;

use super::SCHEMA_VERSION;
use super::engines::{ENGINE_NAMES, EngineVerdict, Facts, Loads, default_path, judge};
use super::table::Table;

/// Verdicts of engines on one MLA folder.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// Version of this document.
    pub schema_version: u32,
    /// The folder as the user named it.
    pub model: String,
    /// `model_type` of its config.
    pub model_type: String,
    /// Whether tensors were read, or the config alone.
    pub weights_present: bool,
    /// The engine that was asked about; all otherwise.
    pub engine: Option<String>,
    /// Every verdict, or those of the engine that was asked about: its own class and, of vLLM, transformers' code.
    pub engines: Vec<EngineVerdict>,
    /// Whether nothing is known against the engine's running it right by itself; with none named, of any engine.
    pub passed: bool,
}

impl Check {
    /// Judge a folder. `engine` is one of [`ENGINE_NAMES`].
    pub fn new(model: &str, facts: &Facts, weights: bool, engine: Option<&str>) -> Self {
        let all = judge(facts);
        let runs = |path: &str| all.iter().any(|v| v.engine == path && v.loads != Loads::No);
        let passed = match engine {
            Some(name) => default_path(name, facts).is_some_and(runs),
            None => ENGINE_NAMES.iter().filter_map(|name| default_path(name, facts)).any(runs),
        };
        let named = |v: &EngineVerdict| match engine {
            None => true,
            Some("vllm") => v.engine.starts_with("vLLM"),
            Some(name) => default_path(name, facts) == Some(v.engine),
        };
        Self {
            schema_version: SCHEMA_VERSION,
            model: model.to_owned(),
            model_type: facts.model_type.clone(),
            weights_present: weights,
            engine: engine.map(str::to_owned),
            engines: all.iter().filter(|v| named(v)).cloned().collect(),
            passed,
        }
    }

    /// A table for people.
    pub fn text(&self, width: usize) -> String {
        let mut out = format!("{}: {}\n\n", self.model, self.model_type);
        if !self.weights_present {
            out = format!("{}: {}, judged by its config alone\n\n", self.model, self.model_type);
        }
        let mut t = Table::new(&["engine", "runs it", "why, and what to change"]);
        for v in &self.engines {
            if v.reasons.is_empty() {
                t.row([v.engine, v.loads.word(), "as it is"]);
            }
            let mut head = [v.engine, v.loads.word()];
            for (why, change) in v.reasons.iter().zip(&v.changes) {
                t.row([head[0], head[1], why]);
                t.row(["", "", &format!("-> {change}")]);
                head = ["", ""];
            }
            for warning in &v.warnings {
                t.row(["", "", &format!("note: {warning}")]);
            }
        }
        out += &t.render(width);
        out
    }
}
