//! The compiler: decisions by number, then a tree of comparisons.

use std::collections::BTreeMap;

use super::{jump, op, statement, table};
use crate::error::AgentError;
use crate::spec::{SeccompSpec, SyscallArgSpec};
use crate::sys::SockFilter;

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
/// Bit of x32 system calls, which share the architecture of 64-bit ones.
const X32_BIT: u32 = 0x4000_0000;
/// `BPF_MAXINSNS`.
const MAX_INSTRUCTIONS: usize = 4096;
/// Most names and conditions in a profile; Docker's has about 450.
const MAX_RULES: usize = 16_384;

const KILL_PROCESS: u32 = 0x8000_0000;
const KILL_THREAD: u32 = 0;
const TRAP: u32 = 0x0003_0000;
const ERRNO: u32 = 0x0005_0000;
const TRACE: u32 = 0x7ff0_0000;
const LOG: u32 = 0x7ffc_0000;
const ALLOW: u32 = 0x7fff_0000;
const ENOSYS: u32 = 38;
const EPERM: u32 = 1;

/// Offsets in `struct seccomp_data`.
const OFFSET_NR: u32 = 0;
const OFFSET_ARCH: u32 = 4;
const OFFSET_ARGS: u32 = 16;

/// A filter ready to install.
#[derive(Debug)]
pub(crate) struct Program {
    instructions: Vec<SockFilter>,
    flags: u64,
}

/// What happens to one system call: conditions in order, then the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Decision {
    conditional: Vec<(Vec<Condition>, u32)>,
    otherwise: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Condition {
    offset: u32,
    compare: Compare,
    value: u64,
    value_two: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compare {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    MaskedEqual,
}

impl Program {
    /// Compiles a profile.
    ///
    /// # Errors
    /// An action, comparison, flag or argument index that does not exist, or a program that is too long. Names of system calls
    /// that do not exist are passed over, as other runtimes do: profiles name those of all architectures.
    pub(crate) fn compile(profile: &SeccompSpec) -> Result<Self, AgentError> {
        let count: usize = profile.syscalls.iter().map(|s| s.names.len().saturating_add(s.args.len())).sum();
        if count > MAX_RULES {
            return Err(AgentError::limit("seccomp rules", MAX_RULES));
        }
        let native = section(profile, table::X86_64)?;
        let mut instructions = vec![statement(op::LD, OFFSET_ARCH)];
        // The native section is long: jump over it with JA, whose offset has 32 bits.
        instructions.push(jump(op::JEQ, AUDIT_ARCH_X86_64, 1, 0));
        instructions.push(statement(op::JA, length(&native)?.saturating_add(3)));
        instructions.push(statement(op::LD, OFFSET_NR));
        instructions.push(jump(op::JGE, X32_BIT, 0, 1));
        instructions.push(statement(op::RET, ERRNO | ENOSYS));
        instructions.extend(native);
        if profile.architectures.iter().any(|a| a == "SCMP_ARCH_X86") {
            instructions.push(jump(op::JEQ, AUDIT_ARCH_I386, 1, 0));
            instructions.push(statement(op::RET, KILL_PROCESS));
            instructions.push(statement(op::LD, OFFSET_NR));
            instructions.extend(section(profile, table::I386)?);
        } else {
            instructions.push(statement(op::RET, KILL_PROCESS));
        }
        if instructions.len() > MAX_INSTRUCTIONS {
            return Err(AgentError::limit("seccomp instructions", MAX_INSTRUCTIONS));
        }
        Ok(Self { instructions, flags: flags(&profile.flags)? })
    }

    /// The instructions.
    pub(crate) fn instructions(&self) -> &[SockFilter] {
        &self.instructions
    }

    /// `SECCOMP_FILTER_FLAG_*`.
    pub(crate) fn flags(&self) -> u64 {
        self.flags
    }
}

fn length(code: &[SockFilter]) -> Result<u32, AgentError> {
    u32::try_from(code.len()).map_err(|_| AgentError::limit("seccomp instructions", MAX_INSTRUCTIONS))
}

fn flags(names: &[String]) -> Result<u64, AgentError> {
    names.iter().try_fold(0, |flags, name| match name.as_str() {
        // Synchronising threads means nothing to a program of one.
        "SECCOMP_FILTER_FLAG_TSYNC" => Ok(flags),
        "SECCOMP_FILTER_FLAG_LOG" => Ok(flags | 2),
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => Ok(flags | 4),
        other => Err(AgentError::invalid(format!("seccomp flag {other:?} is not known"))),
    })
}

fn action(name: &str, errno: Option<u32>) -> Result<u32, AgentError> {
    match name {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => Ok(KILL_THREAD),
        "SCMP_ACT_KILL_PROCESS" => Ok(KILL_PROCESS),
        "SCMP_ACT_TRAP" => Ok(TRAP),
        "SCMP_ACT_ERRNO" => Ok(ERRNO | (errno.unwrap_or(EPERM) & 0xffff)),
        "SCMP_ACT_TRACE" => Ok(TRACE | (errno.unwrap_or(EPERM) & 0xffff)),
        "SCMP_ACT_LOG" => Ok(LOG),
        "SCMP_ACT_ALLOW" => Ok(ALLOW),
        other => Err(AgentError::invalid(format!("seccomp action {other:?} is not supported"))),
    }
}

fn condition(arg: &SyscallArgSpec) -> Result<Condition, AgentError> {
    if arg.index > 5 {
        return Err(AgentError::invalid(format!("seccomp argument {} does not exist", arg.index)));
    }
    let compare = match arg.op.as_str() {
        "SCMP_CMP_EQ" => Compare::Equal,
        "SCMP_CMP_NE" => Compare::NotEqual,
        "SCMP_CMP_LT" => Compare::Less,
        "SCMP_CMP_LE" => Compare::LessOrEqual,
        "SCMP_CMP_GT" => Compare::Greater,
        "SCMP_CMP_GE" => Compare::GreaterOrEqual,
        "SCMP_CMP_MASKED_EQ" => Compare::MaskedEqual,
        other => return Err(AgentError::invalid(format!("seccomp comparison {other:?} is not known"))),
    };
    let offset = OFFSET_ARGS.saturating_add(arg.index.saturating_mul(8));
    Ok(Condition { offset, compare, value: arg.value, value_two: arg.value_two })
}

/// The alternatives of one rule: all conditions together, or each alone when two are on the same argument.
fn alternatives(args: &[SyscallArgSpec]) -> Result<Vec<Vec<Condition>>, AgentError> {
    let conditions = args.iter().map(condition).collect::<Result<Vec<_>, _>>()?;
    let mut offsets: Vec<u32> = conditions.iter().map(|c| c.offset).collect();
    offsets.sort_unstable();
    offsets.dedup();
    if offsets.len() == conditions.len() {
        Ok(vec![conditions])
    } else {
        Ok(conditions.into_iter().map(|c| vec![c]).collect())
    }
}

/// The code for one architecture; the number is in the accumulator.
fn section(profile: &SeccompSpec, numbers: &[(u32, &str)]) -> Result<Vec<SockFilter>, AgentError> {
    let default = action(&profile.default_action, profile.default_errno_ret)?;
    let mut conditional: BTreeMap<u32, Vec<(Vec<Condition>, u32)>> = BTreeMap::new();
    let mut unconditional: BTreeMap<u32, u32> = BTreeMap::new();
    for rule in &profile.syscalls {
        let action = action(&rule.action, rule.errno_ret)?;
        let alternatives = alternatives(&rule.args)?;
        for number in rule.names.iter().filter_map(|name| table::number(numbers, name)) {
            if rule.args.is_empty() {
                unconditional.entry(number).or_insert(action);
            } else {
                let rules = conditional.entry(number).or_default();
                rules.extend(alternatives.iter().map(|conditions| (conditions.clone(), action)));
            }
        }
    }
    let last = conditional.keys().chain(unconditional.keys()).copied().max();
    let end = last.map_or(0, |n| n.saturating_add(1)).min(table::end(numbers));
    let beyond = if default & 0xffff_0000 == ERRNO && end > 0 { ERRNO | ENOSYS } else { default };
    let mut segments: Vec<(u32, Decision)> = Vec::new();
    for number in 0..=end {
        let decision = if number == end {
            Decision { conditional: Vec::new(), otherwise: beyond }
        } else {
            Decision {
                conditional: conditional.remove(&number).unwrap_or_default(),
                otherwise: unconditional.get(&number).copied().unwrap_or(default),
            }
        };
        if segments.last().is_none_or(|(_, previous)| *previous != decision) {
            segments.push((number, decision));
        }
    }
    tree(&segments)
}

fn tree(segments: &[(u32, Decision)]) -> Result<Vec<SockFilter>, AgentError> {
    if let [(_, decision)] = segments {
        return leaf(decision);
    }
    let (left, right) = segments.split_at(segments.len() / 2);
    let Some((pivot, _)) = right.first() else { return Ok(Vec::new()) };
    let (left, right) = (tree(left)?, tree(right)?);
    let mut code = Vec::with_capacity(left.len().saturating_add(right.len()).saturating_add(2));
    match u8::try_from(left.len()) {
        Ok(short) => code.push(jump(op::JGE, *pivot, short, 0)),
        Err(_) => {
            code.push(jump(op::JGE, *pivot, 0, 1));
            code.push(statement(op::JA, length(&left)?));
        }
    }
    code.extend(left);
    code.extend(right);
    Ok(code)
}

fn leaf(decision: &Decision) -> Result<Vec<SockFilter>, AgentError> {
    let mut code = Vec::new();
    for (conditions, action) in &decision.conditional {
        let mut body: Vec<Step> = conditions.iter().flat_map(|c| steps(*c)).collect();
        body.push(Step::Do(statement(op::RET, *action)));
        code.extend(resolve(&body)?);
    }
    code.push(statement(op::RET, decision.otherwise));
    Ok(code)
}

/// One instruction of a rule, before it is known how far away the next rule is.
enum Step {
    Do(SockFilter),
    /// Go on when the comparison holds, else to the next rule.
    Need(u16, u32),
    /// Go to the next rule when the comparison holds.
    Refuse(u16, u32),
}

fn resolve(body: &[Step]) -> Result<Vec<SockFilter>, AgentError> {
    let resolved = body.iter().enumerate().map(|(at, step)| {
        let to_next = body.len().saturating_sub(at).saturating_sub(1);
        let to_next = u8::try_from(to_next).map_err(|_| AgentError::limit("seccomp conditions", 255))?;
        Ok(match step {
            Step::Do(instruction) => *instruction,
            Step::Need(code, k) => jump(*code, *k, 0, to_next),
            Step::Refuse(code, k) => jump(*code, *k, to_next, 0),
        })
    });
    resolved.collect()
}

/// A 64-bit comparison with 32-bit instructions: the high half decides unless it is equal.
fn steps(c: Condition) -> Vec<Step> {
    #[expect(clippy::cast_possible_truncation, reason = "the halves of a 64-bit value")]
    let halves = |v: u64| ((v >> 32) as u32, v as u32);
    let ((high, low), (high_two, low_two)) = (halves(c.value), halves(c.value_two));
    let load_low = || Step::Do(statement(op::LD, c.offset));
    let load_high = || Step::Do(statement(op::LD, c.offset.saturating_add(4)));
    match c.compare {
        Compare::Equal => vec![load_high(), Step::Need(op::JEQ, high), load_low(), Step::Need(op::JEQ, low)],
        Compare::NotEqual => {
            vec![load_high(), Step::Do(jump(op::JEQ, high, 0, 2)), load_low(), Step::Refuse(op::JEQ, low)]
        }
        Compare::Greater | Compare::GreaterOrEqual => {
            let code = if c.compare == Compare::Greater { op::JGT } else { op::JGE };
            vec![
                load_high(),
                Step::Do(jump(op::JGT, high, 3, 0)),
                Step::Need(op::JEQ, high),
                load_low(),
                Step::Need(code, low),
            ]
        }
        Compare::Less | Compare::LessOrEqual => {
            let code = if c.compare == Compare::Less { op::JGE } else { op::JGT };
            vec![
                load_high(),
                Step::Refuse(op::JGT, high),
                Step::Do(jump(op::JEQ, high, 0, 2)),
                load_low(),
                Step::Refuse(code, low),
            ]
        }
        Compare::MaskedEqual => vec![
            load_high(),
            Step::Do(statement(op::AND, high)),
            Step::Need(op::JEQ, high_two),
            load_low(),
            Step::Do(statement(op::AND, low)),
            Step::Need(op::JEQ, low_two),
        ],
    }
}
