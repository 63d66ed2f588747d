//! Restart policies: Docker's.

use std::time::Duration;

use crate::config::RestartPolicy;

/// First pause between an end and the next start.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A container that ran this long has started well: the next pause is the first again.
const RAN_WELL: Duration = Duration::from_secs(10);

/// Whether a container that ended with `exit_code` is started again, after `restarts` times.
pub(super) fn restarts(policy: RestartPolicy, exit_code: u8, restarts: u32) -> bool {
    match policy {
        RestartPolicy::No => false,
        RestartPolicy::OnFailure { max_retries } => {
            exit_code != 0 && (max_retries == 0 || restarts < max_retries)
        }
        RestartPolicy::Always | RestartPolicy::UnlessStopped => true,
    }
}

/// The pauses between starts.
#[derive(Debug, Default)]
pub(super) struct BackOff {
    last: Option<Duration>,
}

impl BackOff {
    /// The pause after a run of this length.
    pub(super) fn next(&mut self, ran: Duration) -> Duration {
        let pause = match self.last {
            Some(last) if ran < RAN_WELL => (last * 2).min(LONGEST_PAUSE),
            _ => FIRST_PAUSE,
        };
        self.last = Some(pause);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies() {
        let on_failure = |max_retries| RestartPolicy::OnFailure { max_retries };
        for (policy, exit_code, count, expected) in [
            (RestartPolicy::No, 1, 0, false),
            (RestartPolicy::Always, 0, 1000, true),
            (RestartPolicy::UnlessStopped, 0, 0, true),
            (on_failure(0), 0, 0, false),
            (on_failure(0), 1, 1000, true),
            (on_failure(3), 1, 2, true),
            (on_failure(3), 1, 3, false),
            (on_failure(3), 0, 0, false),
        ] {
            assert_eq!(restarts(policy, exit_code, count), expected, "{policy} {exit_code} {count}");
        }
    }

    #[test]
    fn pauses_double_up_to_a_minute_and_begin_anew() {
        let mut back_off = BackOff::default();
        let short = Duration::from_secs(1);
        let pauses: Vec<u128> = (0..12).map(|_| back_off.next(short).as_millis()).collect();
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 51200, 60000, 60000]);
        assert_eq!(back_off.next(RAN_WELL), FIRST_PAUSE);
        assert_eq!(back_off.next(short), FIRST_PAUSE * 2);
    }
}
