//! Filters of system calls, from tables in which every call has its reason.
//!
//! A call that no table has ends the process and is told of ([`crate::exit_on_forbidden_calls`]), or answers `ENOSYS`, as the owner of the
//! filter wants it. A [`Probe`] is a call that libraries try and do without: it gets an error and nothing is said.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

use crate::JailError;

/// What an argument must be. Of numbers the low 32 bits are looked at: those are all that the kernel uses of the arguments in question.
#[derive(Debug, Clone, Copy)]
pub enum Is {
    /// This number.
    Equal(u32),
    /// Has all these bits.
    With(u32),
    /// Has none of these bits.
    Without(u32),
    /// Another number.
    Not(u32),
    /// No pointer, in all its 64 bits.
    Null,
    /// The id of this process.
    OwnProcess,
}

/// An argument, counted from 0, and what it must be.
pub type Check = (u8, Is);

/// A system call that is allowed.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    number: i64,
    /// One of these lists must hold; none: any arguments will do.
    cases: &'static [&'static [Check]],
    why: &'static str,
}

/// A call with any arguments, and what it is for.
#[must_use]
pub const fn call(number: i64, why: &'static str) -> Call {
    Call { number, cases: &[], why }
}

impl Call {
    /// Only with arguments for which all checks of one of the cases hold.
    #[must_use]
    pub const fn only(self, cases: &'static [&'static [Check]]) -> Self {
        Self { cases, ..self }
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> i64 {
        self.number
    }

    /// What it is for.
    #[must_use]
    pub fn why(&self) -> &'static str {
        self.why
    }

    fn rules(&self) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
        let condition = |(argument, is): &Check| {
            let (operator, value) = match *is {
                Is::Equal(value) => (SeccompCmpOp::Eq, value),
                Is::With(bits) => (SeccompCmpOp::MaskedEq(bits.into()), bits),
                Is::Without(bits) => (SeccompCmpOp::MaskedEq(bits.into()), 0),
                Is::Not(value) => (SeccompCmpOp::Ne, value),
                Is::Null => (SeccompCmpOp::Eq, 0),
                Is::OwnProcess => (SeccompCmpOp::Eq, std::process::id()),
            };
            let len = if matches!(is, Is::Null) { SeccompCmpArgLen::Qword } else { SeccompCmpArgLen::Dword };
            SeccompCondition::new(*argument, len, operator, value.into())
        };
        let rule = |case: &&[Check]| SeccompRule::new(case.iter().map(condition).collect::<Result<_, _>>()?);
        self.cases.iter().map(rule).collect()
    }
}

/// A call that gets an error: its number, the error, and who tries it.
pub type Probe = (i64, i32, &'static str);

/// What happens on a call that is not in the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Otherwise {
    /// The process ends, see [`crate::exit_on_forbidden_calls`].
    End,
    /// It answers `ENOSYS`.
    Missing,
}

/// A filter that is ready to be applied.
#[derive(Clone)]
pub struct Filter(BpfProgram);

impl std::fmt::Debug for Filter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Filter").field("instructions", &self.0.len()).finish()
    }
}

impl Filter {
    /// Of the calls of all tables.
    ///
    /// # Errors
    /// When there are too many, or this processor is unknown.
    pub fn new(tables: &[&[Call]], probes: &[Probe], otherwise: Otherwise) -> Result<Self, JailError> {
        let calls: BTreeMap<i64, Call> =
            tables.iter().copied().flatten().map(|call| (call.number, *call)).collect();
        let (checked, free): (Vec<Call>, Vec<Call>) =
            calls.into_values().partition(|call| !call.cases.is_empty());
        let mut program = architecture(otherwise)?;
        program.extend(refusals(probes));
        let free: Vec<u32> = free.iter().filter_map(|call| u32::try_from(call.number).ok()).collect();
        program.extend(allow_any_arguments(&free));
        program.extend(allow(&checked, otherwise)?);
        Ok(Self(program))
    }

    /// Of one call, which gets an error where the checks of one of its cases hold. What else there is, other filters say.
    ///
    /// # Errors
    /// As of [`Filter::new`].
    pub fn refusing(call: &Call, error: i32) -> Result<Self, JailError> {
        let rules = [(call.number, call.rules()?)].into_iter().collect();
        let refused = SeccompAction::Errno(error.unsigned_abs());
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, refused, TargetArch::x86_64)?;
        Ok(Self(filter.try_into()?))
    }

    /// Binds this thread, and those that it makes from now on, for good. Filters that are there already stay: a call must pass all.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn apply(&self) -> Result<(), JailError> {
        Ok(seccompiler::apply_filter(&self.0)?)
    }
}

/// Calls that are compared one after the other. Linux runs a new filter once for every number that there is, to remember which need not be
/// asked about, and translates it. Short chains of short steps halve that: 0.9 million instructions for the event thread's filter, not 1.7.
const CALLS_AT_ONCE: usize = 8;

const LOAD: u16 = 0x20;
/// Offset of the number in what a filter sees of a call.
const NUMBER: u32 = 0;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_GREATER: u16 = 0x25;
const RETURN: u16 = 0x06;

fn instruction(code: u16, jt: usize, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt: u8::try_from(jt).unwrap_or(u8::MAX), jf, k }
}

/// Ends a process that calls by another architecture's numbers, and lets all others pass on.
fn architecture(otherwise: Otherwise) -> Result<BpfProgram, seccompiler::BackendError> {
    // The compiler's own: a program for no calls is this and one answer for all.
    let mut program = allow(&[], otherwise)?;
    program.pop();
    Ok(program)
}

/// Allows some calls, in order of their numbers, and lets all others pass on.
fn allow_any_arguments(numbers: &[u32]) -> BpfProgram {
    let mut parts: Vec<BpfProgram> = Vec::new();
    for part in numbers.chunks(CALLS_AT_ONCE) {
        let Some(last) = part.last() else { continue };
        // Above the last of them: beyond this part, which ends with a jump and the answer.
        let mut program = vec![instruction(JUMP_IF_GREATER, part.len() + 2, 0, *last)];
        for (index, number) in part.iter().enumerate() {
            program.push(instruction(JUMP_IF_EQUAL, part.len() - index, 0, *number));
        }
        parts.push(program);
    }
    let mut after = 0;
    for program in parts.iter_mut().rev() {
        // In between: beyond all parts.
        program.push(instruction(JUMP, 0, 0, after + 1));
        program.push(instruction(RETURN, 0, 0, u32::from(SeccompAction::Allow)));
        after += u32::try_from(program.len()).unwrap_or(0);
    }
    parts.concat()
}

/// A whole program for some calls; for all others it does `otherwise`.
fn allow(calls: &[Call], otherwise: Otherwise) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules = BTreeMap::new();
    for call in calls {
        rules.insert(call.number, call.rules()?);
    }
    let missing = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let otherwise = if otherwise == Otherwise::End { SeccompAction::Trap } else { missing };
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, otherwise, SeccompAction::Allow, arch)?.try_into()
}

/// Instructions that answer probes with their errors and let all others pass on. They stand before the rest, which has one answer only.
fn refusals(probes: &[Probe]) -> BpfProgram {
    let mut program = vec![instruction(LOAD, 0, 0, NUMBER)];
    for (number, error, _) in probes {
        let number = u32::try_from(*number).unwrap_or(u32::MAX);
        program.push(instruction(JUMP_IF_EQUAL, 0, 1, number));
        program.push(instruction(RETURN, 0, 0, SeccompAction::Errno(error.unsigned_abs()).into()));
    }
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs in a thread of its own, which the filter ends with.
    fn filtered<T: Send + 'static>(calls: &[Call], probes: &[Probe], f: fn() -> T) -> T {
        const THREADS: &[Call] = &[
            call(libc::SYS_futex, "joining"),
            call(libc::SYS_exit, "ending"),
            call(libc::SYS_sigaltstack, "ending"),
            call(libc::SYS_munmap, "ending"),
            call(libc::SYS_madvise, "ending"),
            call(libc::SYS_mmap, "allocating"),
            call(libc::SYS_mprotect, "allocating"),
            call(libc::SYS_brk, "allocating"),
            call(libc::SYS_rt_sigprocmask, "ending"),
        ];
        let filter = Filter::new(&[THREADS, calls], probes, Otherwise::Missing).unwrap();
        std::thread::spawn(move || {
            filter.apply().unwrap();
            f()
        })
        .join()
        .unwrap()
    }

    #[test]
    fn what_is_not_in_the_table_is_missing_and_probes_get_their_error() {
        let found = filtered(&[], &[(libc::SYS_socket, libc::EACCES, "a test")], || {
            let pair = std::os::unix::net::UnixStream::pair();
            let socket = std::net::UdpSocket::bind("127.0.0.1:0");
            (pair.unwrap_err().raw_os_error(), socket.unwrap_err().raw_os_error())
        });
        assert_eq!(found, (Some(libc::ENOSYS), Some(libc::EACCES)));
    }

    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    const AUDIT_ARCH_I386: u32 = 0x4000_0003;

    /// What a filter of calls without conditions answers.
    fn answer(program: &[sock_filter], arch: u32, number: u32) -> u32 {
        let (mut at, mut loaded) = (0, 0);
        loop {
            let step = &program[at];
            at += 1;
            match step.code {
                LOAD if step.k == NUMBER => loaded = number,
                LOAD => loaded = arch,
                JUMP => at += step.k as usize,
                JUMP_IF_EQUAL => at += usize::from(if loaded == step.k { step.jt } else { step.jf }),
                JUMP_IF_GREATER => at += usize::from(if loaded > step.k { step.jt } else { step.jf }),
                RETURN => return step.k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn parts_of_a_program_answer_as_one() {
        let mut calls: Vec<_> = (0..40).map(|n| call(n * n, "a test")).collect();
        calls.reverse();
        let filter = Filter::new(&[&calls], &[(7, libc::EACCES, "a test")], Otherwise::End).unwrap();
        for number in 0..2000_u32 {
            let allowed = calls.iter().any(|call| call.number == i64::from(number));
            let wanted = match number {
                7 => SeccompAction::Errno(libc::EACCES.unsigned_abs()),
                _ if allowed => SeccompAction::Allow,
                _ => SeccompAction::Trap,
            };
            assert_eq!(answer(&filter.0, AUDIT_ARCH_X86_64, number), u32::from(wanted), "{number}");
            let other = answer(&filter.0, AUDIT_ARCH_I386, number);
            assert_eq!(other, u32::from(SeccompAction::KillProcess), "{number} by another architecture");
        }
    }

    #[test]
    fn arguments_decide() {
        const UNIX: &[Call] = &[call(libc::SYS_socketpair, "a test").only(&[
            &[(0, Is::Equal(libc::AF_INET as u32))],
            &[(0, Is::Equal(libc::AF_UNIX as u32)), (1, Is::With(1)), (1, Is::Without(2))],
        ])];
        let found = filtered(UNIX, &[], || {
            let stream = std::os::unix::net::UnixStream::pair().is_ok();
            (stream, std::os::unix::net::UnixDatagram::pair().unwrap_err().raw_os_error())
        });
        assert_eq!(found, (true, Some(libc::ENOSYS)));
    }
}
