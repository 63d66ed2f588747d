//! Sizes and processors.

use crate::error::CliError;

/// A number of bytes: `512m`, `1.5g`, `64MiB`, `100` (bytes), powers of 1024 as Docker has them.
///
/// # Errors
/// Anything that is not a positive number with an optional unit b, k, m, g, t.
pub(crate) fn bytes(flag: &str, text: &str) -> Result<u64, CliError> {
    let bad = || {
        CliError::usage(format!(
            "invalid size {text:?} for {flag}: give a number with b, k, m or g, such as 512m"
        ))
    };
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let shift = match unit.trim() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(bad()),
    };
    let number: f64 = number.parse().map_err(|_| bad())?;
    let value = number * 2f64.powi(shift);
    if !value.is_finite() || value < 1.0 || value >= 2f64.powi(60) {
        return Err(bad());
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked to be within 1 and 2^60"
    )]
    Ok(value as u64)
}

/// Thousandths of a processor from `--cpus`: 0.01 to 32.
///
/// # Errors
/// Not a number, or out of range.
pub(crate) fn cpus_milli(text: &str) -> Result<u32, CliError> {
    let bad = || {
        CliError::usage(format!(
            "invalid value {text:?} for --cpus: give a number from 0.01 to 32, such as 1.5"
        ))
    };
    let cpus: f64 = text.parse().map_err(|_| bad())?;
    if !(0.01..=32.0).contains(&cpus) {
        return Err(bad());
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked to be within 0.01 and 32"
    )]
    Ok((cpus * 1000.0).round() as u32)
}

/// A size for a person, in powers of 1000 (Docker's images) with up to four digits: `7.8MB`.
pub(crate) fn human(bytes: u64) -> String {
    scaled(bytes, 1000.0, &["B", "kB", "MB", "GB", "TB", "PB"])
}

/// A size for a person, in powers of 1024 (Docker's stats): `12.3MiB`.
pub(crate) fn human_binary(bytes: u64) -> String {
    scaled(bytes, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"])
}

fn scaled(bytes: u64, base: f64, units: &[&str]) -> String {
    #[expect(clippy::cast_precision_loss, reason = "four digits are shown")]
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= base && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    let decimals = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    let text = format!("{value:.decimals$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{}", units.get(unit).unwrap_or(&""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_dockers() {
        for (text, want) in
            [("100", 100), ("1k", 1024), ("512m", 512 << 20), ("1.5g", 3 << 29), ("64MiB", 64 << 20)]
        {
            assert_eq!(bytes("-m", text).unwrap(), want, "{text}");
        }
        for text in ["", "m", "-1", "1x", "1e30g", "nan", "0"] {
            assert!(bytes("-m", text).is_err(), "{text}");
        }
    }

    #[test]
    fn cpus_are_bounded() {
        assert_eq!(cpus_milli("1.5").unwrap(), 1500);
        for text in ["0", "33", "-1", "x", "nan", "inf"] {
            assert!(cpus_milli(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_for_people() {
        assert_eq!(human(0), "0B");
        assert_eq!(human(4_270_000), "4.27MB");
        assert_eq!(human_binary(100 << 20), "100MiB");
    }
}
