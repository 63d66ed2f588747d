//! Docker's USER, resolved against the image's /etc/passwd and /etc/group.

use crate::error::{AgentError, ErrorKind};

/// Most of /etc/passwd and /etc/group that is read, bytes: the image is hostile.
pub(crate) const MAX_DATABASE_BYTES: usize = 4 << 20;
/// Most supplementary groups (`NGROUPS_MAX`).
const MAX_GROUPS: usize = 65_536;

/// Who a process runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups, the primary one first, each once.
    pub groups: Vec<u32>,
    /// Home folder by /etc/passwd.
    pub home: Option<String>,
}

/// The two databases, as bytes that need not be text.
#[derive(Debug, Default)]
pub(crate) struct Databases {
    pub passwd: Vec<u8>,
    pub group: Vec<u8>,
}

struct Passwd<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn lines(bytes: &[u8]) -> impl Iterator<Item = &str> {
    bytes
        .split(|b| *b == b'\n')
        .filter_map(|line| std::str::from_utf8(line).ok())
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

impl Databases {
    fn users(&self) -> impl Iterator<Item = Passwd<'_>> {
        lines(&self.passwd).filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            let uid = fields.nth(1)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            let home = fields.nth(1).unwrap_or_default();
            Some(Passwd { name, uid, gid, home })
        })
    }

    fn groups(&self) -> impl Iterator<Item = Group<'_>> {
        lines(&self.group).filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            let gid = fields.nth(1)?.parse().ok()?;
            Some(Group { name, gid, members: fields.next().unwrap_or_default() })
        })
    }

    /// The name of a user.
    pub(crate) fn user_name(&self, uid: u32) -> Option<&str> {
        self.users().find(|u| u.uid == uid).map(|u| u.name)
    }

    fn home_of(&self, uid: u32) -> Option<String> {
        self.users().find(|u| u.uid == uid).map(|u| u.home.to_owned()).filter(|h| !h.is_empty())
    }

    fn gid_of(&self, group: &str) -> Result<u32, AgentError> {
        let number = parse_id(group)?;
        let found = self.groups().find(|g| g.name == group || Some(g.gid) == number).map(|g| g.gid);
        found.or(number).ok_or_else(|| {
            AgentError::refused(
                ErrorKind::Invalid,
                format!("unable to find group {group}: no matching entries in group file"),
            )
        })
    }

    /// Resolves `user`, Docker's `""`, `"uid"`, `"name"`, `"uid:gid"`, `"name:group"`, with additional groups by name or number.
    ///
    /// # Errors
    /// A name that is not in the database, or a number out of range; the texts are Docker's.
    pub(crate) fn resolve(&self, user: &str, additional: &[String]) -> Result<Identity, AgentError> {
        let (user, group) = match user.split_once(':') {
            Some((user, group)) => (user, group),
            None => (user, ""),
        };
        let number = if user.is_empty() { Some(0) } else { parse_id(user)? };
        let entry = self.users().find(|u| (!user.is_empty() && u.name == user) || Some(u.uid) == number);
        let (uid, mut gid, home) = match (&entry, number) {
            (Some(entry), _) => (entry.uid, entry.gid, Some(entry.home.to_owned())),
            (None, Some(number)) => (number, 0, None),
            (None, None) => {
                return Err(AgentError::refused(
                    ErrorKind::Invalid,
                    format!("unable to find user {user}: no matching entries in passwd file"),
                ));
            }
        };
        let mut groups = Vec::new();
        if group.is_empty() {
            if let Some(entry) = &entry {
                let member = |g: &Group<'_>| g.members.split(',').any(|m| m.trim() == entry.name);
                groups.extend(self.groups().filter(member).map(|g| g.gid));
            }
        } else {
            gid = self.gid_of(group)?;
        }
        for name in additional {
            groups.push(self.gid_of(name)?);
        }
        let home = home.filter(|h| !h.is_empty());
        Ok(Identity { uid, gid, groups: unique(gid, &groups)?, home })
    }

    /// A user by number, with exactly these groups.
    ///
    /// # Errors
    /// Too many groups.
    pub(crate) fn by_number(&self, uid: u32, gid: u32, groups: &[u32]) -> Result<Identity, AgentError> {
        Ok(Identity { uid, gid, groups: unique(gid, groups)?, home: self.home_of(uid) })
    }
}

fn unique(first: u32, rest: &[u32]) -> Result<Vec<u32>, AgentError> {
    let mut seen = std::collections::BTreeSet::from([first]);
    let groups: Vec<u32> =
        std::iter::once(first).chain(rest.iter().copied().filter(|g| seen.insert(*g))).collect();
    if groups.len() > MAX_GROUPS { Err(AgentError::limit("groups", MAX_GROUPS)) } else { Ok(groups) }
}

/// A decimal number as an id; `None` for a name.
fn parse_id(text: &str) -> Result<Option<u32>, AgentError> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(None);
    }
    match text.parse::<u32>() {
        Ok(id) if id <= i32::MAX.unsigned_abs() => Ok(Some(id)),
        _ => Err(AgentError::refused(
            ErrorKind::Invalid,
            format!("uids and gids must be in range 0-{}, not {text}", i32::MAX),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Databases {
        Databases {
            passwd: b"root:x:0:0:root:/root:/bin/sh\n# a comment\nbroken\npostgres:x:999:998::/var/lib/postgresql:/bin/sh\n\
                      \xff\xfe:x:1:1::/:\nnohome:x:7:7:::\n12:x:500:501::/twelve:\n"
                .to_vec(),
            group: b"root:x:0:\nwheel:x:10:root\npostgres:x:998:\nssl-cert:x:101:postgres,www\nstaff:x:50:\n".to_vec(),
        }
    }

    fn id(uid: u32, gid: u32, groups: &[u32], home: Option<&str>) -> Identity {
        Identity { uid, gid, groups: groups.to_vec(), home: home.map(str::to_owned) }
    }

    #[test]
    fn users_are_resolved_as_docker_does() {
        let image = image();
        let resolve = |user: &str| image.resolve(user, &[]).unwrap();
        assert_eq!(resolve(""), id(0, 0, &[0, 10], Some("/root")));
        assert_eq!(resolve("root"), id(0, 0, &[0, 10], Some("/root")));
        assert_eq!(resolve("0"), id(0, 0, &[0, 10], Some("/root")));
        assert_eq!(resolve("postgres"), id(999, 998, &[998, 101], Some("/var/lib/postgresql")));
        assert_eq!(resolve("999"), id(999, 998, &[998, 101], Some("/var/lib/postgresql")));
        assert_eq!(resolve("1234"), id(1234, 0, &[0], None));
        assert_eq!(resolve("1234:5678"), id(1234, 5678, &[5678], None));
        assert_eq!(resolve("postgres:staff"), id(999, 50, &[50], Some("/var/lib/postgresql")));
        assert_eq!(resolve(":staff"), id(0, 50, &[50], Some("/root")));
        assert_eq!(resolve("nohome").home, None);
        assert_eq!(resolve("12").uid, 500, "a name of digits is a name first");
    }

    #[test]
    fn additional_groups_may_be_names_and_numbers() {
        let groups = ["staff".to_owned(), "4000".to_owned(), "998".to_owned()];
        assert_eq!(image().resolve("postgres", &groups).unwrap().groups, [998, 101, 50, 4000]);
        assert!(image().resolve("", &["nosuch".to_owned()]).is_err());
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = image().resolve("nosuch", &[]).unwrap_err().to_string();
        assert_eq!(error, "unable to find user nosuch: no matching entries in passwd file");
        let error = image().resolve("root:nosuch", &[]).unwrap_err().to_string();
        assert_eq!(error, "unable to find group nosuch: no matching entries in group file");
        assert!(image().resolve("4294967296", &[]).is_err());
        assert!(image().resolve("2147483648", &[]).is_err());
        assert!(Databases::default().resolve("root", &[]).is_err());
        assert_eq!(Databases::default().resolve("", &[]).unwrap(), id(0, 0, &[0], None));
    }

    #[test]
    fn numbers_are_taken_as_they_are() {
        assert_eq!(
            image().by_number(999, 1, &[2, 1, 2]).unwrap(),
            id(999, 1, &[1, 2], Some("/var/lib/postgresql"))
        );
        assert_eq!(image().user_name(999), Some("postgres"));
    }
}
