//! The rate of this host's time-stamp counter, which a machine emulated in software shares.
//!
//! The lab's kernel would measure it against the PIT; on a busy host that fails, and without a rate the machine has no
//! clock and hangs in its first second. So it is measured here, where failed tries can be repeated, and handed over.
// UNSAFETY: reading the counter is an intrinsic that the standard library marks unsafe.
#![expect(unsafe_code, reason = "_rdtsc is an unsafe intrinsic")]

use std::time::{Duration, Instant};

/// How far apart the two readings are.
const SPAN: Duration = Duration::from_millis(50);
/// A reading counts when the clock moved no more than this around it (or the best of the tries counts).
const BRACKET: Duration = Duration::from_nanos(400);
const TRIES: u32 = 1000;

/// The counter's rate in kHz, to about 20 parts in a million.
pub(crate) fn khz() -> u64 {
    let (first_time, first) = reading();
    std::thread::sleep(SPAN);
    let (second_time, second) = reading();
    let nanoseconds = second_time.duration_since(first_time).as_nanos().max(1);
    let ticks = u128::from(second.wrapping_sub(first));
    u64::try_from(ticks * 1_000_000 / nanoseconds).unwrap_or(u64::MAX)
}

/// The counter together with the time, taken when nothing came in between.
fn reading() -> (Instant, u64) {
    let mut best = once();
    for _ in 0..TRIES {
        if best.0 <= BRACKET {
            break;
        }
        let next = once();
        if next.0 < best.0 {
            best = next;
        }
    }
    (best.1, best.2)
}

fn once() -> (Duration, Instant, u64) {
    let before = Instant::now();
    // SAFETY: every x86_64 processor has the instruction, and no host that runs this forbids it to user space.
    let counter = unsafe { std::arch::x86_64::_rdtsc() };
    let bracket = before.elapsed();
    (bracket, before + bracket / 2, counter)
}

#[cfg(test)]
mod tests {
    #[test]
    fn rate_is_repeatable_and_plausible() {
        let one = super::khz();
        let two = super::khz();
        assert!((500_000..10_000_000).contains(&one), "{one} kHz");
        assert!(one.abs_diff(two) * 1000 < one, "{one} and {two} kHz");
    }
}
