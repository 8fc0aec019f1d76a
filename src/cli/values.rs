//! Parsers of single option values.

pub use gqa2mla::methods::options::{positive, size};

/// A thread count: far above any machine, far below what exhausts one.
pub fn threads(s: &str) -> Result<usize, String> {
    match positive(s) {
        Ok(n) if n <= 1024 => Ok(n),
        _ => Err("expected an integer from 1 to 1024".to_owned()),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_outside_their_range_are_refused() {
        assert!(positive("0").is_err() && positive("-1").is_err() && positive("2147483648").is_err());
        assert!(share("1.01").is_err() && share("NaN").is_err() && share("1").is_ok());
        assert!(limit("inf").is_err() && limit("0").is_ok());
    }
}
