//! The configuration space (virtio 1.3, 5.11.4). Requests are FUSE messages that only the other process reads.

/// Longest tag, bytes.
pub(super) const MAX_TAG_BYTES: usize = 36;

/// Tag, padded with zeroes, and the number of request queues.
pub(super) fn config_space(tag: &str, request_queues: u32) -> Vec<u8> {
    let mut space = tag.as_bytes().to_vec();
    space.resize(MAX_TAG_BYTES, 0);
    space.extend(request_queues.to_le_bytes());
    space
}

#[cfg(test)]
mod tests {
    #[test]
    fn tag_then_queues() {
        let space = super::config_space("share", 1);
        assert_eq!((space.len(), &space[..6], &space[36..]), (40, &b"share\0"[..], &[1, 0, 0, 0][..]));
    }
}
