//! The transport against a device that only takes notes.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::device::{ActivateError, Handler};
use crate::state::StateError;

#[derive(Debug, Default)]
struct Notes {
    activations: AtomicUsize,
    resets: AtomicUsize,
    refuse: AtomicBool,
    refuse_handlers: AtomicBool,
    running: Mutex<Vec<HandlerId>>,
    next_id: AtomicUsize,
    contexts: Mutex<Vec<ActivateContext>>,
    config: Mutex<[u8; 8]>,
}

#[derive(Debug)]
struct Fake(Arc<Notes>);

struct Idle;
impl MutEventSubscriber for Idle {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {}
    fn init(&mut self, _: &mut EventOps<'_>) {}
}

const OFFERED: u64 = F_VERSION_1 | F_EVENT_IDX | 1 << 5;

impl VirtioDevice for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }
    fn device_type(&self) -> u32 {
        42
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[8, 16]
    }
    fn features(&self) -> u64 {
        OFFERED
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.0.config.lock().unwrap();
        for (n, byte) in data.iter_mut().enumerate() {
            *byte = usize::try_from(offset)
                .ok()
                .and_then(|o| config.get(o.checked_add(n)?))
                .copied()
                .unwrap_or(0);
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut config = self.0.config.lock().unwrap();
        for (n, byte) in data.iter().enumerate() {
            if let Some(at) = usize::try_from(offset).ok().and_then(|o| config.get_mut(o.checked_add(n)?)) {
                *at = *byte;
            }
        }
    }
    fn activate(&mut self, context: ActivateContext) -> Result<Vec<Handler>, ActivateError> {
        self.0.activations.fetch_add(1, Ordering::SeqCst);
        if self.0.refuse.load(Ordering::SeqCst) {
            return Err(ActivateError::MissingQueue(0));
        }
        let mut contexts = self.0.contexts.lock().unwrap();
        contexts.clear();
        contexts.push(context);
        Ok(vec![Box::new(Idle), Box::new(Idle)])
    }
    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(self.0.config.lock().unwrap().to_vec())
    }
    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        *self.0.config.lock().unwrap() = state.try_into().map_err(|_| StateError::Length)?;
        Ok(())
    }
    fn reset(&mut self) {
        assert!(self.0.running.lock().unwrap().is_empty(), "handlers go before the device is reset");
        self.0.resets.fetch_add(1, Ordering::SeqCst);
    }
}

#[derive(Debug)]
struct FakeLoop(Arc<Notes>);

impl EventLoop for FakeLoop {
    fn add(&self, _handler: Handler) -> std::io::Result<HandlerId> {
        if self.0.refuse_handlers.load(Ordering::SeqCst) {
            return Err(std::io::ErrorKind::BrokenPipe.into());
        }
        let id = self.0.next_id.fetch_add(1, Ordering::SeqCst) as HandlerId;
        self.0.running.lock().unwrap().push(id);
        Ok(id)
    }
    fn remove(&self, id: HandlerId) -> std::io::Result<()> {
        self.0.running.lock().unwrap().retain(|known| *known != id);
        Ok(())
    }
}

const MEM_BYTES: usize = 0x10_0000;

struct Rig {
    notes: Arc<Notes>,
    irq: EventFd,
    transport: MmioTransport,
}

fn rig() -> Rig {
    rig_on(Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEM_BYTES)]).unwrap()))
}

fn rig_on(mem: GuestMem) -> Rig {
    let notes = Arc::new(Notes::default());
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    let event_loop = Arc::new(FakeLoop(Arc::clone(&notes)));
    let device = Box::new(Fake(Arc::clone(&notes)));
    let transport = MmioTransport::new(device, mem, irq.try_clone().unwrap(), event_loop).unwrap();
    Rig { notes, irq, transport }
}

impl Rig {
    fn get(&self, offset: u64) -> u32 {
        let mut data = [0xaa; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }
    fn set(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }
    fn features(&mut self, features: u64) {
        for page in [0, 1] {
            self.set(reg::DRIVER_FEATURES_SEL, page);
            self.set(reg::DRIVER_FEATURES, (features >> (32 * page)) as u32);
        }
    }
    fn reach_driver(&mut self) {
        self.set(reg::STATUS, 1);
        self.set(reg::STATUS, 3);
    }
    fn reach_features_ok(&mut self) {
        self.reach_driver();
        self.features(F_VERSION_1 | F_EVENT_IDX);
        self.set(reg::STATUS, 11);
        assert_eq!(self.get(reg::STATUS), 11);
    }
    fn queue(&mut self, index: u32, size: u32, rings: [u64; 3]) {
        self.set(reg::QUEUE_SEL, index);
        self.set(reg::QUEUE_NUM, size);
        let registers = [
            (reg::QUEUE_DESC_LOW, reg::QUEUE_DESC_HIGH),
            (reg::QUEUE_DRIVER_LOW, reg::QUEUE_DRIVER_HIGH),
            (reg::QUEUE_DEVICE_LOW, reg::QUEUE_DEVICE_HIGH),
        ];
        for ((low, high), address) in registers.into_iter().zip(rings) {
            self.set(low, address as u32);
            self.set(high, (address >> 32) as u32);
        }
        self.set(reg::QUEUE_READY, 1);
    }
    fn live(&mut self) {
        self.reach_features_ok();
        self.queue(0, 8, [0x1000, 0x2000, 0x3000]);
        self.queue(1, 16, [0x4000, 0x5000, 0x6000]);
        self.set(reg::STATUS, 15);
        assert_eq!(self.get(reg::STATUS), 15);
    }
    fn activations(&self) -> usize {
        self.notes.activations.load(Ordering::SeqCst)
    }
}

#[test]
fn the_window_says_who_it_is() {
    let mut rig = rig();
    assert_eq!(rig.get(0x00), u32::from_le_bytes(*b"virt"));
    assert_eq!(rig.get(0x04), 2);
    assert_eq!(rig.get(0x08), 42);
    for (selected, expected) in [(0, OFFERED as u32), (1, 1), (2, 0), (u32::MAX, 0)] {
        rig.set(reg::DEVICE_FEATURES_SEL, selected);
        assert_eq!(rig.get(reg::DEVICE_FEATURES), expected, "page {selected}");
    }
    for offset in (reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH).step_by(4) {
        assert_eq!(rig.get(offset), u32::MAX);
    }
    assert_eq!(rig.transport.queue_kicks().len(), 2);
}

#[test]
fn registers_are_aligned_words() {
    let mut rig = rig();
    for (offset, len) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0xfe, 4)] {
        let mut data = vec![0xaa; len];
        rig.transport.read(offset, &mut data);
        assert_eq!(data, vec![0; len], "read of {len} at {offset}");
    }
    for data in [&[1_u8][..], &[1, 0], &[1, 0, 0, 0, 0, 0, 0, 0]] {
        rig.transport.write(reg::STATUS, data);
        assert_eq!(rig.get(reg::STATUS), 0, "write of {}", data.len());
    }
}

#[test]
fn config_space_takes_any_width_once_there_is_a_driver() {
    let mut rig = rig();
    rig.transport.write(reg::CONFIG, &[1]);
    assert_eq!(*rig.notes.config.lock().unwrap(), [0; 8], "no driver yet");
    rig.reach_driver();
    rig.transport.write(reg::CONFIG + 1, &[1, 2, 3]);
    rig.transport.write(reg::CONFIG, &[9; 9]);
    let mut data = [0; 5];
    rig.transport.read(reg::CONFIG, &mut data);
    assert_eq!(data, [0, 1, 2, 3, 0]);
    let mut outside = [7; 8];
    rig.transport.read(u64::MAX, &mut outside);
    assert_eq!(outside, [0; 8]);
}

#[test]
fn a_driver_starts_the_device() {
    let mut rig = rig();
    rig.live();
    assert_eq!(rig.activations(), 1);
    let contexts = rig.notes.contexts.lock().unwrap();
    let context = &contexts[0];
    assert_eq!(context.features, F_VERSION_1 | F_EVENT_IDX);
    let sizes: Vec<_> = context.queues.iter().map(|q| (q.index, q.queue.size())).collect();
    assert_eq!(sizes, [(0, 8), (1, 16)]);
    assert_eq!(context.queues[1].queue.desc_table(), 0x4000);
    assert_eq!(rig.notes.running.lock().unwrap().len(), 2);
}

#[test]
fn features_are_refused_when_unoffered_or_old() {
    for features in [F_VERSION_1 | 1, F_VERSION_1 | 1 << 63, F_EVENT_IDX, 0] {
        let mut rig = rig();
        rig.reach_driver();
        rig.features(features);
        rig.set(reg::STATUS, 11);
        assert_eq!(rig.get(reg::STATUS), 3, "{features:#x}");
    }
}

#[test]
fn features_are_settled_once() {
    let mut rig = rig();
    rig.reach_features_ok();
    rig.features(F_VERSION_1 | 1 << 5);
    rig.queue(0, 8, [0x1000, 0x2000, 0x3000]);
    rig.set(reg::STATUS, 15);
    assert_eq!(rig.notes.contexts.lock().unwrap()[0].features, F_VERSION_1 | F_EVENT_IDX);
}

#[test]
fn queue_registers_are_closed_outside_their_phase() {
    let mut rig = rig();
    rig.queue(0, 8, [0x1000, 0x2000, 0x3000]);
    assert_eq!(rig.get(reg::QUEUE_READY), 0, "before the features are settled");
    rig.live();
    // CVE-2026-5747: these reached a running device elsewhere.
    rig.queue(0, 0, [u64::MAX, u64::MAX, u64::MAX]);
    rig.set(reg::QUEUE_READY, 0);
    assert_eq!(rig.get(reg::QUEUE_READY), 1);
    let setup = format!("{:?}", rig.transport.queues[0]);
    let fresh = rig.transport.queues[0].build(&rig.transport.mem, true).unwrap();
    assert_eq!((fresh.size(), fresh.desc_table(), fresh.used_ring()), (8, 0x1000, 0x3000), "{setup}");
    rig.set(reg::STATUS, 15);
    assert_eq!(rig.activations(), 1);
}

#[test]
fn queues_that_do_not_exist_have_no_size() {
    let mut rig = rig();
    for (selected, max) in [(0, 8), (1, 16), (2, 0), (u32::MAX, 0)] {
        rig.set(reg::QUEUE_SEL, selected);
        assert_eq!(rig.get(reg::QUEUE_NUM_MAX), max, "queue {selected}");
    }
    rig.reach_features_ok();
    rig.queue(7, 8, [0x1000, 0x2000, 0x3000]);
    assert_eq!(rig.get(reg::QUEUE_READY), 0);
}

#[test]
fn unsound_queues_stop_the_start() {
    let end = MEM_BYTES as u64;
    let good = [0x1000, 0x2000, 0x3000];
    let bad: [(u32, [u64; 3]); 12] = [
        (0, good),
        (3, good),
        (16, good),
        (1 << 16 | 8, good),
        (8, [0x1008, 0x2000, 0x3000]),
        (8, [0x1000, 0x2001, 0x3000]),
        (8, [0x1000, 0x2000, 0x3002]),
        (8, [end - 16, 0x2000, 0x3000]),
        (8, [0x1000, end, 0x3000]),
        (8, [0x1000, 0x2000, u64::MAX - 3]),
        (8, [1 << 32, 0x2000, 0x3000]),
        (8, [0x1000, 0, 0x3000]),
    ];
    for (size, rings) in bad {
        let mut rig = rig();
        rig.reach_features_ok();
        rig.queue(0, size, rings);
        rig.set(reg::STATUS, 15);
        assert_eq!(rig.get(reg::STATUS), 0x4f, "size {size} rings {rings:x?}");
        assert_eq!(rig.activations(), 0);
        assert_eq!(rig.get(reg::INTERRUPT_STATUS), interrupt::CONFIG_CHANGED);
        assert_eq!(rig.irq.read().unwrap(), 1);
        rig.set(reg::STATUS, 15);
        assert_eq!(rig.activations(), 0, "only a reset helps");
        rig.set(reg::STATUS, 0);
        assert_eq!((rig.get(reg::STATUS), rig.get(reg::INTERRUPT_STATUS)), (0, 0));
        rig.live();
    }
}

#[test]
fn a_queue_left_out_is_left_out() {
    let mut rig = rig();
    rig.reach_features_ok();
    rig.queue(1, 4, [0x4000, 0x5000, 0x6000]);
    rig.set(reg::STATUS, 15);
    let contexts = rig.notes.contexts.lock().unwrap();
    assert_eq!(contexts[0].queues.iter().map(|q| q.index).collect::<Vec<_>>(), [1]);
}

#[test]
fn a_device_that_cannot_start_says_so() {
    let mut rig = rig();
    rig.notes.refuse.store(true, Ordering::SeqCst);
    rig.reach_features_ok();
    rig.queue(0, 8, [0x1000, 0x2000, 0x3000]);
    rig.set(reg::STATUS, 15);
    assert_eq!(rig.get(reg::STATUS), 0x4f);
    rig.set(reg::STATUS, 0);
    rig.notes.refuse.store(false, Ordering::SeqCst);
    rig.notes.refuse_handlers.store(true, Ordering::SeqCst);
    rig.reach_features_ok();
    rig.set(reg::STATUS, 15);
    assert_eq!(rig.get(reg::STATUS), 0x4f);
}

#[test]
fn reset_undoes_everything() {
    let mut rig = rig();
    rig.live();
    rig.set(reg::STATUS, 0);
    assert_eq!(rig.notes.resets.load(Ordering::SeqCst), 1);
    assert!(rig.notes.running.lock().unwrap().is_empty());
    assert_eq!(rig.get(reg::STATUS), 0);
    for queue in [0, 1] {
        rig.set(reg::QUEUE_SEL, queue);
        assert_eq!(rig.get(reg::QUEUE_READY), 0);
    }
    rig.live();
    assert_eq!(rig.activations(), 2);
}

#[test]
fn interrupts_are_seen_and_acknowledged() {
    let mut rig = rig();
    rig.live();
    let interrupt = Arc::clone(&rig.notes.contexts.lock().unwrap()[0].interrupt);
    let generation = rig.get(reg::CONFIG_GENERATION);
    interrupt.used_queue();
    interrupt.config_changed();
    assert_eq!(rig.irq.read().unwrap(), 2);
    assert_eq!(rig.get(reg::INTERRUPT_STATUS), 3);
    assert_eq!(rig.get(reg::CONFIG_GENERATION), generation + 1);
    rig.set(reg::INTERRUPT_ACK, 1);
    assert_eq!(rig.get(reg::INTERRUPT_STATUS), 2);
    interrupt.needs_reset();
    assert_eq!(rig.get(reg::STATUS), 0x4f);
    rig.set(reg::STATUS, 0);
    assert_eq!((rig.get(reg::STATUS), rig.get(reg::INTERRUPT_STATUS)), (0, 0));
    assert_eq!(rig.get(reg::CONFIG_GENERATION), generation + 1, "goes on over a reset");
}

#[test]
fn a_queue_served_elsewhere_always_reports_used_buffers() {
    let mut rig = rig();
    rig.live();
    let interrupt = Arc::clone(&rig.notes.contexts.lock().unwrap()[0].interrupt);
    interrupt.share_with_other_process().unwrap().write(1).unwrap();
    assert_eq!(rig.irq.read().unwrap(), 1);
    rig.set(reg::INTERRUPT_ACK, 1);
    assert_eq!(rig.get(reg::INTERRUPT_STATUS), 1);
    rig.set(reg::STATUS, 0);
    assert_eq!(rig.get(reg::INTERRUPT_STATUS), 0);
}

#[test]
fn kicks_reach_ready_queues_of_a_live_device_only() {
    let mut rig = rig();
    rig.set(QUEUE_NOTIFY, 0);
    rig.live();
    for queue in [1, 2, u32::MAX] {
        rig.set(QUEUE_NOTIFY, queue);
    }
    assert!(rig.transport.queue_kicks()[0].read().is_err());
    assert_eq!(rig.transport.queue_kicks()[1].read().unwrap(), 1);
    rig.set(reg::STATUS, 0x80);
    assert_eq!(rig.get(reg::STATUS), 0x80);
    rig.set(QUEUE_NOTIFY, 1);
    assert!(rig.transport.queue_kicks()[1].read().is_err());
    rig.set(reg::STATUS, 0);
    rig.live();
}

/// xorshift64: the same sequence in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

#[test]
fn a_million_random_accesses_do_no_harm() {
    let mut rig = rig();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let steps = [0, 1, 3, 11, 15, 15, 11, 0x4f];
    for _ in 0..1_000_000 {
        let any = random.next() as u32;
        let offset = match random.below(8) {
            0 => random.below(WINDOW_BYTES),
            1 => reg::CONFIG + random.below(16),
            _ => random.below(0x40) * 4,
        };
        match random.below(8) {
            0 => {
                let mut data = vec![0; random.below(10) as usize];
                rig.transport.read(offset, &mut data);
            }
            1 => rig.transport.write(offset, &vec![any as u8; random.below(10) as usize]),
            2 | 3 => rig.set(reg::STATUS, steps[random.below(8) as usize]),
            4 => rig.features(F_VERSION_1 | if any & 7 == 0 { u64::from(any) } else { 0 }),
            5 => {
                let at = |r: &mut Random| r.below(0x120) * 0x1000;
                let rings = [at(&mut random), at(&mut random), at(&mut random)];
                rig.queue(any & 3, 1 << (any >> 8 & 7), rings);
            }
            6 if any & 3 == 0 => rig.notes.refuse.store(any & 4 == 0, Ordering::SeqCst),
            _ => rig.set(offset, any),
        }
        let status = rig.transport.status;
        let running = rig.notes.running.lock().unwrap().len();
        assert_eq!(running, rig.transport.handlers.len(), "{status:?}");
        assert!(
            running == 0 || !matches!(status, Status::Reset | Status::Driver | Status::FeaturesOk),
            "{status:?}"
        );
        let _ = rig.irq.read();
    }
    assert!(rig.activations() > 100, "the walk went deep: {}", rig.activations());
}

/// A live window with something in every part of its state, and that state.
fn saved() -> (Rig, Vec<u8>) {
    let mut rig = rig();
    rig.live();
    rig.transport.write(reg::CONFIG, &[1, 2, 3]);
    rig.transport.mem.write_obj(7_u16, GuestAddress(0x6002)).unwrap();
    let state = rig.transport.save().unwrap();
    (rig, state)
}

#[test]
fn a_restored_window_is_live_where_it_was() {
    let (rig, state) = saved();
    let mut again = rig_on(Arc::clone(&rig.transport.mem));
    again.transport.restore(&state).unwrap();
    assert_eq!(again.get(reg::STATUS), 15);
    assert_eq!(again.activations(), 1);
    assert_eq!(*again.notes.config.lock().unwrap(), [1, 2, 3, 0, 0, 0, 0, 0]);
    assert_eq!(again.transport.kicks[1].read().unwrap(), 1, "it looks at its queues");
    assert!(again.irq.read().is_err(), "no interrupt was pending");
    let contexts = again.notes.contexts.lock().unwrap();
    let positions: Vec<_> =
        contexts[0].queues.iter().map(|q| (q.queue.next_avail(), q.queue.next_used())).collect();
    assert_eq!(positions, [(0, 0), (7, 7)]);
    assert_eq!(contexts[0].features, F_VERSION_1 | F_EVENT_IDX);
    drop(contexts);
    assert_eq!(again.transport.save().unwrap(), state);
    // A reset forgets all of it.
    again.set(reg::STATUS, 0);
    again.live();
    let contexts = again.notes.contexts.lock().unwrap();
    assert_eq!(contexts[0].queues[1].queue.next_avail(), 0);
}

#[test]
fn a_pending_interrupt_is_raised_again() {
    let (rig, _) = saved();
    rig.transport.line.used_queue();
    let state = rig.transport.save().unwrap();
    let mut again = rig_on(Arc::clone(&rig.transport.mem));
    again.transport.restore(&state).unwrap();
    assert_eq!(again.irq.read().unwrap(), 1);
    assert_eq!(again.get(reg::INTERRUPT_STATUS), 1);
}

#[test]
fn a_window_without_a_driver_is_restored_as_such() {
    let state = rig().transport.save().unwrap();
    let mut again = rig();
    again.transport.restore(&state).unwrap();
    assert_eq!((again.get(reg::STATUS), again.activations()), (0, 0));
    again.live();
}

#[test]
fn a_broken_device_is_not_saved() {
    let (rig, _) = saved();
    rig.transport.line.needs_reset();
    assert!(matches!(rig.transport.save(), Err(StateError::Unsaved { device: "fake", .. })));
}

#[test]
fn no_state_that_cannot_be_is_taken() {
    let (rig, state) = saved();
    let restore = |state: &[u8]| rig_on(Arc::clone(&rig.transport.mem)).transport.restore(state);
    for cut in 0..state.len() {
        assert!(restore(&state[..cut]).is_err(), "{cut} bytes");
    }
    assert!(restore(&[&state[..], &[0]].concat()).is_err());
    // Device, status, a feature that is not offered, number of queues, size of the first queue.
    for (at, value) in [(0, 5), (4, 9), (12, 0xff), (33, 3), (34, 3)] {
        let mut odd = state.clone();
        odd[at] = value;
        assert!(restore(&odd).is_err(), "byte {at}");
    }
    // A ring outside guest memory.
    let mut odd = state.clone();
    odd[34 + 5 + 7] = 0xff;
    assert!(restore(&odd).is_err());
    // Whatever it is, it is refused or taken; nothing panics.
    for bit in 0..state.len() * 8 {
        let mut odd = state.clone();
        odd[bit / 8] ^= 1 << (bit % 8);
        let _refused_or_not = restore(&odd);
    }
}
