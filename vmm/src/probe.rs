//! `hyper-vmm --probe`: can this host run machines? One line of JSON on standard output.

use std::io::{self, Write};

use hyper_vmm_hv::{HvError, KvmKind, Probe};
use hyper_vmm_spec::probe::{HostKvm, ProbeReport};

use crate::log;

/// Probes and prints.
pub(crate) fn print() -> io::Result<()> {
    let report = report(&hyper_vmm_hv::probe());
    let line = serde_json::to_string(&report)?;
    writeln!(io::stdout(), "{line}")
}

fn report(probe: &Probe) -> ProbeReport {
    ProbeReport {
        present: !matches!(probe.error, Some(HvError::Missing | HvError::NoDriver)),
        accessible: probe.api_version.is_some(),
        api_version: probe.api_version,
        missing_capabilities: probe.missing.iter().map(|name| (*name).to_owned()).collect(),
        kind: probe.speed.map(|speed| match speed.kind() {
            KvmKind::Hardware => HostKvm::Hardware,
            KvmKind::Emulated => HostKvm::Emulated,
        }),
        guest_ring0_ps: probe.speed.map(|speed| speed.guest_ring0_ps),
        host_ring3_ps: probe.speed.map(|speed| speed.host_ring3_ps),
        error: probe.error.as_ref().map(|e| log::chain(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper_vmm_hv::RingSpeed;

    #[test]
    fn the_report_says_what_was_found() {
        let speed = Some(RingSpeed { guest_ring0_ps: 600_000, host_ring3_ps: 170 });
        let found = report(&Probe { api_version: Some(12), missing: Vec::new(), speed, error: None });
        assert_eq!((found.present, found.accessible, found.kind), (true, true, Some(HostKvm::Emulated)));
        let missing =
            Probe { api_version: None, missing: Vec::new(), speed: None, error: Some(HvError::Missing) };
        let found = report(&missing);
        assert_eq!((found.present, found.accessible, found.kind), (false, false, None));
        assert!(found.error.unwrap().contains("modprobe"));
    }
}
