//! What a model folder says about talking to the model: chat template, special tokens, the tokens that end a text.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value as Jinja, context};
use serde_json::Value;

use super::namespaces::stay_apart;
use super::path::read_small;
use super::{ModelSource, SourceError};

/// Largest template or settings file read. Real ones are some kB; token lists in `tokenizer_config.json` some MB.
const MAX_BYTES: u64 = 16 << 20;
/// What a template may use up: an instruction costs one, 64 bytes of text made or visited cost one. A hundred times what
/// real ones need, over within a second, and 64 MB at most.
const FUEL: u64 = 1_000_000;
/// Longest template. Real ones reach some 30 kB; each level of nesting takes stack, and a bracket is a level.
const MAX_TEMPLATE: usize = 128 << 10;
/// Stack of the thread that reads a template and runs it: 2 kB for every byte of the longest one. Only what is used is
/// taken from the system.
const STACK: usize = 256 << 20;
/// How long a template is waited for. Real ones take milliseconds.
const PATIENCE: Duration = Duration::from_secs(3);
/// Digits a width in a format may have.
const MAX_WIDTH: usize = 4;
/// The name under which the template is compiled; messages carry it.
const NAME: &str = "chat_template";

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// The Jinja template of a model, which turns a conversation into the text the model was trained on.
///
/// It comes with the model and is not trusted: it sees the messages and the special tokens, nothing else, and stops after
/// a bounded number of instructions.
#[derive(Debug)]
pub struct ChatTemplate {
    text: String,
    special: BTreeMap<String, String>,
    path: PathBuf,
}

impl ChatTemplate {
    /// The template of a model folder: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json` (its
    /// `default`, where several are named). `None` where the model has none.
    ///
    /// # Errors
    /// [`SourceError::Tokenizer`] for a file that is not understood, [`SourceError::Io`].
    pub fn from_dir(dir: &Path) -> Result<Option<Self>, SourceError> {
        let settings = read_json(dir, "tokenizer_config.json")?.unwrap_or(Value::Null);
        let own = "chat_template.jinja";
        let (text, path) = if exists(dir, own) {
            let path = dir.join(own);
            let text = String::from_utf8(read_small(dir, own, MAX_BYTES)?).map_err(|_| bad(&path, "not UTF-8"))?;
            (text, path)
        } else {
            match from_settings(&settings) {
                Some(text) => (text.to_owned(), dir.join("tokenizer_config.json")),
                None => return Ok(None),
            }
        };
        Self::new(text, special_tokens(&settings), path).map(Some)
    }

    /// The template in the content of a `tokenizer_config.json`; `path` is what errors name.
    ///
    /// # Errors
    /// As [`ChatTemplate::from_dir`].
    pub fn from_bytes(content: &[u8], path: PathBuf) -> Result<Option<Self>, SourceError> {
        let settings: Value = serde_json::from_slice(content).map_err(|e| bad(&path, &format!("not JSON: {e}")))?;
        let Some(text) = from_settings(&settings) else { return Ok(None) };
        Self::new(text.to_owned(), special_tokens(&settings), path).map(Some)
    }

    fn new(text: String, special: BTreeMap<String, String>, path: PathBuf) -> Result<Self, SourceError> {
        if text.len() > MAX_TEMPLATE {
            let reason = format!("the chat template holds {} bytes, more than the {MAX_TEMPLATE} allowed", text.len());
            return Err(bad(&path, &reason));
        }
        let template = Self { text, special, path };
        template.run(None)?;
        Ok(template)
    }

    /// The text for a conversation, ending where the model's answer begins. It holds its special tokens: encode it
    /// without adding more.
    ///
    /// # Errors
    /// [`SourceError::Tokenizer`] when the template fails, such as for a role it does not know.
    pub fn render(&self, messages: &[Message]) -> Result<String, SourceError> {
        let turn = |m: &Message| context! { role => m.role.as_str(), content => m.content.as_str() };
        let values = context! {
            messages => messages.iter().map(turn).collect::<Vec<_>>(),
            add_generation_prompt => true,
            ..Jinja::from(self.special.clone())
        };
        self.run(Some(values))
    }

    /// Compiles the template and renders `values`, on a thread whose stack holds whatever nests in it. Fuel bounds what
    /// templates do, but for lists that are sums of lists, which are made when they are read: such a thread is left to
    /// itself after a while.
    fn run(&self, values: Option<Jinja>) -> Result<String, SourceError> {
        let (sender, result) = mpsc::channel();
        let text = self.text.clone();
        let work = move || {
            let _ = sender.send(compile_and_render(&text, values));
        };
        let thread = std::thread::Builder::new().name("chat template".to_owned()).stack_size(STACK);
        let thread = thread.spawn(work)?;
        let failed = match result.recv_timeout(PATIENCE) {
            Ok(Ok(text)) => return Ok(text),
            Ok(Err(reason)) => reason,
            Err(RecvTimeoutError::Timeout) => {
                format!("the chat template did not end within {} seconds", PATIENCE.as_secs())
            }
            Err(RecvTimeoutError::Disconnected) => match thread.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(()) => "the chat template gave nothing".to_owned(),
            },
        };
        Err(bad(&self.path, &failed))
    }
}

/// The text that a template gives for `values`; nothing where it is only to be compiled.
fn compile_and_render(text: &str, values: Option<Jinja>) -> Result<String, String> {
    let environment = environment().map_err(|e| one_line(&e))?;
    // It is not registered under its name: it cannot import itself.
    let compiled = environment.template_from_named_str(NAME, text);
    let compiled = compiled.map_err(|e| format!("the chat template does not compile: {}", one_line(&e)))?;
    stay_apart(text, syntax().map_err(|e| one_line(&e))?)?;
    let Some(values) = values else { return Ok(String::new()) };
    compiled.render(values).map_err(|e| format!("the chat template failed: {}", one_line(&e)))
}

/// The syntax of templates as transformers sets it up; they are written for that.
fn syntax() -> Result<SyntaxConfig, Error> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()
}

/// Jinja as transformers sets it up.
fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(syntax()?);
    environment.set_unknown_method_callback(|state, value, method, args| {
        // `'{:>99999999999}'.format(1)`: a width is memory that no fuel is charged for.
        let wide = |s: &str| s.split(|c: char| !c.is_ascii_digit()).any(|digits| digits.len() > MAX_WIDTH);
        if method == "format" && value.as_str().is_some_and(|s| s.contains("{:{") || wide(s)) {
            return Err(Error::new(ErrorKind::InvalidOperation, "a format with a width like this is not allowed"));
        }
        minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
    });
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.add_function("raise_exception", |why: String| -> Result<Jinja, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, why))
    });
    Ok(environment)
}

/// Tokens after which a text is over: `eos_token_id` of `generation_config.json`, else of `config.json`, sorted.
///
/// # Errors
/// [`SourceError::Tokenizer`] for a `generation_config.json` that is no JSON.
pub fn end_tokens(source: &ModelSource) -> Result<Vec<u32>, SourceError> {
    let generation = read_json(&source.dir, "generation_config.json")?;
    let of = |v: &Value| -> Vec<u32> {
        let one = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        match v.get("eos_token_id") {
            Some(Value::Array(list)) => list.iter().filter_map(one).collect(),
            Some(v) => one(v).into_iter().collect(),
            None => Vec::new(),
        }
    };
    let mut ends = generation.as_ref().map(of).unwrap_or_default();
    if ends.is_empty() {
        ends = of(&source.config);
    }
    ends.sort_unstable();
    ends.dedup();
    Ok(ends)
}

fn exists(dir: &Path, name: &str) -> bool {
    fs_err::symlink_metadata(dir.join(name)).is_ok()
}

fn read_json(dir: &Path, name: &str) -> Result<Option<Value>, SourceError> {
    if !exists(dir, name) {
        return Ok(None);
    }
    let bytes = read_small(dir, name, MAX_BYTES)?;
    serde_json::from_slice(&bytes).map(Some).map_err(|e| bad(&dir.join(name), &format!("not JSON: {e}")))
}

fn from_settings(settings: &Value) -> Option<&str> {
    match settings.get("chat_template")? {
        Value::String(text) => Some(text),
        Value::Array(named) => {
            let entry = named.iter().find(|e| e["name"] == "default").or(named.first())?;
            entry["template"].as_str()
        }
        _ => None,
    }
}

/// `bos_token`, `eos_token` and their like, given as text or as an object with `content`.
fn special_tokens(settings: &Value) -> BTreeMap<String, String> {
    let Some(map) = settings.as_object() else { return BTreeMap::new() };
    let text = |v: &Value| v.as_str().or_else(|| v["content"].as_str()).map(str::to_owned);
    map.iter().filter(|(k, _)| k.ends_with("_token")).filter_map(|(k, v)| Some((k.clone(), text(v)?))).collect()
}

fn bad(path: &Path, reason: &str) -> SourceError {
    SourceError::Tokenizer {
        path: path.to_owned(),
        reason: reason.to_owned(),
        hint: "use `--raw` to give the prompt to the model as it is",
    }
}

fn one_line(e: &Error) -> String {
    let text = e.detail().map_or_else(|| e.kind().to_string(), str::to_owned);
    let line = e.line().map_or_else(String::new, |n| format!(" (line {n})"));
    format!("{}{line}", text.split_whitespace().collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(text: &str) -> Result<ChatTemplate, SourceError> {
        let special = BTreeMap::from([("eos_token".to_owned(), "</s>".to_owned())]);
        ChatTemplate::new(text.to_owned(), special, "t".into())
    }

    fn talk() -> Vec<Message> {
        let message = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
        vec![message("system", " be <brief> "), message("user", "hi & bye")]
    }

    #[test]
    fn what_templates_use_works() {
        let text = "{% set ns = namespace(found=false) %}\n\
                    {%- for m in messages -%}\n    {% if m['role'] == 'system' %}\n{% set ns.found = true %}\n\
                    {{ m.content.strip() | trim }}|{% continue %}{% endif %}\n\
                    [{{ m['role'].upper() + ':' + m['content'][:2] }}]{{ eos_token }}{{ loop.index0 }}\
                    {%- endfor %}{% if ns.found and tools is not defined and not documents %}{{ m is defined }}{% endif %}\
                    {% if add_generation_prompt %}<a>{% endif %}";
        let out = template(text).unwrap().render(&talk()).unwrap();
        assert_eq!(out, "be <brief>|[USER:hi]</s>1False<a>");
    }

    #[test]
    fn templates_that_refuse_fail_or_run_for_ever_are_errors() {
        let refusing = template("{{ raise_exception('roles must alternate') }}").unwrap();
        let error = refusing.render(&talk()).unwrap_err().to_string();
        assert!(error.contains("roles must alternate") && error.contains("--raw"), "{error}");
        assert!(template("{% for %}").is_err());
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x{% endfor %}\
                       {% endfor %}{% endfor %}";
        assert!(template(endless).unwrap().render(&talk()).is_err());
        // Found by fuzzing: printing it took all stack there was.
        let itself = template("{% set ns = namespace(x=1) %}{% set ns.x = ns %}{{ ns }}").unwrap_err().to_string();
        assert!(itself.contains("`ns`") && itself.contains("--raw"), "{itself}");
        let through_import =
            "{% set ns = namespace() %}{% import 'chat_template' as t %}{% set t.ns.x = t.ns %}{{ t.ns }}";
        assert!(template(through_import).unwrap().render(&talk()).is_err());
    }

    #[test]
    fn the_default_of_several_templates_is_taken() {
        let several = serde_json::json!({"chat_template": [{"name": "tools", "template": "a"},
            {"name": "default", "template": "b"}], "eos_token": {"content": "</s>"}, "bos_token": null});
        assert_eq!(from_settings(&several), Some("b"));
        assert_eq!(special_tokens(&several), BTreeMap::from([("eos_token".to_owned(), "</s>".to_owned())]));
    }
}
