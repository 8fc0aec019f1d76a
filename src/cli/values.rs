//! Parsers of single option values.

/// An integer of at least 1.
pub fn positive(s: &str) -> Result<usize, String> {
    match s.parse::<usize>() {
        Ok(n) if (1..1 << 31).contains(&n) => Ok(n),
        _ => Err("expected a positive integer".to_owned()),
    }
}

/// A thread count: far above any machine, far below what exhausts one.
pub fn threads(s: &str) -> Result<usize, String> {
    match positive(s) {
        Ok(n) if n <= 1024 => Ok(n),
        _ => Err("expected an integer from 1 to 1024".to_owned()),
    }
}

/// An even integer of at least 2: RoPE turns pairs.
pub fn positive_even(s: &str) -> Result<usize, String> {
    match positive(s) {
        Ok(n) if n % 2 == 0 => Ok(n),
        _ => Err("expected a positive even integer: RoPE turns pairs".to_owned()),
    }
}

/// A positive finite number.
pub fn positive_number(s: &str) -> Result<f64, String> {
    match s.parse::<f64>() {
        Ok(x) if x.is_finite() && x > 0.0 => Ok(x),
        _ => Err("expected a positive number".to_owned()),
    }
}

/// A finite number of at least 0.
pub fn limit(s: &str) -> Result<f64, String> {
    match s.parse::<f64>() {
        Ok(x) if x.is_finite() && x >= 0.0 => Ok(x),
        _ => Err("expected a number that is not negative".to_owned()),
    }
}

/// A number in `[0, 1]`.
pub fn share(s: &str) -> Result<f64, String> {
    match limit(s) {
        Ok(x) if x <= 1.0 => Ok(x),
        _ => Err("expected a share between 0 and 1".to_owned()),
    }
}

/// `all`, or a positive integer.
pub fn count_or_all(s: &str) -> Result<Count, String> {
    if s == "all" {
        return Ok(Count(usize::MAX));
    }
    positive(s).map(Count).map_err(|_| "expected a positive integer or `all`".to_owned())
}

/// Value of `--windows`; `usize::MAX` for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Count(pub usize);

/// Bytes with an optional unit: `B`, `KB`, `MB`, `GB`, `TB` (powers of 1000), `KiB`, `MiB`, `GiB`, `TiB` (of 1024).
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
        assert!(share("1.01").is_err() && share("NaN").is_err() && share("1").is_ok());
        assert!(limit("inf").is_err() && limit("0").is_ok());
    }
}
