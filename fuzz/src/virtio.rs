//! Devices behind their register windows, as a driver that means harm sees them: registers, rings and buffers in every order.
//!
//! An input is a list of steps ([`Step`]). One of them sets the device up as a good driver does, so that what follows gets past the door. After
//! each notification the event loop turns, and what is on the host's side of the device is given its turn, too.

mod host;
mod steps;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arbitrary::Unstructured;
use event_manager::{EventManager, MutEventSubscriber, SubscriberId, SubscriberOps};
use hyper_vmm_devices::device::{EventLoop, GuestMem, Handler, HandlerId, VirtioDevice};
use hyper_vmm_devices::transport::MmioTransport;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::host::Host;
use self::steps::Step;

pub(crate) use self::host::{blk, memory, net, small, vsock};

/// Most steps of one input: more find nothing that these do not.
const MOST_STEPS: usize = 200;
/// Guest memory: two regions with a hole between them.
const REGIONS: [(u64, usize); 2] = [(0, 256 << 10), (1 << 20, 64 << 10)];
/// Turns of the event loop after a notification.
const TURNS: usize = 3;
/// How long a device's thread is given for what was offered. One that hangs is found by the reset, which waits for it.
const SETTLE: Duration = Duration::from_millis(3);

/// The event loop: turned by hand, so that an input does the same each time.
struct Loop {
    manager: Mutex<EventManager<Handler>>,
    known: Mutex<HashMap<HandlerId, SubscriberId>>,
}

impl fmt::Debug for Loop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loop").finish_non_exhaustive()
    }
}

impl EventLoop for Loop {
    fn add(&self, handler: Handler) -> io::Result<HandlerId> {
        let mut manager = self.manager.lock().unwrap_or_else(PoisonError::into_inner);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let id = known.keys().max().map_or(0, |last| last + 1);
        known.insert(id, manager.add_subscriber(handler));
        Ok(id)
    }

    fn remove(&self, id: HandlerId) -> io::Result<()> {
        let mut manager = self.manager.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        let known = known.ok_or(io::ErrorKind::NotFound)?;
        let removed: Result<Box<dyn MutEventSubscriber + Send>, _> = manager.remove_subscriber(known);
        removed.map(drop).map_err(io::Error::other)
    }
}

impl Loop {
    fn new() -> Option<Arc<Self>> {
        let manager = EventManager::new().ok()?;
        Some(Arc::new(Self { manager: Mutex::new(manager), known: Mutex::default() }))
    }

    fn turn(&self) {
        for _ in 0..TURNS {
            let mut manager = self.manager.lock().unwrap_or_else(PoisonError::into_inner);
            if !manager.run_with_timeout(0).is_ok_and(|events| events > 0) {
                return;
            }
        }
    }
}

fn guest_memory() -> Option<GuestMem> {
    let regions = REGIONS.map(|(start, len)| (GuestAddress(start), len));
    GuestMemoryMmap::from_ranges(&regions).ok().map(Arc::new)
}

/// A device in its window, and all around it.
struct Window {
    transport: MmioTransport,
    mem: GuestMem,
    turns: Arc<Loop>,
}

impl Window {
    fn new(device: Box<dyn VirtioDevice>, mem: &GuestMem) -> Option<Self> {
        let turns = Loop::new()?;
        let irq = EventFd::new(EFD_NONBLOCK).ok()?;
        let transport =
            MmioTransport::new(device, Arc::clone(mem), irq, Arc::clone(&turns) as Arc<dyn EventLoop>);
        Some(Self { transport: transport.ok()?, mem: Arc::clone(mem), turns })
    }
}

/// Drives a device through the steps of an input. What it needs of the host may be lacking, which is nobody's fault: then nothing is tried.
fn drive<H: Host>(data: &[u8]) {
    let mut data = Unstructured::new(data);
    let Some(mem) = guest_memory() else { return };
    let Some((mut host, device)) = H::make(&mut data, &mem) else { return };
    let Some(mut window) = Window::new(device, &mem) else { return };
    for _ in 0..MOST_STEPS {
        if data.is_empty() {
            break;
        }
        let Ok(step) = Step::take(&mut data) else { break };
        match step {
            Step::Host(choice) => host.act(choice, &mut data),
            // The machine is saved, and goes on in another process: with a device that is made anew.
            Step::MoveOn => {
                window.transport.pause();
                let saved = window.transport.save();
                window.transport.resume();
                let Ok(saved) = saved else { continue };
                let Some(device) = host.again(&mem) else { continue };
                // The old one lets go of the rings first.
                drop(window);
                let Some(mut next) = Window::new(device, &mem) else { return };
                assert!(next.transport.restore(&saved).is_ok(), "what was saved is not taken back");
                next.transport.resume();
                window = next;
            }
            Step::Restore(state) => {
                let Some(device) = host.again(&mem) else { continue };
                let Some(mut next) = Window::new(device, &mem) else { return };
                drop(window);
                if next.transport.restore(state).is_err() {
                    let Some(device) = host.again(&mem) else { return };
                    let Some(fresh) = Window::new(device, &mem) else { return };
                    next = fresh;
                }
                next.transport.resume();
                window = next;
            }
            step => step.perform(&mut window),
        }
        window.turns.turn();
        if H::THREAD {
            window.settle();
        }
        host.check();
    }
    // A reset ends whatever is under way.
    Step::Reset.perform(&mut window);
    window.turns.turn();
    drop(window);
    host.end();
}
