//! Names that a container may connect to: what each has is let through when it is asked for, see `policy`.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::NetworkError;
use super::firewall::Firewall;
use super::policy::{Policy, Seat};

/// How long an address is let through at least after it was asked for: programs keep them longer than they may.
const LEAST_TIME: Duration = Duration::from_secs(3600);
/// And at most.
const MOST_TIME: Duration = Duration::from_secs(24 * 3600);
/// Most addresses that are known to be let through; beyond, all are forgotten, and let through once more when they are asked for.
const MOST_KNOWN: usize = 4096;

/// The names of one container.
#[derive(Debug)]
pub(crate) struct Names {
    firewall: Firewall,
    seat: Seat,
    policy: Policy,
    /// Until when an address of a rule need not be let through again.
    known: Mutex<HashMap<(usize, Ipv4Addr), Instant>>,
}

impl Names {
    /// `None` when it makes no difference which name is asked for.
    pub(super) fn new(firewall: &Firewall, seat: Seat, policy: &Policy) -> Option<Self> {
        let matters = !policy.asks_anything() || policy.has_names();
        let own = || (firewall.clone(), policy.clone());
        matters.then(own).map(|(firewall, policy)| Self { firewall, seat, policy, known: Mutex::default() })
    }

    /// The rules that have a name; `None`: it may not be asked for.
    pub(crate) fn may_ask(&self, name: &str) -> Option<Vec<usize>> {
        let rules = self.policy.rules_of(name);
        (!rules.is_empty() || self.policy.asks_anything()).then_some(rules)
    }

    /// Lets the addresses of a name through, by the rules that have it. `found`: with the seconds for which each holds.
    ///
    /// # Errors
    /// `nft` fails.
    pub(crate) async fn learn(&self, rules: &[usize], found: &[(Ipv4Addr, u32)]) -> Result<(), NetworkError> {
        let now = Instant::now();
        let longest = found.iter().map(|(_, seconds)| *seconds).max().unwrap_or_default();
        let time = Duration::from_secs(longest.into()).clamp(LEAST_TIME, MOST_TIME);
        let mut new: Vec<(usize, Ipv4Addr)> =
            rules.iter().flat_map(|rule| found.iter().map(move |(address, _)| (*rule, *address))).collect();
        new.sort_unstable();
        new.dedup();
        {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            new.retain(|one| known.get(one).is_none_or(|until| *until <= now));
        }
        if new.is_empty() {
            return Ok(());
        }
        self.firewall.learn(self.seat, &new, time).await?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() + new.len() > MOST_KNOWN {
            known.clear();
        }
        // Renewed when half of the time is over.
        known.extend(new.into_iter().map(|one| (one, now + time / 2)));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ContainerConfig;

    fn names(rules: Option<&[&str]>) -> Option<Names> {
        let egress = rules.map(|rules| rules.iter().map(|rule| rule.parse().unwrap()).collect());
        let config = ContainerConfig { egress, ..Default::default() };
        let firewall = Firewall::new("hyper0", "10.120.0.0/16".parse().unwrap(), super::super::Place::Host);
        Names::new(&firewall, Seat(Ipv4Addr::new(10, 120, 0, 2)), &Policy::of(&config))
    }

    #[test]
    fn who_may_ask_for_what() {
        assert!(names(None).is_none());
        assert!(names(Some(&["any", "host"])).is_none());
        let some = names(Some(&["example.org:443", "192.0.2.0/24"])).unwrap();
        assert_eq!((some.may_ask("example.org"), some.may_ask("example.net")), (Some(vec![0]), None));
        let both = names(Some(&["any:443", "example.org:22", "*.org:23"])).unwrap();
        assert_eq!(both.may_ask("example.org"), Some(vec![1, 2]));
        assert_eq!(both.may_ask("example.net"), Some(vec![]));
        assert_eq!(names(Some(&[])).unwrap().may_ask("example.org"), None);
    }

    #[tokio::test]
    async fn what_is_known_is_not_let_through_again() {
        let names = names(Some(&["example.org"])).unwrap();
        let address = Ipv4Addr::new(192, 0, 2, 1);
        names.known.lock().unwrap().insert((0, address), Instant::now() + LEAST_TIME);
        names.learn(&[0], &[(address, 5)]).await.unwrap();
        names.learn(&[], &[(Ipv4Addr::new(192, 0, 2, 2), 5)]).await.unwrap();
    }
}
