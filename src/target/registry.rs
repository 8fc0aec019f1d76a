//! A target class by its name, and the choice of one.

use std::fmt;
use std::ops::Deref;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::class::Class;
use super::classes::CLASSES;

/// A class of the registry, whichever it is. JSON has its [`Class::id`].
#[derive(Clone, Copy)]
pub struct Target(&'static dyn Class);

impl Target {
    /// The handle of a class.
    pub(super) const fn new(class: &'static dyn Class) -> Self {
        Self(class)
    }

    /// The class of that name on the command line.
    pub fn named(name: &str) -> Option<Self> {
        CLASSES.iter().copied().find(|class| class.name() == name)
    }

    /// The class whose configs have this `model_type`.
    pub fn of_model_type(model_type: &str) -> Option<Self> {
        Self::first(|class| class.model_type() == model_type)
    }

    /// Whether its code is a file in the folder, which a loader has to be told to trust.
    pub fn brings_code(self) -> bool {
        !self.files().is_empty()
    }

    /// The first class of the registry for which `holds`.
    pub fn first(holds: impl Fn(&dyn Class) -> bool) -> Option<Self> {
        CLASSES.iter().copied().find(|class| holds(&**class))
    }
}

impl Deref for Target {
    type Target = dyn Class;

    fn deref(&self) -> &Self::Target {
        self.0
    }
}

impl PartialEq for Target {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for Target {}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for Target {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.id())
    }
}

impl<'de> Deserialize<'de> for Target {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let id = String::deserialize(deserializer)?;
        Self::first(|class| class.id() == id).ok_or_else(|| D::Error::custom(format!("unknown target class `{id}`")))
    }
}

/// The class that is asked for. JSON has `auto` or the class's [`Class::id`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TargetChoice {
    /// The first of the registry that holds the source.
    #[default]
    Auto,
    /// This one.
    Class(Target),
}

impl TargetChoice {
    /// Name of the choice that leaves it to the tool.
    const AUTO: &str = "auto";

    /// Every choice, in the order the documentation lists them.
    pub fn all() -> impl Iterator<Item = Self> {
        std::iter::once(Self::Auto).chain(CLASSES.iter().copied().map(Self::Class))
    }

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => Self::AUTO,
            Self::Class(class) => class.name(),
        }
    }

    /// The choice of that name on the command line.
    pub fn named(name: &str) -> Option<Self> {
        Self::all().find(|choice| choice.name() == name)
    }
}

impl From<Target> for TargetChoice {
    fn from(class: Target) -> Self {
        Self::Class(class)
    }
}

impl Serialize for TargetChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str(Self::AUTO),
            Self::Class(class) => class.serialize(serializer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_is_the_one_its_names_say() {
        for (i, class) in CLASSES.iter().enumerate() {
            assert_eq!(Target::named(class.name()), Some(*class));
            assert_eq!(TargetChoice::named(class.name()), Some(TargetChoice::Class(*class)));
            let json = serde_json::to_string(class).expect("a string");
            assert_eq!(json, format!("\"{}\"", class.id()));
            assert_eq!(serde_json::to_string(&TargetChoice::from(*class)).expect("a string"), json);
            assert_eq!(serde_json::from_str::<Target>(&json).expect("the class"), *class);
            for other in &CLASSES[i + 1..] {
                assert!(class.name() != other.name() && class.id() != other.id(), "{class} and {other}");
                assert_ne!(class.model_type(), other.model_type());
                assert_ne!(class, other);
            }
        }
        assert_eq!(TargetChoice::named("auto"), Some(TargetChoice::Auto));
        assert_eq!(serde_json::to_string(&TargetChoice::Auto).expect("a string"), "\"auto\"");
        assert!(TargetChoice::named("magic").is_none() && serde_json::from_str::<Target>("\"auto\"").is_err());
    }

    /// Names that are in published `conversion.json` files and in command lines.
    #[test]
    fn names_stay() {
        let names: Vec<_> = CLASSES.iter().map(|class| (class.name(), class.id(), class.model_type())).collect();
        let expected = [
            ("deepseek_v3", "deepseek_v3", "deepseek_v3"),
            ("deepseek_v2", "deepseek_v2", "deepseek_v2"),
            ("youtu", "youtu", "youtu"),
            ("minicpm3", "minicpm3", "minicpm3"),
            ("hf-remote", "hf_remote", "gqa2mla"),
        ];
        assert_eq!(names, expected);
    }
}
