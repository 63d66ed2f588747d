//! Frames of the guest: the header in front of them (virtio 1.3, 5.1.6) and what they may claim.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
};

/// Length of the header, bytes.
pub(super) const HEADER_BYTES: usize = 12;
/// Largest frame with its header: 65550 is the largest GSO frame with an Ethernet header (5.1.6.3.1).
pub(super) const MAX_FRAME_BYTES: usize = 65550 + HEADER_BYTES;
/// Bytes of an Ethernet header: two addresses and a type.
const ETHERNET_BYTES: usize = 14;
/// Where `num_buffers` is in the header.
pub(super) const NUM_BUFFERS_AT: usize = 10;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;

/// Why a frame is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Too short, or a header that contradicts itself, the frame or the negotiated features.
    Malformed,
    /// The source address is not the one that the guest was given.
    Spoofed,
}

/// The fields of a header that are looked at.
struct Header {
    flags: u8,
    gso_type: u8,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

impl Header {
    fn parse(frame: &[u8]) -> Option<Self> {
        let [flags, gso_type, _, _, s0, s1, c0, c1, o0, o1, _, _] = *frame.first_chunk::<HEADER_BYTES>()?;
        Some(Self {
            flags,
            gso_type,
            gso_size: u16::from_le_bytes([s0, s1]),
            csum_start: u16::from_le_bytes([c0, c1]),
            csum_offset: u16::from_le_bytes([o0, o1]),
        })
    }
}

fn accepted(features: u64, bit: u32) -> bool {
    features & 1 << bit != 0
}

/// Checks a frame of the guest, header first, against the negotiated features and its address.
pub(super) fn check(frame: &[u8], features: u64, mac: [u8; 6]) -> Result<(), Refusal> {
    let header = Header::parse(frame).ok_or(Refusal::Malformed)?;
    let ethernet = frame.get(HEADER_BYTES..).unwrap_or_default();
    if ethernet.len() < ETHERNET_BYTES {
        return Err(Refusal::Malformed);
    }
    if ethernet.get(6..12) != Some(&mac[..]) {
        return Err(Refusal::Spoofed);
    }
    let partial = header.flags & NEEDS_CSUM != 0;
    let checksum_end = usize::from(header.csum_start) + usize::from(header.csum_offset) + 2;
    let checksum = match partial {
        true => accepted(features, VIRTIO_NET_F_CSUM) && checksum_end <= ethernet.len(),
        false => true,
    };
    let segments = match header.gso_type {
        GSO_NONE => true,
        GSO_TCPV4 => accepted(features, VIRTIO_NET_F_HOST_TSO4) && partial && header.gso_size > 0,
        GSO_TCPV6 => accepted(features, VIRTIO_NET_F_HOST_TSO6) && partial && header.gso_size > 0,
        _ => false,
    };
    if header.flags & !NEEDS_CSUM == 0 && checksum && segments { Ok(()) } else { Err(Refusal::Malformed) }
}

/// Whether the guest can take a frame of the TAP, header first: only what it has negotiated.
pub(super) fn acceptable(frame: &[u8], features: u64) -> bool {
    let Some(header) = Header::parse(frame) else { return false };
    let checksum = header.flags & NEEDS_CSUM == 0 || accepted(features, VIRTIO_NET_F_GUEST_CSUM);
    let segments = match header.gso_type {
        GSO_NONE => true,
        GSO_TCPV4 => accepted(features, VIRTIO_NET_F_GUEST_TSO4),
        GSO_TCPV6 => accepted(features, VIRTIO_NET_F_GUEST_TSO6),
        _ => false,
    };
    checksum && segments
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    /// A frame of 60 bytes behind a header of flags, GSO type, GSO size, checksum start and offset.
    fn frame(flags: u8, gso: u8, size: u16, start: u16, offset: u16) -> Vec<u8> {
        let mut frame = vec![flags, gso, 0, 0];
        frame.extend([size, start, offset, 0].iter().flat_map(|field| field.to_le_bytes()));
        frame.extend([0xff; 6]);
        frame.extend(MAC);
        frame.resize(HEADER_BYTES + 60, 0);
        frame
    }

    #[test]
    fn honest_frames_pass() {
        assert_eq!(check(&frame(0, 0, 0, 0, 0), 0, MAC), Ok(()));
        assert_eq!(check(&frame(1, 0, 0, 34, 16), u64::MAX, MAC), Ok(()));
        assert_eq!(check(&frame(1, 1, 1448, 34, 16), u64::MAX, MAC), Ok(()));
        assert_eq!(check(&frame(1, 4, 1428, 42, 16), u64::MAX, MAC), Ok(()));
    }

    #[test]
    fn contradictions_are_refused() {
        for (bad, why) in [
            (frame(1, 0, 0, 50, 9), "checksum outside the frame"),
            (frame(1, 0, 0, u16::MAX, u16::MAX), "checksum far outside"),
            (frame(0, 1, 1448, 0, 0), "segments without checksum"),
            (frame(1, 1, 0, 34, 16), "segments of nothing"),
            (frame(1, 3, 100, 34, 16), "UDP segments"),
            (frame(1, 0x81, 100, 34, 16), "ECN, which is not offered"),
            (frame(2, 0, 0, 0, 0), "a flag of the other direction"),
            (frame(0, 0, 0, 0, 0)[..HEADER_BYTES + 13].to_vec(), "no Ethernet header"),
            (vec![0; HEADER_BYTES - 1], "no header"),
            (vec![], "nothing"),
        ] {
            assert_eq!(check(&bad, u64::MAX, MAC), Err(Refusal::Malformed), "{why}");
        }
        assert_eq!(check(&frame(1, 0, 0, 34, 16), 0, MAC), Err(Refusal::Malformed));
        let tso = !(1 << VIRTIO_NET_F_HOST_TSO4);
        assert_eq!(check(&frame(1, 1, 1448, 34, 16), tso, MAC), Err(Refusal::Malformed));
    }

    #[test]
    fn other_addresses_are_refused() {
        assert_eq!(check(&frame(0, 0, 0, 0, 0), 0, [2, 0, 0, 0, 0, 2]), Err(Refusal::Spoofed));
    }

    #[test]
    fn the_guest_gets_what_it_negotiated() {
        assert!(acceptable(&frame(0, 0, 0, 0, 0), 0));
        assert!(acceptable(&frame(1, 1, 1448, 34, 16), u64::MAX));
        assert!(!acceptable(&frame(1, 0, 0, 34, 16), 0));
        assert!(!acceptable(&frame(1, 4, 1428, 34, 16), !(1 << VIRTIO_NET_F_GUEST_TSO6)));
        assert!(!acceptable(&[], u64::MAX));
    }
}
