//! The fuzzer: libFuzzer's arguments, and the name of the target in `HYPER_FUZZ_TARGET`.
#![no_main]

use std::sync::OnceLock;

static TARGET: OnceLock<hyper_fuzz::Target> = OnceLock::new();

#[expect(clippy::panic, reason = "there is nobody to return an error to, and nothing has been tried yet")]
fn chosen() -> hyper_fuzz::Target {
    let name = std::env::var("HYPER_FUZZ_TARGET").unwrap_or_default();
    match hyper_fuzz::target(&name) {
        Some(target) => target,
        None => panic!("HYPER_FUZZ_TARGET is {name:?}, which is no target"),
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| TARGET.get_or_init(chosen)(data));
