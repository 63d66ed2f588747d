//! One thread per virtual processor, and the gate at which all of them can be stopped.
//!
//! ```text
//!  Running --pause: flag and signal to each--> Pausing --last one parks: Notice::AllParked--> Paused --resume--> Running
//! ```

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use hyper_vmm_hv::{Exit, HvError, Kicker, Machine, MachineState, Vcpu, VcpuState, kick_signal};
use vmm_sys_util::signal::Killable;

use crate::bus::Bus;
use crate::confine;
use crate::life::{Ending, Life, Mark, Notice};

#[derive(Debug, Default)]
struct Wish {
    pause: bool,
    parked: usize,
    /// One for each processor.
    kickers: Vec<Kicker>,
}

/// What the threads share with the main thread.
#[derive(Debug)]
struct Gate {
    wish: Mutex<Wish>,
    resumed: Condvar,
    exits: AtomicU64,
    life: Arc<Life>,
}

impl Gate {
    /// Called by a vCPU thread that was kicked: stays as long as a pause is wished for. Returns whether it stayed.
    fn pass(&self, index: usize) -> bool {
        let mut wish = self.wish.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kicker) = wish.kickers.get(index) {
            kicker.set(false);
        }
        if !wish.pause {
            return false;
        }
        wish.parked += 1;
        if wish.parked == wish.kickers.len() {
            self.life.post(Notice::AllParked);
        }
        while wish.pause {
            wish = self.resumed.wait(wish).unwrap_or_else(PoisonError::into_inner);
        }
        wish.parked -= 1;
        true
    }
}

/// The running processors.
#[derive(Debug)]
pub(crate) struct Vcpus {
    gate: Arc<Gate>,
    bus: Arc<Bus>,
    threads: Vec<JoinHandle<()>>,
    /// Each is locked by its thread but while that is parked.
    vcpus: Vec<Arc<Mutex<Vcpu>>>,
}

impl Vcpus {
    /// Starts all of `vcpus`, the one that boots last, so that nobody waits for a thread. The kick signal is installed.
    pub(crate) fn start(vcpus: Vec<Vcpu>, bus: &Arc<Bus>, life: &Arc<Life>) -> Result<Self, StartError> {
        let kickers = vcpus.iter().map(Vcpu::kicker).collect::<Result<_, _>>()?;
        let gate = Arc::new(Gate {
            wish: Mutex::new(Wish { kickers, ..Wish::default() }),
            resumed: Condvar::new(),
            exits: AtomicU64::new(0),
            life: Arc::clone(life),
        });
        let vcpus: Vec<_> = vcpus.into_iter().map(|vcpu| Arc::new(Mutex::new(vcpu))).collect();
        let mut started = Self { gate, bus: Arc::clone(bus), threads: Vec::new(), vcpus: vcpus.clone() };
        for (index, vcpu) in vcpus.into_iter().enumerate().rev() {
            started.spawn(index, vcpu)?;
        }
        Ok(started)
    }

    fn spawn(&mut self, index: usize, vcpu: Arc<Mutex<Vcpu>>) -> Result<(), StartError> {
        let (gate, bus) = (Arc::clone(&self.gate), Arc::clone(&self.bus));
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || run(index, &vcpu, &gate, &bus));
        self.threads.push(thread.map_err(StartError::Thread)?);
        Ok(())
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.threads.len()
    }

    /// Adds one to running processors, the next by number. It waits in the kernel until the guest starts it.
    pub(crate) fn add(&mut self, vcpu: Vcpu) -> Result<(), StartError> {
        let kicker = vcpu.kicker()?;
        self.kickers(|kickers| kickers.push(kicker));
        let vcpu = Arc::new(Mutex::new(vcpu));
        let spawned = self.spawn(self.vcpus.len(), Arc::clone(&vcpu));
        match spawned {
            Ok(()) => self.vcpus.push(vcpu),
            Err(_) => self.kickers(|kickers| drop(kickers.pop())),
        }
        spawned
    }

    fn kickers(&self, change: impl FnOnce(&mut Vec<Kicker>)) {
        change(&mut self.gate.wish.lock().unwrap_or_else(PoisonError::into_inner).kickers);
    }

    /// Asks all processors to stop; [`Notice::AllParked`] comes when they have.
    pub(crate) fn pause(&self) {
        let mut wish = self.gate.wish.lock().unwrap_or_else(PoisonError::into_inner);
        wish.pause = true;
        for kicker in &wish.kickers {
            kicker.set(true);
        }
        drop(wish);
        for thread in &self.threads {
            // Fails for a thread that has ended, and then the machine is ending too.
            let _thread_gone = thread.kill(kick_signal());
        }
    }

    /// Lets all processors go on.
    pub(crate) fn resume(&self) {
        self.gate.wish.lock().unwrap_or_else(PoisonError::into_inner).pause = false;
        self.gate.resumed.notify_all();
    }

    /// State of all processors, in order of their numbers, and of what they have in common. Only when all of them are paused: one that
    /// runs would be waited for.
    pub(crate) fn save(&self, kvm: &Machine) -> Result<(Vec<VcpuState>, MachineState), HvError> {
        let held: Vec<_> =
            self.vcpus.iter().map(|vcpu| vcpu.lock().unwrap_or_else(PoisonError::into_inner)).collect();
        let mut states = held.iter().map(|vcpu| kvm.save_vcpu(vcpu)).collect::<Result<Vec<_>, _>>()?;
        VcpuState::align_clocks(&mut states);
        let first = held.first().ok_or(HvError::State("a machine without processors"))?;
        Ok((states, kvm.save(first)?))
    }

    /// State of all devices on ports.
    pub(crate) fn save_ports(&self) -> Vec<Vec<u8>> {
        self.bus.save_ports()
    }

    /// Exits to this process so far, all processors.
    pub(crate) fn exits(&self) -> u64 {
        self.gate.exits.load(Ordering::Relaxed)
    }
}

/// Why the processors could not be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error(transparent)]
    Kvm(#[from] HvError),
    #[error("cannot start a vCPU thread")]
    Thread(#[source] io::Error),
}

/// The life of one processor.
fn run(index: usize, shared: &Mutex<Vcpu>, gate: &Gate, bus: &Bus) {
    confine::vcpu();
    if index == 0 {
        gate.life.mark(Mark::Entered);
    }
    let hold = || shared.lock().unwrap_or_else(PoisonError::into_inner);
    let mut vcpu = hold();
    while !gate.life.has_ended() {
        let exit = vcpu.run();
        gate.exits.fetch_add(1, Ordering::Relaxed);
        let mut kicked = false;
        match exit {
            Exit::PortWrite(port, data) => bus.port_write(port, data),
            Exit::PortRead(port, data) => bus.port_read(port, data),
            Exit::MmioWrite(address, data) => bus.mmio_write(address, data),
            Exit::MmioRead(address, data) => bus.mmio_read(address, data),
            Exit::Again => {}
            Exit::Kicked => kicked = true,
            Exit::Fault(fault) => {
                let fault = vcpu.explain(fault);
                gate.life.end(Ending::Fault(format!("{fault} on vCPU {index}")));
            }
        }
        if kicked {
            drop(vcpu);
            let stayed = gate.pass(index);
            vcpu = hold();
            if stayed {
                vcpu.was_stopped();
            }
        }
    }
}
