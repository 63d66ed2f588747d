//! Where the collector is: from the configuration, else from the environment, which is containerd's.

use opentelemetry_http::Request;

/// Path of traces below the address of a collector (OTLP 1.x, "OTLP/HTTP Request").
const PATH: &str = "/v1/traces";
/// The only way of speaking that is known here, by its name in the environment.
const PROTOCOL: &str = "http/protobuf";

/// A collector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// The whole of it.
    pub(crate) url: String,
}

/// Checks an address of the configuration; an empty one says that there is no collector.
///
/// # Errors
/// Why it is none, in words that go behind it.
pub(crate) fn check(address: &str) -> Result<(), String> {
    if address.is_empty() { Ok(()) } else { url(address).map(drop) }
}

/// The collector that is wanted, if one is. Words of the environment are those of OpenTelemetry's specification ("SDK environment
/// variables", "OTLP exporter") as containerd reads them, so that it and its shims speak to the same one.
///
/// # Errors
/// What of it cannot be used.
pub(crate) fn find(
    wanted: Option<&str>,
    environment: impl Fn(&str) -> Option<String>,
) -> Result<Option<Place>, String> {
    if let Some(address) = wanted {
        return if address.is_empty() { Ok(None) } else { below(address).map(Some) };
    }
    let set = |name: &str| environment(name).map(|value| value.trim().to_owned()).filter(|v| !v.is_empty());
    let is_off = set("OTEL_SDK_DISABLED").is_some_and(|value| ["1", "t", "true"].contains(&lower(&value)));
    if is_off || set("OTEL_TRACES_EXPORTER").is_some_and(|exporter| exporter != "otlp") {
        return Ok(None);
    }
    let whole = set("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT");
    let base = set("OTEL_EXPORTER_OTLP_ENDPOINT");
    if whole.is_none() && base.is_none() {
        return Ok(None);
    }
    let protocol = set("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL").or_else(|| set("OTEL_EXPORTER_OTLP_PROTOCOL"));
    if let Some(other) = protocol.filter(|protocol| protocol != PROTOCOL) {
        return Err(format!("OTEL_EXPORTER_OTLP_PROTOCOL: {other} is not spoken here, only {PROTOCOL}"));
    }
    match (whole, base) {
        (Some(whole), _) => url(&whole).map(|url| Some(Place { url })),
        (None, Some(base)) => below(&base).map(Some),
        (None, None) => Ok(None),
    }
}

fn lower(value: &str) -> &str {
    if value.eq_ignore_ascii_case("true") { "true" } else { value }
}

fn below(base: &str) -> Result<Place, String> {
    let base = url(base)?;
    Ok(Place { url: format!("{}{PATH}", base.trim_end_matches('/')) })
}

/// Checks that requests can be sent there.
fn url(text: &str) -> Result<String, String> {
    let wrong = |why: &str| format!("{text:?}: {why}");
    let request = Request::post(text).body(()).map_err(|_| wrong("no address of a collector"))?;
    match request.uri().scheme_str() {
        Some("http") => Ok(text.to_owned()),
        Some("https") => Err(wrong("https is not spoken here; let a collector on the node do it")),
        _ => Err(wrong("http://HOST:PORT is wanted")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(wanted: Option<&str>, environment: &[(&str, &str)]) -> Result<Option<String>, String> {
        let of = |name: &str| {
            environment.iter().find(|(have, _)| *have == name).map(|(_, value)| (*value).to_owned())
        };
        find(wanted, of).map(|place| place.map(|place| place.url))
    }

    const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://there:4318/");

    #[test]
    fn nothing_is_exported_unless_somebody_says_where() {
        assert_eq!(found(None, &[]), Ok(None));
        assert_eq!(found(None, &[("OTEL_SERVICE_NAME", "containerd")]), Ok(None));
        assert_eq!(found(Some(""), &[ENDPOINT]), Ok(None), "the configuration can say no");
        for no in [("OTEL_SDK_DISABLED", "TRUE"), ("OTEL_TRACES_EXPORTER", "none")] {
            assert_eq!(found(None, &[ENDPOINT, no]), Ok(None));
        }
    }

    #[test]
    fn collectors_are_found() {
        let whole = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://traces:1/own");
        let some = |url: &str| Ok(Some(url.to_owned()));
        assert_eq!(found(None, &[ENDPOINT]), some("http://there:4318/v1/traces"));
        assert_eq!(found(None, &[ENDPOINT, whole]), some("http://traces:1/own"));
        assert_eq!(found(Some("http://[::1]:9"), &[ENDPOINT]), some("http://[::1]:9/v1/traces"));
        assert_eq!(
            found(None, &[ENDPOINT, ("OTEL_SDK_DISABLED", "false")]),
            some("http://there:4318/v1/traces")
        );
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        for (address, words) in [("https://x:1", "https"), ("x", "http://HOST"), ("http://", "no address")] {
            let error = found(Some(address), &[]).unwrap_err();
            assert!(error.contains(words) && error.contains(address), "{error}");
            assert!(check(address).is_err());
        }
        let grpc = found(None, &[ENDPOINT, ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]).unwrap_err();
        assert!(grpc.contains("grpc is not spoken"), "{grpc}");
        assert!(check("").is_ok() && check("http://127.0.0.1:4318").is_ok());
    }
}
