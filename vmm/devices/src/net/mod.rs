//! virtio-net (virtio 1.3, 5.1) on a TAP, with checksum and segmentation offload in both directions and merged receive buffers.

mod handler;
mod request;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::OFlags;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
};

use self::handler::{Counters, NetHandler};
use crate::device::{ActivateContext, ActivateError, Handler, VirtioDevice};
use crate::state::StateError;

/// Largest size of the receive and the transmit queue.
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// Least MTU of IPv4 (RFC 791), bytes; a driver refuses less.
const MIN_MTU: u16 = 68;

/// Why an interface cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The address is for groups or all zero.
    #[error("hardware address {0:02x?} is not one that an interface can have")]
    Mac([u8; 6]),
    /// The MTU is too small.
    #[error("MTU of {0} bytes: give {MIN_MTU} or more")]
    Mtu(u16),
    /// The descriptor cannot be used.
    #[error("cannot make the TAP descriptor nonblocking")]
    Tap(#[source] io::Error),
}

/// The device.
#[derive(Debug)]
pub struct Net {
    tap: OwnedFd,
    mac: [u8; 6],
    config: Vec<u8>,
    counters: Arc<Counters>,
}

impl Net {
    /// An interface on `tap`, which whoever opened it has set up: `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, a header of 12 bytes
    /// (`TUNSETVNETHDRSZ`) and the offloads `TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6` (`TUNSETOFFLOAD`). Frames of the guest
    /// from another address than `mac` are dropped. `mtu` in bytes.
    ///
    /// # Errors
    /// When the address or the MTU cannot be, or the descriptor cannot be made nonblocking.
    pub fn new(tap: OwnedFd, mac: [u8; 6], mtu: u16) -> Result<Self, NetError> {
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(NetError::Mac(mac));
        }
        if mtu < MIN_MTU {
            return Err(NetError::Mtu(mtu));
        }
        rustix::fs::fcntl_getfl(&tap)
            .and_then(|flags| rustix::fs::fcntl_setfl(&tap, flags | OFlags::NONBLOCK))
            .map_err(|error| NetError::Tap(error.into()))?;
        let mut config = mac.to_vec();
        config.extend([0; 4]); // status and max_virtqueue_pairs: not offered
        config.extend(mtu.to_le_bytes());
        Ok(Self { tap, mac, config, counters: Arc::default() })
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &'static str {
        "net"
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_MRG_RXBUF,
        ]
        .into_iter()
        .fold(0, |features, bit| features | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::config::read(&self.config, offset, data);
    }

    fn activate(&mut self, context: ActivateContext) -> Result<Vec<Handler>, ActivateError> {
        let prepare = |source| ActivateError::Io { what: "the TAP descriptor", source };
        let tap = self.tap.try_clone().map_err(prepare)?;
        Ok(vec![Box::new(NetHandler::new(tap, self.mac, context, Arc::clone(&self.counters))?)])
    }

    /// The handler is gone, and with it all that it held.
    fn reset(&mut self) {}

    /// Nothing: a restored interface is given its TAP, address and MTU as a new one is. A frame that waits for buffers is lost.
    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(Vec::new())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let c = &self.counters;
        [
            ("rx_frames", &c.rx_frames),
            ("rx_bytes", &c.rx_bytes),
            ("rx_dropped", &c.rx_dropped),
            ("tx_frames", &c.tx_frames),
            ("tx_bytes", &c.tx_bytes),
            ("tx_dropped", &c.tx_dropped),
            ("tx_malformed", &c.tx_malformed),
            ("tx_spoofed", &c.tx_spoofed),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
        .to_vec()
    }
}
