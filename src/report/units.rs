//! Numbers as people read them.

/// Bytes in decimal units: `999 B`, `1.5 kB`, `269.1 MB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["B", "kB", "MB", "GB", "TB", "PB"];
    if n < 1000 {
        return format!("{n} B");
    }
    let (value, unit) = scale(n as f64, &UNITS);
    format!("{value:.1} {unit}")
}

/// A count in short form: `999`, `134.5M`.
pub fn count(n: u64) -> String {
    const UNITS: [&str; 6] = ["", "k", "M", "G", "T", "P"];
    if n < 1000 {
        return n.to_string();
    }
    let (value, unit) = scale(n as f64, &UNITS);
    format!("{value:.1}{unit}")
}

/// Seconds: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`.
pub fn seconds(s: f64) -> String {
    if !s.is_finite() || s < 0.0 {
        return "unknown".to_owned();
    }
    if s < 9.95 {
        return format!("{s:.1} s");
    }
    let whole = s.round() as u64;
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// A number with about four significant digits, in scientific form where it is very small or large.
pub fn figure(x: f64) -> String {
    let a = x.abs();
    if !x.is_finite() {
        return x.to_string();
    }
    match a {
        0.0 => "0".to_owned(),
        _ if a < 1e-3 => format!("{x:.2e}"),
        _ if a < 1.0 => format!("{x:.4}"),
        _ if a < 100.0 => format!("{x:.3}"),
        _ if a < 1e4 => format!("{x:.1}"),
        _ => format!("{x:.3e}"),
    }
}

/// A share of one as a percentage: `50.0%`.
pub fn percent(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}

fn scale(mut value: f64, units: &[&'static str]) -> (f64, &'static str) {
    let mut i = 0;
    // 999.95 would print as 1000.0.
    while value >= 999.95 && i + 1 < units.len() {
        value /= 1000.0;
        i += 1;
    }
    (value, units[i])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_switch_where_the_printed_number_would_need_a_fourth_digit() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1000), "1.0 kB");
        assert_eq!(bytes(999_949), "999.9 kB");
        assert_eq!(bytes(999_950), "1.0 MB");
        assert_eq!(bytes(u64::MAX), "18446.7 PB");
        assert_eq!(count(134_515_008), "134.5M");
    }

    #[test]
    fn seconds_round_before_they_split() {
        assert_eq!(seconds(9.96), "10 s");
        assert_eq!(seconds(59.6), "1 min 00 s");
        assert_eq!(seconds(3600.0), "1 h 00 min");
        assert_eq!(seconds(f64::NAN), "unknown");
    }
}
