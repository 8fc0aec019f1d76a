//! The methods there are: one line each.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use super::{Entry, Method, attention_aware, care, exact, mha2mla, transmla, x_ecomla};

/// Every method, in the order the documentation lists them; the first is the default.
pub const METHODS: &[Entry] =
    &[attention_aware::ENTRY, care::ENTRY, transmla::ENTRY, x_ecomla::ENTRY, mha2mla::ENTRY, exact::ENTRY];

/// Methods that `demo` shows: nothing lost, as published, ours.
pub const DEMONSTRATED: [&str; 3] = [exact::ENTRY.name, transmla::ENTRY.name, attention_aware::ENTRY.name];

/// A method with its settings, whichever it is.
#[derive(Clone)]
pub struct MethodChoice(Arc<dyn Method>);

impl MethodChoice {
    /// Every method at its defaults, in the order of the registry.
    pub fn all() -> Vec<MethodChoice> {
        METHODS.iter().filter_map(|entry| (entry.make)(&[]).ok()).collect()
    }

    /// The method of that name, at its defaults.
    pub fn named(name: &str) -> Option<MethodChoice> {
        METHODS.iter().find(|entry| entry.name == name).and_then(|entry| (entry.make)(&[]).ok())
    }

    /// What the registry knows of it.
    pub fn entry(&self) -> &'static Entry {
        METHODS.iter().find(|entry| entry.name == self.0.name()).unwrap_or(&METHODS[0])
    }
}

impl<M: Method + 'static> From<M> for MethodChoice {
    fn from(method: M) -> Self {
        Self(Arc::new(method))
    }
}

impl Default for MethodChoice {
    fn default() -> Self {
        attention_aware::AttentionAware::default().into()
    }
}

impl Deref for MethodChoice {
    type Target = dyn Method;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl PartialEq for MethodChoice {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name() && self.settings() == other.settings()
    }
}

impl fmt::Debug for MethodChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for MethodChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_can_be_made_and_is_the_one_it_says() {
        for entry in METHODS {
            let made = (entry.make)(&[]).expect("defaults");
            assert_eq!((made.name(), made.entry().name), (entry.name, entry.name));
            assert_eq!(MethodChoice::named(entry.name), Some(made.clone()));
            assert!(made.arguments().is_empty(), "{}: defaults need no argument", entry.name);
            assert!(made.settings().is_object());
        }
    }

    #[test]
    fn an_option_names_the_methods_that_have_it() {
        for entry in METHODS {
            for option in entry.options {
                assert!(option.methods.contains(&entry.name), "--{} of {}", option.name, entry.name);
                let having = METHODS.iter().filter(|e| e.options.iter().any(|o| o.name == option.name)).count();
                assert_eq!(having, option.methods.len(), "--{}", option.name);
                assert!(option.values.iter().all(|value| (option.check)(value).is_ok()));
            }
        }
    }
}
