//! Reading a configuration space that is kept as bytes.

/// Copies from `space` at `offset`; what lies outside reads as zero.
pub(crate) fn read(space: &[u8], offset: u64, data: &mut [u8]) {
    let tail = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or_default();
    for (i, byte) in data.iter_mut().enumerate() {
        *byte = tail.get(i).copied().unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn outside_reads_as_zero() {
        let space = [1, 2, 3];
        let mut data = [9; 4];
        super::read(&space, 1, &mut data);
        assert_eq!(data, [2, 3, 0, 0]);
        super::read(&space, u64::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
