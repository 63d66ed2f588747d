//! Ids and made-up names.

/// Hexadecimal digits of an id (Docker's).
const ID_DIGITS: usize = 64;

const QUALITIES: [&str; 32] = [
    "agile", "amber", "brave", "brisk", "calm", "clever", "cosmic", "crisp", "daring", "eager", "fleet",
    "gentle", "golden", "happy", "humble", "jolly", "keen", "kind", "lively", "lucid", "merry", "mighty",
    "nimble", "patient", "proud", "quick", "quiet", "rapid", "sharp", "silent", "swift", "vivid",
];
const THINGS: [&str; 32] = [
    "badger", "beacon", "birch", "bison", "canyon", "cedar", "comet", "condor", "coral", "crane", "delta",
    "ember", "falcon", "fjord", "glacier", "harbor", "heron", "island", "jaguar", "lagoon", "lynx", "maple",
    "meadow", "nebula", "otter", "puffin", "quartz", "raven", "river", "summit", "tundra", "willow",
];

/// Fills `bytes` from the kernel's random number generator.
pub(crate) fn random(bytes: &mut [u8]) {
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty()) {
            Ok(len) => filled += len,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "getrandom failed");
                return;
            }
        }
    }
}

/// A fresh id: 64 hexadecimal digits, of which the first 12 are not all decimal (they also serve as a host name).
pub(crate) fn new_id() -> String {
    loop {
        let mut bytes = [0; ID_DIGITS / 2];
        random(&mut bytes);
        let id: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        if id.bytes().take(12).any(|b| b.is_ascii_alphabetic()) {
            return id;
        }
    }
}

/// Whether `text` is an id.
pub(crate) fn is_id(text: &str) -> bool {
    text.len() == ID_DIGITS && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// A name that `taken` does not know.
pub(crate) fn new_name(taken: &dyn Fn(&str) -> bool) -> String {
    let mut attempt = 0_u32;
    loop {
        let mut bytes = [0; 2];
        random(&mut bytes);
        let pick =
            |list: &[&'static str; 32], byte: u8| list.get(usize::from(byte % 32)).copied().unwrap_or("name");
        let mut name = format!("{}_{}", pick(&QUALITIES, bytes[0]), pick(&THINGS, bytes[1]));
        if attempt > 3 {
            name.push_str(&attempt.to_string());
        }
        if !taken(&name) {
            return name;
        }
        attempt += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_names() {
        let id = new_id();
        assert!(is_id(&id));
        assert_ne!(id, new_id());
        for bad in ["", "abc", &id.to_uppercase(), &format!("{id}0")] {
            assert!(!is_id(bad), "{bad}");
        }
        let name = new_name(&|_| false);
        assert_eq!(crate::config::check_name(&name), Ok(()));
    }

    #[test]
    fn crowded_homes_still_get_a_name() {
        let name = new_name(&|name| !name.ends_with(|c: char| c.is_ascii_digit()));
        assert_eq!(crate::config::check_name(&name), Ok(()));
    }
}
