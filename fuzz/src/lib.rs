//! What a guest, an image or a registry can send, in every shape that a fuzzer thinks of.
//!
//! Each target is a function of bytes that must return: a panic, an overflow, a failed assertion of what must hold, and a run that takes
//! long or much memory are findings. `cargo xtask fuzz` drives them with libFuzzer; what it found once stays in `regressions/<target>` and is
//! tried by the unit tests, as are the beginnings in `corpus/<target>`.
#![expect(clippy::panic, reason = "a panic is how a target says that something is wrong")]

mod documents;
mod layers;
mod machine;
mod virtio;

/// Takes what an attacker sends.
pub type Target = fn(&[u8]);

/// All targets by name.
pub const TARGETS: [(&str, Target); 10] = [
    ("blk", virtio::blk),
    ("net", virtio::net),
    ("vsock", virtio::vsock),
    ("memory", virtio::memory),
    ("small", virtio::small),
    ("snapshot", machine::snapshot),
    ("agent", machine::agent),
    ("specification", documents::specification),
    ("registry", documents::registry),
    ("layers", layers::layers),
];

/// The target of this name.
#[must_use]
pub fn target(name: &str) -> Option<Target> {
    TARGETS.iter().find(|(known, _)| *known == name).map(|(_, target)| *target)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    /// Every input that is kept, through its target. A folder without a target, or a target without a beginning, is a mistake.
    #[test]
    fn what_is_kept_is_survived() {
        for kind in ["corpus", "regressions"] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(kind);
            for target in std::fs::read_dir(&folder).unwrap() {
                let target = target.unwrap();
                let name = target.file_name().into_string().unwrap();
                let run = super::target(&name).unwrap_or_else(|| panic!("{kind}/{name} is of no target"));
                for input in std::fs::read_dir(target.path()).unwrap() {
                    run(&std::fs::read(input.unwrap().path()).unwrap());
                }
            }
        }
        for (name, target) in super::TARGETS {
            let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
            assert!(corpus.read_dir().is_ok_and(|mut dir| dir.next().is_some()), "{name} has no beginning");
            target(&[]);
        }
    }
}
