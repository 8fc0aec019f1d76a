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
    /// What most options have in common: any value, once.
    pub const PLAIN: Self = Self {
        name: "",
        methods: &[],
        value_name: "",
        values: &[],
        repeatable: false,
        help: "",
        heading: "",
        check: |_| Ok(()),
    };

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

/// An even integer of at least 2: RoPE rotates pairs.
///
/// # Errors
/// Anything else.
pub fn positive_even(s: &str) -> Result<usize, String> {
    match positive(s) {
        Ok(n) if n % 2 == 0 => Ok(n),
        _ => Err("expected a positive even integer: RoPE turns pairs".to_owned()),
    }
}

/// Bytes with an optional unit: `B`, `KB`, `MB`, `GB`, `TB` (powers of 1000), `KiB`, `MiB`, `GiB`, `TiB` (of 1024).
///
/// # Errors
/// Anything else, and what is beyond any disk.
pub fn size(s: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 9] = [
        ("b", 1),
        ("kb", 1000),
        ("mb", 1_000_000),
        ("gb", 1_000_000_000),
        ("tb", 1_000_000_000_000),
        ("kib", 1 << 10),
        ("mib", 1 << 20),
        ("gib", 1 << 30),
        ("tib", 1 << 40),
    ];
    let bad = || format!("`{s}` is not a size: give a positive number with B, KB, MB, GB, KiB, MiB or GiB (`5GB`)");
    let split = s.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(s.len());
    let (number, unit) = (s[..split].trim(), s[split..].trim().to_ascii_lowercase());
    let factor = match unit.as_str() {
        "" => 1,
        u => UNITS.iter().find(|e| e.0 == u).map(|e| e.1).ok_or_else(bad)?,
    };
    let bytes = match number.parse::<u64>() {
        Ok(n) => n.checked_mul(factor).ok_or_else(bad)?,
        Err(_) => {
            let n: f64 = number.parse().map_err(|_| bad())?;
            let bytes = n * factor as f64;
            // NaN fails as well. Below 2^63 the cast is exact enough.
            if !(1.0..9e18).contains(&bytes) {
                return Err(bad());
            }
            bytes as u64
        }
    };
    if bytes > 0 { Ok(bytes) } else { Err(bad()) }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_decimal_and_binary_units() {
        assert_eq!(size("5GB"), Ok(5_000_000_000));
        assert_eq!(size("5 gib"), Ok(5 << 30));
        assert_eq!(size("1.5MB"), Ok(1_500_000));
        assert_eq!(size("123"), Ok(123));
        for bad in ["", "0", "0GB", "-1", "GB", "5XB", "5GBB", "NaNGB", "99999999999999999999TB", "1e", "٣GB"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_outside_their_range_are_refused() {
        assert!(positive("0").is_err() && positive("-1").is_err() && positive("2147483648").is_err());
        assert!(positive_even("63").is_err() && positive_even("64").is_ok());
        assert!(energy("0").is_err() && energy("1.01").is_err() && energy("NaN").is_err() && energy("1").is_ok());
    }
}
