//! Watches for the other process's end; the queues themselves never come here.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use crate::device::Interrupt;
use crate::note::Notes;

/// Reports the end of the other process to the guest.
#[derive(Debug)]
pub(super) struct FsHandler {
    socket: UnixStream,
    interrupt: Arc<dyn Interrupt>,
    notes: Notes,
}

impl FsHandler {
    pub(super) fn new(socket: UnixStream, interrupt: Arc<dyn Interrupt>) -> Self {
        Self { socket, interrupt, notes: Notes::new("fs") }
    }
}

impl MutEventSubscriber for FsHandler {
    fn init(&mut self, ops: &mut EventOps) {
        // No input is expected outside of an exchange; hang-up is reported unasked.
        if let Err(error) = ops.add(Events::new(&self.socket, EventSet::READ_HANG_UP)) {
            self.notes.write(format_args!("cannot watch the file server: {error}"));
            self.interrupt.needs_reset();
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.notes.write("the file server has ended; its shares are lost");
        // It would be reported without end.
        let _ = ops.remove(events);
        self.interrupt.needs_reset();
    }
}
