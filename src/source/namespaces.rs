//! Namespaces of chat templates: the one kind of value in Jinja that can come to hold itself.
//!
//! Everything else is made of values that were there before. A namespace that holds itself, or is held by what it holds, has
//! no end: printing it takes all stack there is, which no fuel and no thread can contain.

use minijinja::machinery::{Token, tokenize};
use minijinja::syntax::SyntaxConfig;

/// Refuses a template in which a namespace could be put anywhere: each has to be made by `{% set NAME = namespace(...) %}`
/// and used by its attributes, `NAME.attribute` or `NAME['attribute']`, as all published templates do. Then only its values
/// reach other places, and none of them can hold it. A template that is no Jinja is left to the compiler.
///
/// # Errors
/// What the template does, in one sentence.
pub(super) fn stay_apart(template: &str, syntax: SyntaxConfig) -> Result<(), String> {
    let Ok(tokens) =
        tokenize(template, false, syntax).map(|t| t.map(|(token, _)| token)).collect::<Result<Vec<_>, _>>()
    else {
        return Ok(());
    };
    let at = |i: Option<usize>| i.and_then(|i| tokens.get(i));
    let ident = |i: Option<usize>| match at(i) {
        Some(Token::Ident(name)) => Some(*name),
        _ => None,
    };
    // `{% set NAME = namespace(`, where NAME is token `i`.
    let made_at = |i: usize| {
        matches!(at(i.checked_sub(2)), Some(Token::BlockStart))
            && ident(i.checked_sub(1)) == Some("set")
            && matches!(at(Some(i + 1)), Some(Token::Assign))
            && ident(Some(i + 2)) == Some("namespace")
            && matches!(at(Some(i + 3)), Some(Token::ParenOpen))
    };
    // A name that is not the attribute of something.
    let free = |i: usize| !matches!(at(i.checked_sub(1)), Some(Token::Dot));
    let names = || (0..tokens.len()).filter(|i| free(*i)).filter_map(|i| Some((i, ident(Some(i))?)));
    let made: Vec<&str> = names().filter(|(i, _)| made_at(*i)).map(|(_, name)| name).collect();
    for (i, name) in names() {
        if name == "namespace" && !i.checked_sub(2).is_some_and(made_at) {
            return Err(
                "the chat template makes a namespace other than by `{% set NAME = namespace(...) %}`".to_owned()
            );
        }
        let by_attribute = matches!(at(Some(i + 1)), Some(Token::Dot | Token::BracketOpen));
        if made.contains(&name) && !made_at(i) && !by_attribute {
            return Err(format!(
                "the chat template uses its namespace `{name}` other than by its attributes, so that it could hold itself"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apart(template: &str) -> Result<(), String> {
        stay_apart(template, SyntaxConfig::default())
    }

    #[test]
    fn namespaces_as_templates_use_them_are_fine() {
        for good in [
            "",
            "{{ messages }}{% for",
            "{% set ns = namespace(found=false, n=1) %}{% set ns.found = ns.n + 1 %}{% if ns.found or ns['n'] %}ns{% endif %}",
            "{%- set ns = namespace() -%}{% set ns.x = [ns.y, 'ns', \"namespace\"] %}{# ns namespace #}{{ m.ns ~ m.namespace }}",
            "{% set ns = namespace(a=1) %}{% set ns = namespace(b=ns.a) %}{% raw %}{{ ns }}{% endraw %} namespace(1)",
        ] {
            assert_eq!(apart(good), Ok(()), "{good}");
        }
    }

    #[test]
    fn nothing_gets_hold_of_a_namespace() {
        for bad in [
            "{% set ns = namespace() %}{% set ns.x = ns %}",
            "{% set ns = namespace() %}{% set ns.x = [ns] %}",
            "{% set ns = namespace() %}{{ f(ns) }}",
            "{% set ns = namespace() %}{% set other = ns %}",
            "{% set ns = namespace() %}{% for ns in messages %}{% endfor %}",
            "{% set a = namespace() %}{% set b = namespace(x=a) %}",
            "{% for n in [namespace()] %}{% set n.x = n %}{% endfor %}",
            "{% set a, b = namespace(), 1 %}",
            "{% set ns = namespace %}",
            "{{ f(x=namespace()) }}",
            "{% with a = namespace() %}{% endwith %}",
            "{% set f(a = namespace()) %}",
        ] {
            assert!(apart(bad).is_err(), "{bad}");
        }
    }
}
