//! Products of config values, as families write them: `1/sqrt(query_pre_attn_scalar)`.

use super::ArchError;
use super::config::Config;

/// The value of `expression`: numbers, config keys and `sqrt(...)` of either, joined by `*` and `/`, from left to right.
/// `None` where a key in it is absent or null.
///
/// # Errors
/// [`ArchError::BadValue`] for a key that is not a positive number.
pub(super) fn evaluate(config: &Config<'_>, expression: &str) -> Result<Option<f64>, ArchError> {
    let mut value = 1.0;
    let mut rest = expression.trim();
    let mut divide = false;
    while !rest.is_empty() {
        let end = rest.find(['*', '/']).unwrap_or(rest.len());
        let term = rest[..end].trim();
        let inner = term.strip_prefix("sqrt(").and_then(|t| t.strip_suffix(')'));
        let name = inner.unwrap_or(term);
        let factor = match name.parse::<f64>() {
            Ok(number) => number,
            Err(_) => match config.number(name)? {
                None => return Ok(None),
                // Zero switches a part off (no shared experts); it never divides.
                Some(number) if number > 0.0 || number == 0.0 && !divide => number,
                Some(_) => return Err(config.bad(name, "a positive number")),
            },
        };
        let factor = if inner.is_some() { factor.sqrt() } else { factor };
        value = if divide { value / factor } else { value * factor };
        divide = rest[end..].starts_with('/');
        rest = rest.get(end + 1..).unwrap_or("").trim_start();
    }
    if value.is_finite() { Ok(Some(value)) } else { Err(config.bad(expression, "a finite number")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn products_are_taken_from_left_to_right() {
        let map = json!({ "a": 8, "b": 4.0, "none": null, "bad": -1.0 });
        let config = Config::new(map.as_object().unwrap(), "any");
        for (expression, value) in
            [("a", Some(8.0)), ("1/sqrt(b)", Some(0.5)), ("a*b/2", Some(16.0)), ("a/missing", None), ("none", None)]
        {
            assert_eq!(evaluate(&config, expression).unwrap(), value, "{expression}");
        }
        assert!(evaluate(&config, "bad").is_err());
    }
}
