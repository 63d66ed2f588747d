//! A pseudo terminal made inside the container, so that `tty` names a device that is there.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, Uid};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use super::fs;
use super::path::{self, Missing};
use crate::error::{AgentError, Tried};
use crate::plan::Window;

/// Both ends.
#[derive(Debug)]
pub(crate) struct Terminal {
    pub master: OwnedFd,
    pub slave: OwnedFd,
}

impl Window {
    /// As the kernel has it.
    pub(crate) fn winsize(self) -> Winsize {
        Winsize { ws_row: self.rows, ws_col: self.cols, ws_xpixel: 0, ws_ypixel: 0 }
    }
}

/// Opens a terminal in the devpts at /dev/pts of `root`.
///
/// # Errors
/// There is none, or it is full.
pub(crate) fn open(root: BorrowedFd<'_>, window: Window) -> Result<Terminal, AgentError> {
    let master = path::open_in(root, "/dev/pts/ptmx", OFlags::RDWR | OFlags::NOCTTY)
        .tried(|| "open /dev/pts/ptmx of the container".to_owned())?;
    rustix::pty::unlockpt(&master).tried(|| "unlock the terminal".to_owned())?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).tried(|| "open the terminal".to_owned())?;
    if window.rows != 0 || window.cols != 0 {
        rustix::termios::tcsetwinsize(&master, window.winsize())
            .tried(|| "set the terminal's size".to_owned())?;
    }
    Ok(Terminal { master, slave })
}

impl Terminal {
    /// Puts the terminal at /dev/console of `root`.
    ///
    /// # Errors
    /// A mount that fails.
    pub(crate) fn as_console(&self, root: BorrowedFd<'_>) -> Result<(), AgentError> {
        let place = path::resolve_or_make(root, "/dev/console", Missing::File)?;
        let mount =
            fs::clone_of(self.slave.as_fd(), false).tried(|| "take a mount of the terminal".to_owned())?;
        fs::attach(mount.as_fd(), place.as_fd()).tried(|| "mount the terminal at /dev/console".to_owned())
    }

    /// Gives the terminal to a user, as login programs do.
    ///
    /// # Errors
    /// What `fchown` answers.
    pub(crate) fn give_to(&self, uid: u32) -> Result<(), AgentError> {
        rustix::fs::fchown(&self.slave, Some(Uid::from_raw(uid)), None)
            .and_then(|()| rustix::fs::fchmod(&self.slave, Mode::from_raw_mode(0o620)))
            .tried(|| "give the terminal to the user".to_owned())
    }

    /// Makes the terminal standard input, output and error, and controls this new session by it.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn take(&self) -> Result<(), rustix::io::Errno> {
        rustix::stdio::dup2_stdin(&self.slave)?;
        rustix::stdio::dup2_stdout(&self.slave)?;
        rustix::stdio::dup2_stderr(&self.slave)?;
        rustix::process::ioctl_tiocsctty(&self.slave)
    }
}
