//! Stands in for a VMM that is in the guest's hands: closes the jail as hyper-vmm does, with the same code, and tries to get out.
//!
//! ```text
//!  as hyper-vmm: jail closes -> boot request with its descriptors -> limits -> for each variant, each attempt in a child of its own
//!  `hyper-stand-in outside`: the attempts that do no harm, without a jail: each must work, or it proves nothing inside
//! ```
//! Variants: `bare` is the jail without its filters of system calls; `events`, `vcpu` and `disk` are the filters of hyper-vmm's threads on
//! top. The log has a line for each attempt and a count for each variant. Files: `attempts` (the list), `world` (what is known), `sys`.

mod attempts;
mod sys;
mod world;

use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use hyper_jail::vmm::{self, Kind};

use crate::attempts::{Attempt, Bare};
use crate::sys::{End, in_child};
use crate::world::World;

/// Exit codes of children: below are error numbers.
const FORBIDDEN: u8 = 251;
const GOT_OUT: i32 = 250;
const NO_FILTER: i32 = 249;
const MAX_ERRNO: i32 = 200;
/// Seconds that an attempt may take.
const LIMIT: u32 = 60;

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let done = match std::env::args().nth(1).as_deref() {
        None => try_inside(),
        Some("outside") => try_outside(),
        Some(other) => Err(format!("no such mode: {other}").into()),
    };
    if let Err(error) = done {
        say(format_args!("stand-in: {error}"));
    }
    ExitCode::FAILURE
}

/// Nowhere is left to report a broken standard error.
fn say(what: fmt::Arguments<'_>) {
    drop(writeln!(io::stderr(), "{what}"));
}

fn try_inside() -> Result<(), Failure> {
    hyper_jail::close_inherited()?;
    let mut world = World::look()?;
    vmm::close(vmm::Network::None)?;
    world.take_request()?;
    vmm::bound(0, Some(world.longest_file()))?;
    hyper_jail::exit_on_forbidden_calls(FORBIDDEN)?;
    say(format_args!(
        "handed over: {} descriptors, {} writable files",
        world.handed.len(),
        world.writable_files().len()
    ));
    run("bare", None, &world)?;
    for kind in Kind::ALL {
        run(kind.name(), Some(kind), &world)?;
    }
    Ok(())
}

/// Makes all attempts; the last line counts them.
fn run(variant: &str, kind: Option<Kind>, world: &World) -> Result<(), Failure> {
    let filter = kind.map(Kind::filter).transpose()?;
    let (mut tried, mut errors, mut ended, mut only_filter, mut out) = (0, 0, 0, 0, 0);
    for attempt in attempts::all() {
        if kind.is_none() && attempt.bare == Bare::OnlyFilter {
            only_filter += 1;
            continue;
        }
        tried += 1;
        let end = in_child(LIMIT, || {
            if filter.as_ref().is_some_and(|filter| filter.apply().is_err()) {
                NO_FILTER
            } else {
                code(&attempt, world)
            }
        })?;
        match end {
            End::Exited(code) if code == i32::from(FORBIDDEN) => ended += 1,
            End::Exited(code) if code < MAX_ERRNO => {
                errors += 1;
                let error = io::Error::from_raw_os_error(code);
                say(format_args!("{variant}: held: {}: {error}", attempt.name));
            }
            other => {
                out += 1;
                say(format_args!("{variant}: OUT: {}: {other:?}", attempt.name));
            }
        }
    }
    say(format_args!(
        "{variant}: {tried} tried, {errors} refused, {ended} ended by the filter, {out} got out; {only_filter} left to the filter"
    ));
    Ok(())
}

fn code(attempt: &Attempt, world: &World) -> i32 {
    match (attempt.make)(world) {
        Ok(()) => GOT_OUT,
        Err(error) => error.raw_os_error().unwrap_or(0),
    }
}

/// Without a jail: what does no harm must work.
fn try_outside() -> Result<(), Failure> {
    let world = World::look()?;
    let (mut tried, mut worked) = (0, 0);
    for attempt in attempts::all().filter(|attempt| attempt.works_outside) {
        tried += 1;
        match in_child(LIMIT, || code(&attempt, &world))? {
            End::Exited(GOT_OUT) => worked += 1,
            other => say(format_args!("outside: DOES NOT WORK: {}: {other:?}", attempt.name)),
        }
    }
    say(format_args!("outside: {tried} tried, {worked} worked"));
    Ok(())
}
