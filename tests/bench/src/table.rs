//! The table: one row per phase, medians in milliseconds after the fork.

use std::fmt::Write;

use crate::Start;

type Phase = fn(&Start) -> Option<u64>;

const PHASES: [(&str, Phase); 6] = [
    ("process runs", |start| start.main_us),
    ("request read", |start| start.spec_us),
    ("machine built", |start| start.built_us),
    ("guest entered", |start| start.entered_us),
    ("user space", |start| start.user_space_us),
    ("agent ready", |start| start.agent_ready_us),
];

/// Renders the medians of both contenders.
pub(crate) fn render(ours: &[Start], peers: &[Start]) -> String {
    let mut text = format!("{:<16}{:>12}{:>16}\n", "phase", "hyper-vmm", "QEMU microvm");
    for (name, phase) in PHASES {
        // A string takes whatever is written to it.
        let _ = writeln!(text, "{name:<16}{:>12}{:>16}", cell(ours, phase), cell(peers, phase));
    }
    text
}

fn cell(starts: &[Start], phase: Phase) -> String {
    let mut values: Vec<u64> = starts.iter().filter_map(phase).collect();
    values.sort_unstable();
    match values.get(values.len() / 2) {
        Some(us) => format!("{}.{}", us / 1000, us % 1000 / 100),
        None => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_gaps_are_shown() {
        let start = |us| Start { user_space_us: Some(us), ..Start::default() };
        let text = render(&[start(3_000), start(1_000), start(2_500)], &[start(9_990)]);
        let row: Vec<_> =
            text.lines().find(|line| line.starts_with("user space")).unwrap().split_whitespace().collect();
        assert_eq!(row, ["user", "space", "2.5", "9.9"]);
        assert!(text.lines().any(|line| line.starts_with("agent ready") && line.ends_with('-')));
    }
}
