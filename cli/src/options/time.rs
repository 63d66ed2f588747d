//! Times: what `--since` takes, and how ages and dates are shown.

use std::time::Duration;

use hyper_sandbox::Timestamp;

use crate::error::CliError;

/// A point in time from RFC 3339 (offsets allowed, date alone allowed), Unix seconds with a fraction, or an age such as `1h30m`.
///
/// # Errors
/// Anything else.
pub(crate) fn parse(text: &str, now: Timestamp) -> Result<Timestamp, CliError> {
    let bad = || {
        CliError::usage(format!("invalid time {text:?}: give RFC 3339, Unix seconds, or an age such as 10m"))
    };
    let ns = |d: Duration| i64::try_from(d.as_nanos()).map_err(|_| bad());
    if let Ok(seconds) = text.parse::<f64>() {
        return Ok(Timestamp::from_unix_ns(ns(Duration::try_from_secs_f64(seconds).map_err(|_| bad())?)?));
    }
    if let Some(age) = duration(text) {
        return Ok(Timestamp::from_unix_ns(now.unix_ns().saturating_sub(ns(age)?)));
    }
    text.parse().map_err(|_| bad())
}

/// Time since a point, zero if it has not come.
pub(crate) fn since(then: Timestamp, now: Timestamp) -> Duration {
    Duration::from_nanos(u64::try_from(now.unix_ns().saturating_sub(then.unix_ns())).unwrap_or(0))
}

/// A duration in Go's form: `1h30m`, `250ms`, `1.5s`.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = 0f64;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let unit_len = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_len);
        let scale = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        total += number.parse::<f64>().ok()? * scale;
        rest = tail;
    }
    Duration::try_from_secs_f64(total).ok()
}

/// An age in Docker's words: `Less than a second`, `5 seconds`, `About a minute`, `3 weeks`.
pub(crate) fn human(age: Duration) -> String {
    let s = age.as_secs();
    let (m, h) = (s / 60, s / 3600);
    match s {
        0 => "Less than a second".to_owned(),
        1 => "1 second".to_owned(),
        2..60 => format!("{s} seconds"),
        60..120 => "About a minute".to_owned(),
        120..3600 => format!("{m} minutes"),
        3600..7200 => "About an hour".to_owned(),
        _ if h < 48 => format!("{h} hours"),
        _ if h < 24 * 14 => format!("{} days", h / 24),
        _ if h < 24 * 60 => format!("{} weeks", h / 24 / 7),
        _ if h < 24 * 365 * 2 => format!("{} months", h / 24 / 30),
        _ => format!("{} years", h / 24 / 365),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_unix_ns(seconds * 1_000_000_000)
    }

    #[test]
    fn times_in_every_form() {
        let now = at(1_000_000);
        assert_eq!(parse("1h30m", now).unwrap(), at(1_000_000 - 5400));
        assert_eq!(parse("86400", now).unwrap(), at(86_400));
        assert_eq!(parse("1970-01-02T00:00:00Z", now).unwrap(), at(86_400));
        assert_eq!(parse("2024-02-29T12:00:00+02:00", now).unwrap(), at(1_709_200_800));
        for text in ["", "x", "1970-13-01", "-1", "1e300"] {
            assert!(parse(text, now).is_err(), "{text}");
        }
    }

    #[test]
    fn ages_in_dockers_words() {
        for (s, want) in
            [(0, "Less than a second"), (30, "30 seconds"), (61, "About a minute"), (7300, "2 hours")]
        {
            assert_eq!(human(Duration::from_secs(s)), want);
        }
    }
}
