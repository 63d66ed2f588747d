//! What devices save: numbers in little-endian order, and lists that begin with their length. A reader never takes more than there is.

use std::fmt;

/// Why saved state is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// There is less than there should be, or more.
    #[error("saved state is cut short or has something behind its end")]
    Length,
    /// A value that no device has.
    #[error("saved state has {what} that cannot be")]
    Value {
        /// What.
        what: &'static str,
    },
    /// A device that cannot be saved, or not as it is now; why.
    #[error("{device}: {why}")]
    Unsaved {
        /// Its short name.
        device: &'static str,
        /// Why not.
        why: String,
    },
}

/// Collects state.
#[derive(Debug, Default)]
pub struct Writer(Vec<u8>);

impl Writer {
    /// A number of 8 bits.
    pub fn u8(&mut self, value: u8) {
        self.0.push(value);
    }
    /// A number of 16 bits.
    pub fn u16(&mut self, value: u16) {
        self.0.extend(value.to_le_bytes());
    }
    /// A number of 32 bits.
    pub fn u32(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }
    /// A number of 64 bits.
    pub fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }
    /// Bytes, with their number before them.
    pub fn bytes(&mut self, bytes: &[u8]) {
        // What is saved is far below 4 GiB; a reader would refuse a list that is cut.
        self.u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        self.0.extend_from_slice(bytes);
    }
    /// What was collected.
    #[must_use]
    pub fn done(self) -> Vec<u8> {
        self.0
    }
}

/// Reads what a [`Writer`] collected.
pub struct Reader<'a>(&'a [u8]);

impl fmt::Debug for Reader<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reader").field(&self.0.len()).finish()
    }
}

impl<'a> Reader<'a> {
    /// Begins at the front.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StateError> {
        let (first, rest) = self.0.split_first_chunk().ok_or(StateError::Length)?;
        self.0 = rest;
        Ok(*first)
    }

    /// A number of 8 bits.
    ///
    /// # Errors
    /// [`StateError::Length`], as for all that follow.
    pub fn u8(&mut self) -> Result<u8, StateError> {
        self.array().map(u8::from_le_bytes)
    }
    /// A number of 16 bits.
    ///
    /// # Errors
    /// [`StateError::Length`].
    pub fn u16(&mut self) -> Result<u16, StateError> {
        self.array().map(u16::from_le_bytes)
    }
    /// A number of 32 bits.
    ///
    /// # Errors
    /// [`StateError::Length`].
    pub fn u32(&mut self) -> Result<u32, StateError> {
        self.array().map(u32::from_le_bytes)
    }
    /// A number of 64 bits.
    ///
    /// # Errors
    /// [`StateError::Length`].
    pub fn u64(&mut self) -> Result<u64, StateError> {
        self.array().map(u64::from_le_bytes)
    }
    /// Bytes, as many as the number before them says.
    ///
    /// # Errors
    /// [`StateError::Length`].
    pub fn bytes(&mut self) -> Result<&'a [u8], StateError> {
        let len = usize::try_from(self.u32()?).map_err(|_| StateError::Length)?;
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(StateError::Length)?;
        self.0 = rest;
        Ok(bytes)
    }
    /// Nothing may be left.
    ///
    /// # Errors
    /// [`StateError::Length`].
    pub fn end(self) -> Result<(), StateError> {
        if self.0.is_empty() { Ok(()) } else { Err(StateError::Length) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_beyond() {
        let mut writer = Writer::default();
        writer.u8(1);
        writer.u16(2);
        writer.u32(3);
        writer.u64(4);
        writer.bytes(b"five");
        let bytes = writer.done();
        let read = |bytes: &[u8]| -> Result<_, StateError> {
            let mut reader = Reader::new(bytes);
            let values =
                (reader.u8()?, reader.u16()?, reader.u32()?, reader.u64()?, reader.bytes()?.to_vec());
            reader.end()?;
            Ok(values)
        };
        assert_eq!(read(&bytes).unwrap(), (1, 2, 3, 4, b"five".to_vec()));
        for cut in 0..bytes.len() {
            assert_eq!(read(&bytes[..cut]).unwrap_err(), StateError::Length, "{cut}");
        }
        assert_eq!(read(&[&bytes[..], b"x"].concat()).unwrap_err(), StateError::Length);
    }

    #[test]
    fn a_length_that_is_a_lie_is_refused() {
        assert_eq!(Reader::new(&[0xff; 8]).bytes().unwrap_err(), StateError::Length);
    }
}
