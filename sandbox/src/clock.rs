//! Points in time as Docker writes them: RFC 3339, UTC, nanoseconds.

use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Nanoseconds since 1970-01-01T00:00:00Z. Displays and serialises as RFC 3339 with nanoseconds, such as
/// `2026-11-21T08:14:41.000000001Z`; [`Timestamp::NEVER`] is Docker's `0001-01-01T00:00:00Z`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Timestamp(i64);

/// A text that is no RFC 3339 time in UTC or with an offset.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a time like 2026-11-21T08:14:41Z")]
pub struct TimestampError(pub String);

const NS_PER_S: i64 = 1_000_000_000;
const NEVER_TEXT: &str = "0001-01-01T00:00:00Z";

impl Timestamp {
    /// A time that has not come, such as the end of a running container.
    pub const NEVER: Self = Self(i64::MIN);

    /// The host's wall clock.
    #[must_use]
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
    }

    /// From nanoseconds since 1970.
    #[must_use]
    pub fn from_unix_ns(ns: i64) -> Self {
        Self(ns)
    }

    /// Nanoseconds since 1970; meaningless for [`Timestamp::NEVER`].
    #[must_use]
    pub fn unix_ns(self) -> i64 {
        self.0
    }

    /// Whether this is [`Timestamp::NEVER`].
    #[must_use]
    pub fn is_never(self) -> bool {
        self == Self::NEVER
    }
}

impl Default for Timestamp {
    fn default() -> Self {
        Self::NEVER
    }
}

/// Days since 1970 of a civil date (proleptic Gregorian), and back: eras of 400 years that begin on 1 March.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day_of_year - (153 * shifted + 2) / 5 + 1)
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_never() {
            return f.write_str(NEVER_TEXT);
        }
        let (seconds, ns) = (self.0.div_euclid(NS_PER_S), self.0.rem_euclid(NS_PER_S));
        let (year, month, day) = civil_from_days(seconds.div_euclid(86_400));
        let of_day = seconds.rem_euclid(86_400);
        let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ns:09}Z")
    }
}

impl From<Timestamp> for String {
    fn from(time: Timestamp) -> Self {
        time.to_string()
    }
}

impl TryFrom<String> for Timestamp {
    type Error = TimestampError;
    fn try_from(text: String) -> Result<Self, TimestampError> {
        text.parse()
    }
}

impl FromStr for Timestamp {
    type Err = TimestampError;

    /// `YYYY-MM-DDTHH:MM:SS[.fraction](Z|±HH:MM)`; also without zone (UTC) and a date alone, as `docker logs --since` takes them.
    fn from_str(text: &str) -> Result<Self, TimestampError> {
        if text == NEVER_TEXT {
            return Ok(Self::NEVER);
        }
        parse_rfc3339(text).map(Self).ok_or_else(|| TimestampError(text.chars().take(64).collect()))
    }
}

fn number(text: &str, from: usize, to: usize) -> Option<i64> {
    let digits = text.get(from..to)?;
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

fn parse_rfc3339(text: &str) -> Option<i64> {
    let (year, month, day) = (number(text, 0, 4)?, number(text, 5, 7)?, number(text, 8, 10)?);
    let dashes = text.get(4..5)? == "-" && text.get(7..8)? == "-";
    if !dashes || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let days = days_from_civil(year, month, day);
    if text.len() == 10 {
        return days.checked_mul(86_400)?.checked_mul(NS_PER_S);
    }
    let separators =
        matches!(text.get(10..11)?, "T" | "t" | " ") && text.get(13..14)? == ":" && text.get(16..17)? == ":";
    let (hour, minute, second) = (number(text, 11, 13)?, number(text, 14, 16)?, number(text, 17, 19)?);
    if !separators || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let mut rest = text.get(19..)?;
    let mut ns = 0;
    if let Some(fraction) = rest.strip_prefix('.') {
        let digits = fraction.bytes().take_while(u8::is_ascii_digit).count();
        if digits == 0 {
            return None;
        }
        let kept = digits.min(9);
        ns = number(fraction, 0, kept)? * 10_i64.pow(u32::try_from(9 - kept).ok()?);
        rest = fraction.get(digits..)?;
    }
    let offset_s = match rest {
        "" | "Z" | "z" => 0,
        _ => {
            let sign = match rest.get(0..1)? {
                "+" => 1,
                "-" => -1,
                _ => return None,
            };
            if rest.len() != 6 || rest.get(3..4)? != ":" {
                return None;
            }
            sign * (number(rest, 1, 3)? * 3600 + number(rest, 4, 6)? * 60)
        }
    };
    let seconds = days * 86_400 + hour * 3600 + minute * 60 + second - offset_s;
    seconds.checked_mul(NS_PER_S)?.checked_add(ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_times() {
        for (ns, text) in [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_400 * NS_PER_S, "2000-02-29T00:00:00.000000000Z"),
            (1_795_248_881 * NS_PER_S + 7, "2026-11-21T08:14:41.000000007Z"),
            (-1, "1969-12-31T23:59:59.999999999Z"),
        ] {
            assert_eq!(Timestamp(ns).to_string(), text);
            assert_eq!(text.parse::<Timestamp>(), Ok(Timestamp(ns)));
        }
    }

    #[test]
    fn every_day_of_400_years_survives() {
        for day in -146_097..146_097 {
            let (y, m, d) = civil_from_days(day);
            assert_eq!(days_from_civil(y, m, d), day);
        }
    }

    #[test]
    fn other_forms() {
        let noon: Timestamp = "2026-11-21T12:00:00Z".parse().unwrap();
        assert_eq!("2026-11-21T13:30:00+01:30".parse(), Ok(noon));
        assert_eq!("2026-11-21T12:00:00.0".parse(), Ok(noon));
        assert_eq!("2026-11-21".parse::<Timestamp>().unwrap().unix_ns(), noon.unix_ns() - 43_200 * NS_PER_S);
        assert!(NEVER_TEXT.parse::<Timestamp>().unwrap().is_never());
        assert_eq!(Timestamp::NEVER.to_string(), NEVER_TEXT);
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            "",
            "now",
            "2026-13-01",
            "2026-11-21T",
            "2026-11-21T25:00:00Z",
            "2026-11-21T08:14:41+1",
            "ä026-11-21",
            "2026-11-21T08:14:41.Z",
            "2026-11-21T08:14:41Zx",
            "9999999-11-21",
        ] {
            assert!(bad.parse::<Timestamp>().is_err(), "{bad}");
        }
    }
}
