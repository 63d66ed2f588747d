//! Any system call with any arguments, and children to make it in.
// UNSAFETY: an attacker in full control of its process makes whatever call it likes; that is what this program is for.
#![expect(unsafe_code, reason = "raw system calls, fork and signals")]

use std::io;

/// One argument of a call.
pub(crate) type Word = usize;

/// Makes a system call. Pointers among the arguments come from references that live longer than the call, or are meant to be wrong.
pub(crate) fn call(number: i64, arguments: &[Word]) -> io::Result<i64> {
    let at = |index: usize| arguments.get(index).copied().unwrap_or(0);
    // SAFETY: what a call does to the memory of this process is up to the attempt, which gives it buffers of its own.
    let answer = unsafe { libc::syscall(number, at(0), at(1), at(2), at(3), at(4), at(5)) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

/// The address of something, as an argument.
pub(crate) fn address<T: ?Sized>(of: &T) -> Word {
    std::ptr::from_ref(of).cast::<u8>() as Word
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Exited(i32),
    Killed(i32),
}

/// Runs `what` in a child, for at most `seconds`; its answer is the exit code.
pub(crate) fn in_child(seconds: u32, what: impl FnOnce() -> i32) -> io::Result<End> {
    // SAFETY: this process has one thread, so the child has all that the parent had.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: plain numbers: the child ends when the time is up, and hears of a limit on files by an error.
            unsafe { libc::alarm(seconds) };
            // SAFETY: ignoring a signal runs nothing.
            unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
            let code = what();
            // SAFETY: ends the child without running what belongs to the parent.
            unsafe { libc::_exit(code) }
        }
        pid => wait(pid),
    }
}

fn wait(pid: libc::pid_t) -> io::Result<End> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is an integer that outlives the call.
        if unsafe { libc::waitpid(pid, &raw mut status, 0) } == pid {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(if libc::WIFEXITED(status) {
        End::Exited(libc::WEXITSTATUS(status))
    } else {
        End::Killed(libc::WTERMSIG(status))
    })
}
