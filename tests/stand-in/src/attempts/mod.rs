//! The list of what is tried. An attempt that works has got out, or has what it must not have.

mod files;
mod filling;
mod kernel;
mod network;
mod powers;
mod processes;

use std::io;

use crate::sys::{Word, call};
use crate::world::World;

/// Whether the jail holds without the filters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bare {
    /// It does.
    Holds,
    /// It works then. It leads out of nothing: what it gives is the process's own, or part of the kernel that only a filter hides.
    OnlyFilter,
}

/// One thing to try.
#[derive(Clone, Copy)]
pub(crate) struct Attempt {
    pub(crate) name: &'static str,
    pub(crate) make: fn(&World) -> io::Result<()>,
    pub(crate) bare: Bare,
    /// It does no harm on a host without a jail, and works there.
    pub(crate) works_outside: bool,
}

/// One that must fail in every variant, and is shown to work outside.
const fn held(name: &'static str, make: fn(&World) -> io::Result<()>) -> Attempt {
    Attempt { name, make, bare: Bare::Holds, works_outside: true }
}

impl Attempt {
    /// Not tried outside: it would do harm there, or needs something that the host of a test may not have.
    const fn inside_only(self) -> Self {
        Self { works_outside: false, ..self }
    }

    /// See [`Bare::OnlyFilter`].
    const fn only_filter(self) -> Self {
        Self { bare: Bare::OnlyFilter, ..self }
    }
}

/// All of them.
pub(crate) fn all() -> impl Iterator<Item = Attempt> {
    [files::ALL, processes::ALL, network::ALL, powers::ALL, kernel::ALL, filling::ALL]
        .into_iter()
        .flatten()
        .copied()
}

/// A call that works or not.
fn works(number: i64, arguments: &[Word]) -> io::Result<()> {
    call(number, arguments).map(drop)
}

/// The first of many that works; the last error otherwise.
fn any(attempts: impl IntoIterator<Item = io::Result<()>>) -> io::Result<()> {
    let mut last = io::Error::from_raw_os_error(libc::ENOENT);
    for attempt in attempts {
        match attempt {
            Ok(()) => return Ok(()),
            Err(error) => last = error,
        }
    }
    Err(last)
}
