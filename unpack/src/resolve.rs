//! From an entry's name to the directory it belongs in, the way a process confined to the image would walk.
//!
//! - Leading slashes and `.` mean nothing; every name is relative to the root.
//! - `..` in an entry's name is taken out of the text first, as Docker and containerd do (`a/../b` is `b`, even
//!   when `a` is a link); a name that would climb above the root is refused.
//! - Symbolic links in parents are followed. Absolute targets start at the root, and `..` in a target stops there,
//!   as after `chroot`. So a name never leads out of the tree.
//! - The last component is not followed: an entry replaces a link, it does not write through it.

use crate::error::{EntryError, Fault};
use crate::limits::{Budget, Limits};
use crate::tree::{Attributes, InodeId, Kind, Symlink, Tree};

/// Longest name in a directory (`EROFS_NAME_LEN`, also `NAME_MAX`).
const MAX_COMPONENT: usize = 255;

/// The components of an entry's name without `.` and `..`; none for the root.
pub(crate) fn clean(path: &[u8]) -> Result<Vec<&[u8]>, EntryError> {
    let mut components = Vec::new();
    for component in path.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => {
                components.pop().ok_or(EntryError::Escapes)?;
            }
            _ => {
                check_component(component)?;
                components.push(component);
            }
        }
    }
    Ok(components)
}

/// Fails for a name that no directory can hold.
pub(crate) fn check_component(component: &[u8]) -> Result<(), EntryError> {
    if component.contains(&0) {
        return Err(EntryError::NulInName);
    }
    if component.len() > MAX_COMPONENT { Err(EntryError::ComponentTooLong) } else { Ok(()) }
}

/// What to do about parents that are not there.
pub(crate) enum Missing<'a> {
    /// Report that there is no such directory.
    Report,
    /// Make them, counting each against these budgets.
    Create { entries: &'a mut Budget, memory: &'a mut Budget },
}

/// Finds the directory that `components` name, following links. `None` only with [`Missing::Report`].
pub(crate) fn directory(
    tree: &mut Tree,
    components: &[&[u8]],
    limits: &Limits,
    missing: &mut Missing<'_>,
) -> Result<Option<InodeId>, Fault> {
    let mut at = InodeId::ROOT;
    for (index, component) in components.iter().enumerate() {
        let next = tree.lookup(at, component).map(|name| name.inode);
        match next {
            Some(next) if tree.directory(next).is_some() => at = next,
            _ => {
                let rest = components.get(index..).unwrap_or_default();
                return Walk { tree, limits, links: 0, missing }.finish(at, rest);
            }
        }
    }
    Ok(Some(at))
}

/// The slow part of a walk, from the first component that is not simply a directory.
struct Walk<'w, 'a> {
    tree: &'w mut Tree,
    limits: &'w Limits,
    /// Links followed so far.
    links: u32,
    missing: &'w mut Missing<'a>,
}

impl Walk<'_, '_> {
    fn finish(mut self, start: InodeId, components: &[&[u8]]) -> Result<Option<InodeId>, Fault> {
        let mut at = start;
        // Components still to walk, the next one last.
        let mut pending: Vec<Vec<u8>> = components.iter().rev().map(|component| component.to_vec()).collect();
        while let Some(component) = pending.pop() {
            match component.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    at = self.tree.directory(at).map_or(InodeId::ROOT, |directory| directory.parent);
                    continue;
                }
                _ => check_component(&component)?,
            }
            let found = self.tree.lookup(at, &component);
            let inode = found.and_then(|name| self.tree.get(name.inode));
            match (found, inode.map(|inode| &inode.kind)) {
                (Some(name), Some(Kind::Directory(_))) => at = name.inode,
                (_, Some(Kind::Symlink(Symlink { target, .. }))) => {
                    self.links += 1;
                    if self.links > self.limits.max_link_depth {
                        return Err(EntryError::TooManyLinks.into());
                    }
                    if target.starts_with(b"/") {
                        at = InodeId::ROOT;
                    }
                    pending.extend(target.rsplit(|byte| *byte == b'/').map(<[u8]>::to_vec));
                }
                (found, _) => {
                    // A file of an older layer gives way to a directory that this layer implies: its whiteout may
                    // come later in the archive. Behind a link, or in the same layer, it is an error.
                    let gives_way =
                        found.is_none_or(|name| self.links == 0 && name.layer < self.tree.layer());
                    match self.missing {
                        Missing::Report => return Ok(None),
                        Missing::Create { .. } if !gives_way => {
                            return Err(EntryError::ParentNotDirectory.into());
                        }
                        Missing::Create { entries, memory } => {
                            entries.take(1)?;
                            memory.take(component.len() as u64)?;
                            let new = self.tree.add_directory(Attributes::IMPLIED, at);
                            self.tree.link(at, &component, new);
                            at = new;
                        }
                    }
                }
            }
        }
        Ok(Some(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(path: &str) -> Result<String, EntryError> {
        Ok(String::from_utf8(clean(path.as_bytes())?.join(&b'/')).unwrap())
    }

    #[test]
    fn names_are_cleaned_as_text() {
        assert_eq!(text("./usr//bin/./sh").unwrap(), "usr/bin/sh");
        assert_eq!(text("/etc/passwd").unwrap(), "etc/passwd");
        assert_eq!(text("a/../b/c/..").unwrap(), "b");
        assert_eq!(text("./").unwrap(), "");
        assert!(matches!(text("../etc"), Err(EntryError::Escapes)));
        assert!(matches!(text("a/../../b"), Err(EntryError::Escapes)));
        assert!(matches!(text("/.."), Err(EntryError::Escapes)));
        assert!(matches!(text(&"x".repeat(256)), Err(EntryError::ComponentTooLong)));
        assert!(matches!(text("a\0b"), Err(EntryError::NulInName)));
    }

    struct Case {
        tree: Tree,
        entries: Budget,
        memory: Budget,
    }

    impl Case {
        fn new(links: &[(&str, &str)]) -> Self {
            let budget = || Budget::new("things", 1000);
            let mut case = Self { tree: Tree::new(), entries: budget(), memory: budget() };
            for (path, target) in links {
                let mut components = clean(path.as_bytes()).unwrap();
                let name = components.pop().unwrap();
                let parent = case.resolve(&components.join(&b'/')).unwrap();
                let link = case.tree.add(
                    Attributes::IMPLIED,
                    Kind::Symlink(Symlink { target: target.as_bytes().into(), block: None }),
                );
                case.tree.link(parent, name, link);
            }
            case
        }

        fn resolve(&mut self, path: &[u8]) -> Result<InodeId, Fault> {
            let mut missing = Missing::Create { entries: &mut self.entries, memory: &mut self.memory };
            let limits = Limits::default();
            Ok(directory(&mut self.tree, &clean(path)?, &limits, &mut missing)?.unwrap())
        }

        /// The path from the root to what `path` resolves to.
        fn real(&mut self, path: &str) -> Result<String, Fault> {
            let mut at = self.resolve(path.as_bytes())?;
            let mut names = Vec::new();
            while at != InodeId::ROOT {
                let parent = self.tree.directory(at).unwrap().parent;
                let names_there = &self.tree.directory(parent).unwrap().names;
                let (name, _) = names_there.iter().find(|(_, name)| name.inode == at).unwrap();
                names.insert(0, String::from_utf8_lossy(name).into_owned());
                at = parent;
            }
            Ok(names.join("/"))
        }
    }

    #[test]
    fn links_are_followed_inside_the_tree_only() {
        let mut case = Case::new(&[
            ("lib", "usr/lib"),
            ("usr/lib/up", "../../../../../../etc"),
            ("abs", "/var/../tmp"),
            ("chain", "lib/up"),
            ("here", "."),
        ]);
        assert_eq!(case.real("lib/x").unwrap(), "usr/lib/x");
        assert_eq!(case.real("lib/up/cron").unwrap(), "etc/cron");
        assert_eq!(case.real("abs").unwrap(), "tmp");
        assert_eq!(case.real("chain/d").unwrap(), "etc/d");
        assert_eq!(case.real("here/here/here").unwrap(), "");
    }

    #[test]
    fn loops_end() {
        let mut case = Case::new(&[("a", "b"), ("b", "a"), ("self", "self/x")]);
        assert!(matches!(case.real("a/x"), Err(Fault::Entry(EntryError::TooManyLinks))));
        assert!(matches!(case.real("self"), Err(Fault::Entry(EntryError::TooManyLinks))));
    }

    #[test]
    fn implied_directories_count() {
        let mut case = Case::new(&[]);
        case.real("a/b/c").unwrap();
        assert_eq!(case.entries.used(), 3);
        assert_eq!(case.memory.used(), 3);
        case.real("a/b/c").unwrap();
        assert_eq!(case.entries.used(), 3);
    }
}
