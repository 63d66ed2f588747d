//! Device access as an eBPF program, which is how cgroup v2 has it.
//!
//! The program goes through the rules from the last to the first; the first that matches decides, and without one access is denied.

use crate::error::AgentError;
use crate::spec::DeviceRule;
use crate::sys::BpfInsn;

/// Most rules; each costs up to nine instructions of the kernel's 4096 without privileges.
const MAX_RULES: usize = 400;

/// `BPF_DEVCG_ACC_*`.
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MKNOD | READ | WRITE;

/// Registers: type, access, major, minor and scratch. The context comes in r1.
const R0: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 1;

const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xbf;
const MOVE_IMMEDIATE: u8 = 0xb7;
const AND: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_NOT_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

fn insn(code: u8, to: u8, from: u8, off: i16, imm: i32) -> BpfInsn {
    BpfInsn { code, regs: from << 4 | to, off, imm }
}

/// What Docker allows when a specification says nothing: making any node, and using those that every container has.
pub(crate) fn default_rules() -> Vec<DeviceRule> {
    let rule = |kind: &str, major, minor, access: &str| DeviceRule {
        allow: true,
        kind: kind.to_owned(),
        major,
        minor,
        access: access.to_owned(),
    };
    let mut rules = vec![rule("c", None, None, "m"), rule("b", None, None, "m")];
    for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)] {
        rules.push(rule("c", Some(major), Some(minor), "rwm"));
    }
    // Terminals of devpts.
    rules.push(rule("c", Some(136), None, "rwm"));
    rules
}

/// Compiles rules.
///
/// # Errors
/// Too many, or a kind, number or access that does not exist.
pub(crate) fn compile(rules: &[DeviceRule]) -> Result<Vec<BpfInsn>, AgentError> {
    if rules.len() > MAX_RULES {
        return Err(AgentError::limit("device rules", MAX_RULES));
    }
    let mut program = vec![
        insn(LOAD_WORD, KIND, CONTEXT, 0, 0),
        insn(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        insn(LOAD_WORD, MINOR, CONTEXT, 8, 0),
        insn(MOVE, ACCESS, KIND, 0, 0),
        insn(AND, KIND, 0, 0, 0xffff),
        insn(SHIFT_RIGHT, ACCESS, 0, 0, 16),
    ];
    for rule in rules.iter().rev() {
        let block = block(rule)?;
        // Move and exit alone: it decides everything, and the kernel refuses what no path leads to.
        let is_last = block.len() == 2;
        program.extend(block);
        if is_last {
            return Ok(program);
        }
    }
    program.push(insn(MOVE_IMMEDIATE, R0, 0, 0, 0));
    program.push(insn(EXIT, 0, 0, 0, 0));
    Ok(program)
}

/// One condition: leave the block when the register compares so.
struct Leave(u8, u8, i32);

fn block(rule: &DeviceRule) -> Result<Vec<BpfInsn>, AgentError> {
    let mut code = Vec::new();
    let mut leaves = Vec::new();
    match rule.kind.as_str() {
        "" | "a" => {}
        "b" => leaves.push(Leave(JUMP_NOT_EQUAL, KIND, 1)),
        "c" | "u" => leaves.push(Leave(JUMP_NOT_EQUAL, KIND, 2)),
        other => return Err(AgentError::invalid(format!("device rule of kind {other:?}"))),
    }
    for (register, number) in [(MAJOR, rule.major), (MINOR, rule.minor)] {
        if let Some(number) = number.filter(|n| *n >= 0) {
            let number = i32::try_from(number)
                .map_err(|_| AgentError::invalid(format!("device number {number} in a rule")))?;
            leaves.push(Leave(JUMP_NOT_EQUAL, register, number));
        }
    }
    let access = rule.access.chars().try_fold(0, |bits, c| match c {
        'r' => Ok(bits | READ),
        'w' => Ok(bits | WRITE),
        'm' => Ok(bits | MKNOD),
        other => Err(AgentError::invalid(format!("device access {other:?}"))),
    })?;
    let access = if access == 0 { ALL } else { access };
    if access != ALL {
        code.push(insn(MOVE, SCRATCH, ACCESS, 0, 0));
        if rule.allow {
            // Everything that is asked for must be allowed.
            code.push(insn(AND, SCRATCH, 0, 0, ALL & !access));
            leaves.push(Leave(JUMP_NOT_EQUAL, SCRATCH, 0));
        } else {
            // One thing that is denied is enough.
            code.push(insn(AND, SCRATCH, 0, 0, access));
            leaves.push(Leave(JUMP_EQUAL, SCRATCH, 0));
        }
    }
    let count = leaves.len();
    for (position, leave) in leaves.into_iter().enumerate() {
        // Past the conditions that are left, the move and the exit.
        let distance = i16::try_from(count.saturating_sub(position).saturating_add(1)).unwrap_or(i16::MAX);
        code.push(insn(leave.0, leave.1, 0, distance, leave.2));
    }
    code.push(insn(MOVE_IMMEDIATE, R0, 0, 0, i32::from(rule.allow)));
    code.push(insn(EXIT, 0, 0, 0, 0));
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u32 = 1;
    const CHAR: u32 = 2;

    /// Runs a program as the kernel would.
    fn run(program: &[BpfInsn], kind: u32, major: u32, minor: u32, access: i32) -> bool {
        let context = [(u32::try_from(access).unwrap() << 16) | kind, major, minor];
        let mut r = [0_i64; 11];
        let mut pc = 0_usize;
        loop {
            let i = program[pc];
            pc += 1;
            let (to, from) = (usize::from(i.regs & 15), usize::from(i.regs >> 4));
            let jump = usize::try_from(i.off).unwrap();
            match i.code {
                LOAD_WORD => r[to] = i64::from(context[jump / 4]),
                MOVE => r[to] = r[from],
                MOVE_IMMEDIATE => r[to] = i64::from(i.imm),
                AND => r[to] &= i64::from(i.imm),
                SHIFT_RIGHT => r[to] >>= i.imm,
                JUMP_EQUAL => pc += if r[to] == i64::from(i.imm) { jump } else { 0 },
                JUMP_NOT_EQUAL => pc += if r[to] == i64::from(i.imm) { 0 } else { jump },
                EXIT => return r[0] == 1,
                other => panic!("operation {other:#x}"),
            }
        }
    }

    #[test]
    fn defaults_are_dockers() {
        let program = compile(&default_rules()).unwrap();
        assert!(run(&program, CHAR, 1, 3, READ | WRITE), "null");
        assert!(run(&program, CHAR, 136, 7, READ | WRITE), "pts");
        assert!(run(&program, BLOCK, 254, 0, MKNOD), "making a node is no use of it");
        assert!(!run(&program, BLOCK, 254, 0, READ), "the image disk");
        assert!(!run(&program, CHAR, 1, 1, READ), "mem");
        assert!(!run(&program, CHAR, 10, 229, READ | MKNOD), "fuse");
    }

    #[test]
    fn the_last_rule_decides() {
        let rule = |allow, kind: &str, major, minor, access: &str| DeviceRule {
            allow,
            kind: kind.to_owned(),
            major,
            minor,
            access: access.to_owned(),
        };
        let program = compile(&[
            rule(false, "a", None, None, "rwm"),
            rule(true, "c", Some(10), Some(229), "rw"),
            rule(true, "", Some(-1), Some(-1), "r"),
            rule(false, "b", Some(8), None, "w"),
        ])
        .unwrap();
        assert!(run(&program, CHAR, 10, 229, READ | WRITE));
        assert!(!run(&program, CHAR, 10, 229, MKNOD));
        assert!(run(&program, BLOCK, 8, 1, READ));
        assert!(!run(&program, BLOCK, 8, 1, READ | WRITE));
        assert!(!run(&program, BLOCK, 9, 1, WRITE));
        let all = compile(&[rule(false, "c", None, None, ""), rule(true, "a", None, None, "")]).unwrap();
        assert_eq!(all.len(), 8, "nothing after what decides everything: the kernel refuses dead code");
        assert!(run(&all, BLOCK, 254, 0, ALL));
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(compile(&[DeviceRule { kind: "x".to_owned(), ..DeviceRule::default() }]).is_err());
        assert!(compile(&[DeviceRule { access: "z".to_owned(), ..DeviceRule::default() }]).is_err());
        assert!(compile(&[DeviceRule { major: Some(1 << 40), ..DeviceRule::default() }]).is_err());
        assert!(compile(&vec![DeviceRule::default(); MAX_RULES + 1]).is_err());
    }
}
