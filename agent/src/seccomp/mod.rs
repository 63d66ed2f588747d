//! Seccomp: from an OCI profile to a classic BPF program.
//!
//! The decision for each system call number is computed first; runs of equal decisions become the leaves of a binary tree, so that
//! a filter of 300 names costs about eight comparisons. A number above all that the profile names answers `ENOSYS` when the default
//! is an error: programs then fall back instead of giving up on a call that is newer than the profile.

mod compile;
mod default;
mod table;

use crate::error::AgentError;
use crate::spec::SeccompSpec;
use crate::sys::{self, SockFilter};

pub(crate) use compile::Program;
pub(crate) use default::default_profile;

/// Annotation that asks for [`default_profile`] when a specification has no profile.
pub(crate) const ANNOTATION: &str = "hyper.seccomp";

/// The profile that a container gets: its own, or the default when its annotation asks for it, or none.
///
/// # Errors
/// The annotation is neither `default` nor `unconfined`.
pub(crate) fn choose(
    own: Option<SeccompSpec>,
    annotation: Option<&str>,
    bounding: &[String],
) -> Result<Option<SeccompSpec>, AgentError> {
    match (own, annotation) {
        (_, Some("unconfined")) => Ok(None),
        (Some(own), Some("default") | None) => Ok(Some(own)),
        (None, Some("default")) => Ok(Some(default_profile(bounding))),
        (None, None) => Ok(None),
        (_, Some(other)) => {
            Err(AgentError::invalid(format!("{ANNOTATION}={other:?}: neither default nor unconfined")))
        }
    }
}

impl Program {
    /// Installs the filter on this thread; it holds for everything that it executes.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub(crate) fn install(&self) -> std::io::Result<()> {
        sys::install_seccomp(self.instructions(), self.flags())
    }
}

/// Operation codes of classic BPF that the compiler uses.
mod op {
    pub(super) const LD: u16 = 0x20;
    pub(super) const AND: u16 = 0x54;
    pub(super) const JA: u16 = 0x05;
    pub(super) const JEQ: u16 = 0x15;
    pub(super) const JGT: u16 = 0x25;
    pub(super) const JGE: u16 = 0x35;
    pub(super) const RET: u16 = 0x06;
}

fn statement(code: u16, k: u32) -> SockFilter {
    SockFilter { code, jt: 0, jf: 0, k }
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> SockFilter {
    SockFilter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{SyscallArgSpec, SyscallSpec};

    const X86_64: u32 = 0xc000_003e;
    const I386: u32 = 0x4000_0003;
    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0000;

    /// Runs a program as the kernel would.
    fn run(program: &Program, arch: u32, nr: u32, args: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend_from_slice(&nr.to_le_bytes());
        data.extend_from_slice(&arch.to_le_bytes());
        data.extend_from_slice(&[0; 8]);
        for arg in args {
            data.extend_from_slice(&arg.to_le_bytes());
        }
        let code = program.instructions();
        let (mut pc, mut a) = (0_usize, 0_u32);
        loop {
            let i = code[pc];
            pc += 1;
            match i.code {
                op::LD => {
                    let at = usize::try_from(i.k).unwrap();
                    a = u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
                }
                op::AND => a &= i.k,
                op::JA => pc += usize::try_from(i.k).unwrap(),
                op::JEQ => pc += usize::from(if a == i.k { i.jt } else { i.jf }),
                op::JGT => pc += usize::from(if a > i.k { i.jt } else { i.jf }),
                op::JGE => pc += usize::from(if a >= i.k { i.jt } else { i.jf }),
                op::RET => return i.k,
                other => panic!("operation {other:#x}"),
            }
        }
    }

    fn nr(name: &str) -> u32 {
        table::number(table::X86_64, name).unwrap()
    }

    fn call(program: &Program, name: &str, args: [u64; 6]) -> u32 {
        run(program, X86_64, nr(name), args)
    }

    fn compiled(profile: &SeccompSpec) -> Program {
        Program::compile(profile).unwrap()
    }

    #[test]
    fn default_profile_decides_as_docker_does() {
        let program = compiled(&default_profile(&["CAP_CHOWN".to_owned()]));
        let none = [0; 6];
        for name in
            ["read", "execve", "openat", "futex", "statx", "mseal", "ptrace", "rseq", "setuid", "capset"]
        {
            assert_eq!(call(&program, name, none), ALLOW, "{name}");
        }
        for name in [
            "mount",
            "bpf",
            "reboot",
            "kexec_load",
            "keyctl",
            "io_uring_setup",
            "unshare",
            "setns",
            "add_key",
        ] {
            assert_eq!(call(&program, name, none), ERRNO | 1, "{name}");
        }
        assert_eq!(call(&program, "clone3", none), ERRNO | 38);
        assert_eq!(call(&program, "clone", [0x11, 0, 0, 0, 0, 0]), ALLOW);
        assert_eq!(call(&program, "clone", [0x1000_0000, 0, 0, 0, 0, 0]), ERRNO | 1, "a user namespace");
        assert_eq!(call(&program, "personality", [0xffff_ffff, 0, 0, 0, 0, 0]), ALLOW);
        assert_eq!(call(&program, "personality", [0x0040_0000, 0, 0, 0, 0, 0]), ERRNO | 1);
        assert_eq!(call(&program, "socket", [2, 1, 0, 0, 0, 0]), ALLOW);
        assert_eq!(call(&program, "socket", [40, 1, 0, 0, 0, 0]), ERRNO | 1, "vsock leads to the host");
        assert_eq!(run(&program, X86_64, 470, none), ERRNO | 38, "newer than the profile");
        assert_eq!(run(&program, X86_64, 0x4000_0000, none), ERRNO | 38, "x32");
        assert_eq!(run(&program, X86_64, u32::MAX, none), ERRNO | 38);
    }

    #[test]
    fn default_profile_follows_capabilities() {
        let program = compiled(&default_profile(&["CAP_SYS_ADMIN".to_owned(), "CAP_SYS_BOOT".to_owned()]));
        for name in ["mount", "unshare", "setns", "clone3", "reboot", "bpf"] {
            assert_eq!(call(&program, name, [0x1000_0000, 0, 0, 0, 0, 0]), ALLOW, "{name}");
        }
        assert_eq!(call(&program, "clone", [0x1000_0000, 0, 0, 0, 0, 0]), ALLOW);
        assert_eq!(call(&program, "init_module", [0; 6]), ERRNO | 1);
    }

    #[test]
    fn thirty_two_bit_programs_have_their_own_numbers() {
        let program = compiled(&default_profile(&[]));
        assert_eq!(run(&program, I386, 1, [0; 6]), ALLOW, "exit");
        assert_eq!(run(&program, I386, 21, [0; 6]), ERRNO | 1, "mount");
        assert_eq!(run(&program, I386, 403, [0; 6]), ALLOW, "clock_gettime64");
        assert_eq!(
            run(&program, 0xc000_00b7, 0, [0; 6]),
            0x8000_0000,
            "aarch64 is no architecture of this machine"
        );
        let native =
            SeccompSpec { architectures: vec!["SCMP_ARCH_X86_64".to_owned()], ..default_profile(&[]) };
        assert_eq!(run(&compiled(&native), I386, 1, [0; 6]), 0x8000_0000);
    }

    fn one_rule(op: &str, value: u64, value_two: u64) -> Program {
        compiled(&SeccompSpec {
            default_action: "SCMP_ACT_ERRNO".to_owned(),
            default_errno_ret: Some(13),
            syscalls: vec![SyscallSpec {
                names: vec!["ioctl".to_owned(), "no_such_call".to_owned()],
                action: "SCMP_ACT_ALLOW".to_owned(),
                errno_ret: None,
                args: vec![SyscallArgSpec { index: 1, value, value_two, op: op.to_owned() }],
            }],
            ..SeccompSpec::default()
        })
    }

    #[test]
    fn every_comparison_is_of_64_bits() {
        let samples =
            [0, 1, 5, 6, 0xffff_ffff, 0x1_0000_0000, 0x1_0000_0005, 0x1_0000_0006, 0x2_0000_0005, u64::MAX];
        type Check = fn(u64, u64) -> bool;
        let cases: [(&str, Check); 6] = [
            ("SCMP_CMP_EQ", |a, b| a == b),
            ("SCMP_CMP_NE", |a, b| a != b),
            ("SCMP_CMP_LT", |a, b| a < b),
            ("SCMP_CMP_LE", |a, b| a <= b),
            ("SCMP_CMP_GT", |a, b| a > b),
            ("SCMP_CMP_GE", |a, b| a >= b),
        ];
        for (name, holds) in cases {
            for value in samples {
                let program = one_rule(name, value, 0);
                for arg in samples {
                    let expected = if holds(arg, value) { ALLOW } else { ERRNO | 13 };
                    assert_eq!(
                        call(&program, "ioctl", [0, arg, 0, 0, 0, 0]),
                        expected,
                        "{arg:#x} {name} {value:#x}"
                    );
                }
            }
        }
        let masked = one_rule("SCMP_CMP_MASKED_EQ", 0xff00_0000_00ff, 0x1200_0000_0034);
        assert_eq!(call(&masked, "ioctl", [0, 0x12ff_ffff_ff34, 0, 0, 0, 0]), ALLOW);
        assert_eq!(call(&masked, "ioctl", [0, 0x1300_0000_0034, 0, 0, 0, 0]), ERRNO | 13);
    }

    #[test]
    fn two_conditions_on_one_argument_are_alternatives() {
        let arg = |value| SyscallArgSpec { index: 0, value, value_two: 0, op: "SCMP_CMP_EQ".to_owned() };
        let program = compiled(&SeccompSpec {
            default_action: "SCMP_ACT_KILL_PROCESS".to_owned(),
            syscalls: vec![SyscallSpec {
                names: vec!["read".to_owned()],
                action: "SCMP_ACT_LOG".to_owned(),
                errno_ret: None,
                args: vec![arg(1), arg(2)],
            }],
            ..SeccompSpec::default()
        });
        assert_eq!(call(&program, "read", [1, 0, 0, 0, 0, 0]), 0x7ffc_0000);
        assert_eq!(call(&program, "read", [2, 0, 0, 0, 0, 0]), 0x7ffc_0000);
        assert_eq!(call(&program, "read", [3, 0, 0, 0, 0, 0]), 0x8000_0000);
        assert_eq!(run(&program, X86_64, 470, [0; 6]), 0x8000_0000, "no ENOSYS when the default kills");
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let bad = |profile: SeccompSpec| Program::compile(&profile).is_err();
        assert!(bad(SeccompSpec::default()), "no default action");
        assert!(bad(SeccompSpec { default_action: "SCMP_ACT_NOTIFY".to_owned(), ..SeccompSpec::default() }));
        assert!(bad(SeccompSpec {
            default_action: "SCMP_ACT_ALLOW".to_owned(),
            flags: vec!["X".to_owned()],
            ..SeccompSpec::default()
        }));
        let rule = SyscallSpec {
            names: vec!["read".to_owned()],
            action: "SCMP_ACT_ERRNO".to_owned(),
            errno_ret: None,
            args: vec![SyscallArgSpec { index: 6, value: 0, value_two: 0, op: "SCMP_CMP_EQ".to_owned() }],
        };
        assert!(bad(SeccompSpec {
            default_action: "SCMP_ACT_ALLOW".to_owned(),
            syscalls: vec![rule],
            ..SeccompSpec::default()
        }));
    }

    #[test]
    fn the_annotation_chooses() {
        let own = SeccompSpec { default_action: "SCMP_ACT_ALLOW".to_owned(), ..SeccompSpec::default() };
        assert!(choose(None, None, &[]).unwrap().is_none());
        assert!(choose(Some(own.clone()), Some("unconfined"), &[]).unwrap().is_none());
        assert_eq!(
            choose(Some(own), Some("default"), &[]).unwrap().unwrap().default_action,
            "SCMP_ACT_ALLOW"
        );
        assert_eq!(choose(None, Some("default"), &[]).unwrap().unwrap().default_action, "SCMP_ACT_ERRNO");
        assert!(choose(None, Some("x"), &[]).is_err());
    }
}
