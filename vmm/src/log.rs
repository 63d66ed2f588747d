//! Lines on standard error, which is the VMM's log. Nothing here is caused by a guest, so nothing is rate limited.

use std::error::Error;
use std::fmt::{self, Write as _};
use std::io::Write as _;

/// Writes one line.
pub(crate) fn line(what: fmt::Arguments<'_>) {
    // Nowhere is left to report a broken standard error.
    let _stderr_broken = writeln!(std::io::stderr(), "hyper-vmm: {what}");
}

/// An error and everything that caused it, as one line.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a string does not fail.
        let _infallible = write!(text, ": {error}");
        cause = error.source();
    }
    text.replace('\n', " ")
}

/// A bug ends the process at once, with one line that says where.
pub(crate) fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| {
        let what = info.payload_as_str().unwrap_or("panic");
        let at = info.location().map(ToString::to_string).unwrap_or_default();
        line(format_args!("internal error at {at}: {}", what.replace('\n', " ")));
        std::process::abort();
    }));
}
