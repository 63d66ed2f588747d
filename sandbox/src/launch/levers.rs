//! What changes a machine while it runs. Whoever holds these does not keep the machine alive.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use hyper_vmm_spec::control::{DiskPart, Request, SnapshotFds};
use hyper_vmm_spec::{DiskId, FdSlot};
use tokio::time::timeout;

use super::control::Control;
use super::{VmError, scaled_ms};
use crate::SandboxError;

/// How long the VMM may take to answer: it waits for its host's kernel only.
const ANSWER_MS: u64 = 10_000;
/// How long the guest may take to use memory that it is given.
const PLUG_MS: u64 = 10_000;

/// The way to the VMM of one machine.
#[derive(Debug)]
pub(crate) struct Levers {
    control: Weak<Control>,
    /// Serial of the latest request for memory.
    memory_requests: AtomicU64,
}

impl Levers {
    pub(super) fn new(control: &Arc<Control>) -> Self {
        Self { control: Arc::downgrade(control), memory_requests: AtomicU64::new(0) }
    }

    fn control(&self) -> Result<Arc<Control>, VmError> {
        self.control.upgrade().ok_or_else(|| VmError::Ended("the virtual machine has ended".into()))
    }

    /// Makes vCPUs until there are `count`; the agent brings them online.
    pub(crate) async fn add_vcpus(&self, count: u8) -> Result<(), VmError> {
        self.control()?.request(&Request::Vcpus { count }, &[], scaled_ms(ANSWER_MS)).await.map(drop)
    }

    /// Writes the machine to files, until `deadline`. It stands still meanwhile, and while `beside` is done; then it goes on, whatever came
    /// of it.
    ///
    /// # Errors
    /// What the VMM answers, or `beside`.
    pub(crate) async fn save(
        &self,
        state: &File,
        memory: &File,
        deadline: Instant,
        beside: impl Future<Output = Result<(), SandboxError>>,
    ) -> Result<(), SandboxError> {
        let control = self.control()?;
        let answer = scaled_ms(ANSWER_MS);
        let saved = async {
            control.request(&Request::Pause, &[], answer).await?;
            let snapshot = SnapshotFds { state: FdSlot(0), memory: FdSlot(1) };
            let limit = deadline.saturating_duration_since(Instant::now());
            let limit_ms = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
            let request = Request::Save { snapshot, limit_ms };
            control.request(&request, &[state.as_fd(), memory.as_fd()], limit + answer).await?;
            beside.await
        };
        let saved = saved.await;
        let resumed = control.request(&Request::Resume, &[], answer).await;
        saved?;
        Ok(resumed.map(drop)?)
    }

    /// Puts a disk into a bay that is made of these files, of which so many sectors are used. A file is read-only when its descriptor is.
    pub(crate) async fn attach(
        &self,
        bay: u8,
        id: &DiskId,
        files: &[(BorrowedFd<'_>, u64)],
    ) -> Result<(), VmError> {
        let (fds, sectors): (Vec<_>, Vec<u64>) = files.iter().copied().unzip();
        let parts =
            (0..).zip(sectors).map(|(slot, sectors)| DiskPart { fd: FdSlot(slot), sectors }).collect();
        let request = Request::Attach { bay, id: id.clone(), parts };
        self.control()?.request(&request, &fds, scaled_ms(ANSWER_MS)).await.map(drop)
    }

    /// Takes the disk out of a bay.
    pub(crate) async fn detach(&self, bay: u8) -> Result<(), VmError> {
        self.control()?.request(&Request::Detach { bay }, &[], scaled_ms(ANSWER_MS)).await.map(drop)
    }

    /// Sets how much memory the guest is to have beside that of boot, MiB. Returns when it has or, with `wait` false, at once: a guest
    /// gives memory back when it can.
    pub(crate) async fn set_hot_memory(&self, mib: u32, wait: bool) -> Result<(), VmError> {
        let serial = self.memory_requests.fetch_add(1, Ordering::SeqCst) + 1;
        let mut memory = {
            let control = self.control()?;
            control.request(&Request::HotMemory { mib, serial }, &[], scaled_ms(ANSWER_MS)).await?;
            control.memory()
        };
        if !wait {
            return Ok(());
        }
        let reached = memory.wait_for(|reached| *reached >= serial);
        match timeout(scaled_ms(PLUG_MS), reached).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(VmError::Control("closed".into())),
            Err(_) => Err(VmError::Refused(format!("the guest does not take {mib} MiB of memory"))),
        }
    }
}

/// A VMM that does whatever it is asked, and keeps what that was.
#[cfg(test)]
pub(crate) mod testing {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::launch::control::{self, testing};

    pub(crate) struct PlayedVmm {
        heard: Receiver<Request>,
        _control: Arc<Control>,
    }

    impl PlayedVmm {
        /// The next request.
        pub(crate) fn heard(&self) -> Request {
            self.heard.recv().unwrap()
        }
    }

    pub(crate) fn levers() -> (Levers, PlayedVmm) {
        let (control, far) = control::pair().unwrap();
        let control = Arc::new(control);
        let (tell, heard) = channel();
        std::thread::spawn(move || {
            while let Some(request) = testing::hear_until_closed(&far) {
                tell.send(request).unwrap();
                testing::done(&far);
            }
        });
        (Levers::new(&control), PlayedVmm { heard, _control: control })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::testing::levers;
    use super::*;
    use crate::launch::control::{self, testing};

    #[tokio::test]
    async fn a_machine_that_was_saved_goes_on_whatever_came_of_it() {
        let (levers, vmm) = levers();
        let file = File::open("/dev/null").unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let fine = levers.save(&file, &file, deadline, async { Ok(()) }).await;
        assert!(fine.is_ok());
        let failed = async { Err(SandboxError::Refused("no room".into())) };
        let error = levers.save(&file, &file, deadline, failed).await.unwrap_err();
        assert_eq!(error.to_string(), "no room");
        for _ in 0..2 {
            assert_eq!(vmm.heard(), Request::Pause);
            assert!(matches!(vmm.heard(), Request::Save { limit_ms, .. } if limit_ms > 0));
            assert_eq!(vmm.heard(), Request::Resume);
        }
    }

    #[tokio::test]
    async fn memory_is_waited_for_until_the_machine_ends() {
        let (control, far) = control::pair().unwrap();
        let control = Arc::new(control);
        let levers = Levers::new(&control);
        let vmm = std::thread::spawn(move || {
            for wanted in [1, 2] {
                let Request::HotMemory { serial, .. } = testing::hear(&far) else {
                    panic!("a request for memory")
                };
                assert_eq!(serial, wanted);
                testing::done(&far);
                testing::memory_reached(&far, serial);
            }
            assert!(matches!(testing::hear(&far), Request::HotMemory { mib: 7, .. }));
            testing::done(&far);
        });
        levers.set_hot_memory(128, true).await.unwrap();
        levers.set_hot_memory(256, true).await.unwrap();
        assert!(matches!(levers.set_hot_memory(7, true).await, Err(VmError::Control(_))));
        vmm.join().unwrap();
        drop(control);
        assert!(matches!(levers.add_vcpus(1).await, Err(VmError::Ended(_))));
    }
}
