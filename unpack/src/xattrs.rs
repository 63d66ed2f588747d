//! Extended attributes as EROFS stores them: encoded once per distinct set, shared by all inodes that have it.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use crate::error::Fault;
use crate::limits::{self, Budget, Limits};

/// Index of a set of attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct XattrId(u32);

impl XattrId {
    /// No attributes at all.
    pub(crate) const NONE: Self = Self(0);
}

/// Bytes in front of a set: a filter, the number of shared attributes (none here), and room.
pub(crate) const BODY_HEADER: usize = 12;
/// Each attribute starts at a multiple of this.
const ALIGN: usize = 4;
/// Longest name, prefix included (`XATTR_NAME_MAX`).
const MAX_NAME: usize = 255;

/// Prefixes that EROFS stores as a number (`EROFS_XATTR_INDEX_*`); the rest of the name must be empty where false.
const PREFIXES: [(&[u8], u8, bool); 5] = [
    (b"user.", 1, true),
    (b"system.posix_acl_access", 2, false),
    (b"system.posix_acl_default", 3, false),
    (b"trusted.", 4, true),
    (b"security.", 6, true),
];
/// What overlayfs keeps in attributes (whiteouts, redirects) would be obeyed when the image is mounted as its lower
/// layer. An image has no business to speak to it.
const OVERLAYFS: &[u8] = b"trusted.overlay.";

/// All distinct sets.
#[derive(Debug)]
pub(crate) struct XattrSets {
    bodies: Vec<Rc<[u8]>>,
    ids: HashMap<Rc<[u8]>, XattrId>,
    /// Attributes that could not be kept.
    dropped: u64,
}

impl XattrSets {
    pub(crate) fn new() -> Self {
        Self { bodies: vec![Rc::from([].as_slice())], ids: HashMap::new(), dropped: 0 }
    }

    /// Attributes met that EROFS or the image's purpose has no place for.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped
    }

    /// The encoded set, empty or a multiple of 4 bytes long.
    pub(crate) fn body(&self, id: XattrId) -> &[u8] {
        self.bodies.get(id.0 as usize).map_or(&[], |body| body)
    }

    /// Encodes `xattrs` (full names, values); later ones win over earlier ones of the same name.
    pub(crate) fn intern(
        &mut self,
        xattrs: &[(Vec<u8>, Vec<u8>)],
        limits: &Limits,
        memory: &mut Budget,
    ) -> Result<XattrId, Fault> {
        let mut sorted = BTreeMap::new();
        for (name, value) in xattrs {
            match split(name) {
                Some(key) => {
                    sorted.insert(key, value.as_slice());
                }
                None => self.dropped += 1,
            }
        }
        if sorted.is_empty() {
            return Ok(XattrId::NONE);
        }
        let body = encode(&sorted);
        // Also bounds each value to the 16 bits that its length has.
        let max = limits.max_xattr_bytes.min(usize::from(u16::MAX)) as u64;
        limits::check("bytes of extended attributes of a file", body.len() as u64, max)?;
        if let Some(id) = self.ids.get(body.as_slice()) {
            return Ok(*id);
        }
        memory.take(body.len() as u64)?;
        let id = XattrId(u32::try_from(self.bodies.len()).unwrap_or(u32::MAX));
        let body: Rc<[u8]> = body.into();
        self.bodies.push(Rc::clone(&body));
        self.ids.insert(body, id);
        Ok(id)
    }
}

/// The number of a name's prefix and the rest of the name; `None` if it cannot be kept.
fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    if name.len() > MAX_NAME || name.contains(&0) || name.starts_with(OVERLAYFS) {
        return None;
    }
    PREFIXES.iter().find_map(|(prefix, index, has_rest)| {
        let rest = name.strip_prefix(*prefix)?;
        (rest.is_empty() != *has_rest).then_some((*index, rest))
    })
}

fn encode(sorted: &BTreeMap<(u8, &[u8]), &[u8]>) -> Vec<u8> {
    let mut body = vec![0; BODY_HEADER];
    for ((index, name), value) in sorted {
        body.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
        body.push(*index);
        body.extend_from_slice(&u16::try_from(value.len()).unwrap_or(u16::MAX).to_le_bytes());
        body.extend_from_slice(name);
        body.extend_from_slice(value);
        body.resize(body.len().next_multiple_of(ALIGN), 0);
    }
    body
}

/// The field of an inode that says how long its set is.
pub(crate) fn icount(body: &[u8]) -> u16 {
    match body.len().checked_sub(BODY_HEADER) {
        Some(rest) => u16::try_from(rest / ALIGN + 1).unwrap_or(u16::MAX),
        None => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(name: &str, value: &[u8]) -> (Vec<u8>, Vec<u8>) {
        (name.as_bytes().to_vec(), value.to_vec())
    }

    fn intern(sets: &mut XattrSets, xattrs: &[(Vec<u8>, Vec<u8>)]) -> Result<XattrId, Fault> {
        sets.intern(xattrs, &Limits::default(), &mut Budget::new("bytes", 1 << 30))
    }

    #[test]
    fn equal_sets_are_shared_whatever_their_order() {
        let mut sets = XattrSets::new();
        let (a, b) = (pair("user.a", b"1"), pair("security.capability", b"xyz"));
        let one = intern(&mut sets, &[a.clone(), b.clone()]).unwrap();
        assert_eq!(intern(&mut sets, &[b, a]).unwrap(), one);
        let body = sets.body(one);
        let expected =
            [[0; 12].as_slice(), &[1, 1, 1, 0, b'a', b'1', 0, 0], &[10, 6, 3, 0], b"capabilityxyz", &[0; 3]];
        assert_eq!(body, expected.concat());
        assert_eq!(icount(body), 8);
        let (old, new) = (pair("user.a", b"1"), pair("user.a", b"2"));
        let last = intern(&mut sets, std::slice::from_ref(&new)).unwrap();
        assert_eq!(intern(&mut sets, &[old, new]).unwrap(), last);
        assert_eq!(icount(sets.body(XattrId::NONE)), 0);
    }

    #[test]
    fn what_has_no_place_is_dropped() {
        let mut sets = XattrSets::new();
        let names =
            ["user.", "trusted.overlay.opaque", "system.nfs4_acl", "system.posix_acl_access2", "plain", ""];
        let xattrs: Vec<_> = names.iter().map(|name| pair(name, b"y")).collect();
        assert_eq!(intern(&mut sets, &xattrs).unwrap(), XattrId::NONE);
        assert_eq!(sets.dropped(), names.len() as u64);
        assert_ne!(intern(&mut sets, &[pair("system.posix_acl_access", b"")]).unwrap(), XattrId::NONE);
    }

    #[test]
    fn a_set_is_bounded() {
        let mut sets = XattrSets::new();
        assert!(intern(&mut sets, &[pair("user.big", &[0; 65_000])]).is_ok());
        assert!(matches!(intern(&mut sets, &[pair("user.big", &[0; 65_536])]), Err(Fault::Limit(_))));
    }
}
