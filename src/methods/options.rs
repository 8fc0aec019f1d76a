//! Options of methods as data: the command line, the documentation and the checks are all made from these.

use crate::error::ConvertError;

/// An option that belongs to one method or to some.
#[derive(Debug)]
pub struct MethodOption {
    /// Name without dashes.
    pub name: &'static str,
    /// Names of the methods that take it, as the help lists them.
    pub methods: &'static [&'static str],
    /// What it takes, as the help shows it; empty for a flag.
    pub value_name: &'static str,
    /// The values there are; empty: any that parses.
    pub values: &'static [&'static str],
    /// Whether it may be given several times.
    pub repeatable: bool,
    /// What it does, without the methods' names.
    pub help: &'static str,
    /// Group of the help it stands in.
    pub heading: &'static str,
    /// Whether a value is one.
    pub check: fn(&str) -> Result<(), String>,
}

impl MethodOption {
    /// Help as the command line shows it.
    pub fn full_help(&self) -> String {
        format!("{}: {}", self.methods.join(", "), self.help)
    }

    /// That `method`, which does not have this option, takes none such.
    pub fn foreign(&self, method: &str) -> ConvertError {
        not_taken(method, &format!("--{}", self.name), &format!("--method {}", self.methods.join(" or ")))
    }
}

/// That a method takes no `option`; `other` does.
pub fn not_taken(method: &str, option: &str, other: &str) -> ConvertError {
    ConvertError::refused(
        format!("--method {method} takes no {option}"),
        format!("leave the option out, or use {other}"),
    )
}

/// The last value given for an option.
pub fn last<'a>(given: &[(&str, &'a str)], name: &str) -> Option<&'a str> {
    given.iter().rev().find(|(n, _)| *n == name).map(|(_, value)| *value)
}

/// The last value given for an option, read as `T`.
///
/// # Errors
/// A value that is none.
pub fn parsed<T>(
    given: &[(&str, &str)],
    name: &str,
    read: impl FnOnce(&str) -> Result<T, String>,
) -> Result<Option<T>, ConvertError> {
    let read = |value: &str| {
        read(value).map_err(|why| ConvertError::refused(format!("--{name} {value}: {why}"), "see `convert --help`"))
    };
    last(given, name).map(read).transpose()
}

/// An integer of at least 1.
///
/// # Errors
/// Anything else.
pub fn positive(s: &str) -> Result<usize, String> {
    match s.parse::<usize>() {
        Ok(n) if (1..1 << 31).contains(&n) => Ok(n),
        _ => Err("expected a positive integer".to_owned()),
    }
}

/// A share of energy, in `(0, 1]`.
///
/// # Errors
/// Anything else.
pub fn energy(s: &str) -> Result<f64, String> {
    match s.parse::<f64>() {
        Ok(x) if x > 0.0 && x <= 1.0 => Ok(x),
        _ => Err("expected a share of energy, above 0 and at most 1".to_owned()),
    }
}

/// A check that only asks whether `read` takes a value.
pub fn checked<T>(read: Result<T, String>) -> Result<(), String> {
    read.map(|_| ())
}
