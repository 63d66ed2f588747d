//! The environment of a process: Docker's defaults, then the image's and the user's; of two with one name the later wins.

/// Where programs are looked for when neither image nor user says so.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// `HOME` is missing here: the agent knows the user's.
pub(super) fn environment(wished: &[String], hostname: &str, terminal: bool) -> Vec<String> {
    let mut all = vec![DEFAULT_PATH.to_owned(), format!("HOSTNAME={hostname}")];
    if terminal {
        all.push("TERM=xterm".to_owned());
    }
    for entry in wished {
        let name = entry.split('=').next().unwrap_or_default();
        let place = all.iter().position(|have| have.split('=').next() == Some(name));
        match (place, entry.contains('=')) {
            (Some(at), true) => {
                if let Some(have) = all.get_mut(at) {
                    entry.clone_into(have);
                }
            }
            (None, true) => all.push(entry.clone()),
            // A name without a value takes the variable away.
            (Some(at), false) => {
                all.remove(at);
            }
            (None, false) => {}
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(wished: &[&str], terminal: bool) -> Vec<String> {
        let wished: Vec<String> = wished.iter().map(|s| (*s).to_owned()).collect();
        environment(&wished, "box", terminal)
    }

    #[test]
    fn later_wins_in_place() {
        assert_eq!(env(&[], false), [DEFAULT_PATH, "HOSTNAME=box"]);
        assert_eq!(
            env(&["PATH=/x", "A=1", "A=2=3"], true),
            ["PATH=/x", "HOSTNAME=box", "TERM=xterm", "A=2=3"]
        );
        assert_eq!(env(&["HOSTNAME", "B"], false), [DEFAULT_PATH]);
    }
}
