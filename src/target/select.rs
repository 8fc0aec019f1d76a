//! Which class is written for a source, and why another cannot be.

use super::classes::CLASSES;
use super::{Target, TargetChoice};
use crate::arch::Architecture;
use crate::error::ConvertError;

/// What a class is wanted for.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    /// The source.
    pub arch: &'a Architecture,
    /// What was asked for.
    pub choice: TargetChoice,
    /// Whether norms of queries and keys are replaced by linear maps before the class sees them.
    pub linear_norms: bool,
    /// Whether some layers keep the source's attention.
    pub two_kinds: bool,
}

/// The class that `auto` takes: the first of the registry that holds the source and has no caveat, or else the last. With the
/// reason.
pub fn choose(arch: &Architecture, linear_norms: bool) -> (Target, String) {
    let last = CLASSES[CLASSES.len() - 1];
    let mut alternatives = String::new();
    for class in CLASSES[..CLASSES.len() - 1].iter().filter(|class| class.obstacles(arch, linear_norms).is_empty()) {
        match class.caveat(arch) {
            None => return (*class, class.merit().to_owned()),
            Some(caveat) => alternatives.extend(["; ", caveat.alternative]),
        }
    }
    let against = CLASSES[0].obstacles(arch, linear_norms);
    (last, format!("no stock class holds {}{alternatives}", against.join(", ")))
}

/// The class that is written, known to hold the source. Decisions taken for the user are added to `decisions`.
///
/// # Errors
/// [`ConvertError::Refused`] where the class that was asked for, or every class, has no place for something of the source.
pub fn select(wanted: &Wanted<'_>, decisions: &mut Vec<String>) -> Result<Target, ConvertError> {
    let Wanted { arch, choice, linear_norms: linear, two_kinds } = *wanted;
    let (class, why) = match choice {
        _ if two_kinds => (of_two_kinds(choice)?, "it holds layers of both kinds".to_owned()),
        TargetChoice::Auto => choose(arch, linear),
        TargetChoice::Class(class) => (class, String::new()),
    };
    let against = class.obstacles(arch, linear);
    if !against.is_empty() {
        return Err(ConvertError::refused(
            format!("the target `{class}` has no place for {}", against.join(", ")),
            alternative(wanted, class, against.len()),
        ));
    }
    if choice == TargetChoice::Auto && class != CLASSES[0] {
        decisions.push(format!("target {class}: {why}"));
    }
    if choice == TargetChoice::Class(class)
        && let Some(caveat) = class.caveat(arch)
    {
        decisions.push(caveat.warning.to_owned());
    }
    Ok(class)
}

/// What to ask for instead of `class`, which has `obstacles` obstacles.
fn alternative(wanted: &Wanted<'_>, class: Target, obstacles: usize) -> String {
    let Wanted { arch, linear_norms, .. } = *wanted;
    let (other, _) = choose(arch, linear_norms);
    if !other.obstacles(arch, linear_norms).is_empty() {
        return "no target holds them".to_owned();
    }
    let holds = format!("`--target {other}` holds them");
    if linear_norms || class.obstacles(arch, true).len() == obstacles {
        return holds;
    }
    format!("{holds}; methods that compress replace norms of queries and keys by linear maps")
}

/// The class that holds layers of both kinds.
fn of_two_kinds(choice: TargetChoice) -> Result<Target, ConvertError> {
    let first = Target::first(|class| class.holds_two_kinds_of_layers());
    match (choice, first) {
        (TargetChoice::Class(class), _) if class.holds_two_kinds_of_layers() => Ok(class),
        (TargetChoice::Auto, Some(class)) => Ok(class),
        (choice, first) => Err(ConvertError::refused(
            format!("the target `{}` has one kind of attention for all layers, --mla-layers makes two", choice.name()),
            match first {
                Some(class) => format!("`--target {class}` holds both"),
                None => "no target holds both".to_owned(),
            },
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn llama(more: Value) -> Architecture {
        let mut config = json!({
            "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
            "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 50, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 128
        });
        let Value::Object(more) = more else { unreachable!("an object") };
        config.as_object_mut().expect("an object").extend(more);
        Architecture::from_config(&config).expect("a config")
    }

    fn sources() -> Vec<Architecture> {
        let experts = json!({
            "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": null
        });
        let all = json!({
            "model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": null
        });
        let odd = json!({ "hidden_size": 66, "head_dim": 16 });
        [json!({}), json!({ "attention_bias": true }), json!({ "mlp_bias": true }), experts, all, odd]
            .into_iter()
            .map(llama)
            .collect()
    }

    #[test]
    fn auto_takes_the_first_class_that_holds_the_source_without_a_caveat() {
        let mut taken = Vec::new();
        for arch in sources() {
            let (class, why) = choose(&arch, false);
            let fits = |class: &&Target| class.obstacles(&arch, false).is_empty() && class.caveat(&arch).is_none();
            assert_eq!(Some(&class), CLASSES.iter().find(fits), "{why}");
            let wanted = Wanted { arch: &arch, choice: TargetChoice::Auto, linear_norms: false, two_kinds: false };
            let mut decisions = Vec::new();
            assert_eq!(select(&wanted, &mut decisions).expect("holds it"), class);
            assert_eq!(decisions.len(), usize::from(class != CLASSES[0]), "{decisions:?}");
            taken.push(class.name());
        }
        assert_eq!(taken, ["deepseek_v3", "deepseek_v3", "hf-remote", "hf-remote", "deepseek_v2", "deepseek_v3"]);
    }

    #[test]
    fn what_is_asked_for_is_taken_or_refused_with_another() {
        for arch in sources() {
            for class in CLASSES.iter().copied() {
                let wanted = Wanted { arch: &arch, choice: class.into(), linear_norms: false, two_kinds: false };
                let mut decisions = Vec::new();
                match select(&wanted, &mut decisions) {
                    Ok(taken) => {
                        assert_eq!(taken, class);
                        assert_eq!(decisions.len(), usize::from(class.caveat(&arch).is_some()));
                    }
                    Err(e) => {
                        let (said, other) = (e.to_string(), choose(&arch, false).0);
                        assert!(!class.obstacles(&arch, false).is_empty());
                        assert!(said.contains(class.name()), "{said}");
                        assert!(said.ends_with(&format!("hint: `--target {other}` holds them")), "{said}");
                    }
                }
            }
        }
    }

    #[test]
    fn layers_of_two_kinds_go_to_a_class_that_holds_both() {
        let arch = llama(json!({}));
        let at = |choice| {
            let mut decisions = Vec::new();
            select(&Wanted { arch: &arch, choice, linear_norms: true, two_kinds: true }, &mut decisions)
                .map(|class| (class, decisions))
        };
        for choice in TargetChoice::all() {
            match (choice, at(choice)) {
                (TargetChoice::Auto, made) => {
                    let (class, decisions) = made.expect("some class holds both");
                    assert!(class.holds_two_kinds_of_layers() && decisions.len() == 1, "{decisions:?}");
                }
                (TargetChoice::Class(class), made) => {
                    assert_eq!(made.is_ok(), class.holds_two_kinds_of_layers(), "{class}");
                }
            }
        }
    }
}
