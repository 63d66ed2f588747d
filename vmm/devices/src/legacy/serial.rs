//! The first serial port: what the guest's kernel says goes to a file, and its last lines are kept for the report of a crash.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::PortDevice;
use crate::output::Output;
use crate::state::StateError;

/// Lines kept.
const MAX_LINES: usize = 40;
/// Bytes kept of one line.
const MAX_LINE_BYTES: usize = 200;
/// Bytes held back until a line ends: the guest writes one byte at a time, the file should not.
const MAX_PENDING_BYTES: usize = 512;

/// The guest's output, a line at a time, and the last lines of it.
#[derive(Debug, Default)]
pub struct LineLog {
    output: Option<Output>,
    pending: Vec<u8>,
    lines: VecDeque<String>,
    line: String,
}

impl LineLog {
    /// Writes whole lines to `output`; without it they are only remembered.
    #[must_use]
    pub fn new(output: Option<Output>) -> Self {
        Self { output, ..Self::default() }
    }

    fn push(&mut self, byte: u8) {
        self.pending.push(byte);
        if byte == b'\n' || self.pending.len() >= MAX_PENDING_BYTES {
            self.flush_pending();
        }
        match byte {
            b'\n' => self.end_line(),
            b'\r' => {}
            // Anything but printable ASCII could do harm in a terminal.
            _ if self.line.len() < MAX_LINE_BYTES => {
                self.line.push(if (0x20..0x7f).contains(&byte) { char::from(byte) } else { '?' });
            }
            _ => {}
        }
    }

    fn end_line(&mut self) {
        if self.lines.len() == MAX_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(std::mem::take(&mut self.line));
    }

    /// Writes out what is held back.
    pub fn flush_pending(&mut self) {
        if let Some(output) = &mut self.output {
            output.write(&self.pending);
        }
        self.pending.clear();
    }

    /// The last lines, oldest first, an unfinished one included: at most 40 of at most 200 bytes, printable ASCII only.
    #[must_use]
    pub fn last_lines(&self) -> Vec<String> {
        let unfinished = Some(self.line.clone()).filter(|line| !line.is_empty());
        let all: Vec<String> = self.lines.iter().cloned().chain(unfinished).collect();
        all.iter().skip(all.len().saturating_sub(MAX_LINES)).cloned().collect()
    }
}

/// A log that the port shares with whoever reports a crash.
#[derive(Debug, Clone)]
struct SharedLog(Arc<Mutex<LineLog>>);

impl Write for SharedLog {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let mut log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in buf {
            log.push(*byte);
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct Line(Arc<EventFd>);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// A 16550A whose input is never used.
#[derive(Debug)]
pub struct SerialPort {
    port: Serial<Line, NoEvents, SharedLog>,
    irq: Arc<EventFd>,
    log: SharedLog,
}

impl SerialPort {
    /// Ports that it takes.
    pub const PORTS: u16 = 8;

    /// `irq` is signalled for interrupts; what the guest sends goes to `log`.
    #[must_use]
    pub fn new(irq: EventFd, log: Arc<Mutex<LineLog>>) -> Self {
        let (irq, log) = (Arc::new(irq), SharedLog(log));
        Self { port: Serial::new(Line(Arc::clone(&irq)), log.clone()), irq, log }
    }
}

/// In the order in which they are saved.
fn registers(state: &mut SerialState) -> [&mut u8; 9] {
    [
        &mut state.baud_divisor_low,
        &mut state.baud_divisor_high,
        &mut state.interrupt_enable,
        &mut state.interrupt_identification,
        &mut state.line_control,
        &mut state.line_status,
        &mut state.modem_control,
        &mut state.modem_status,
        &mut state.scratch,
    ]
}

impl PortDevice for SerialPort {
    fn read(&mut self, offset: u16) -> u8 {
        u8::try_from(offset).map_or(0xff, |offset| self.port.read(offset))
    }

    fn write(&mut self, offset: u16, value: u8) {
        if let Ok(offset) = u8::try_from(offset) {
            // Fails when the interrupt's counter is full, and then the line is already up.
            let _already_up = self.port.write(offset, value);
        }
    }

    /// What the guest's driver has set up; input is never there.
    fn save(&self) -> Vec<u8> {
        registers(&mut self.port.state()).map(|register| *register).to_vec()
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        let mut state = SerialState::default();
        let registers = registers(&mut state);
        if registers.len() != bytes.len() {
            return Err(StateError::Length);
        }
        for (register, byte) in registers.into_iter().zip(bytes) {
            *register = *byte;
        }
        let port = Serial::from_state(&state, Line(Arc::clone(&self.irq)), NoEvents, self.log.clone());
        self.port = port.map_err(|_| StateError::Value { what: "a serial port" })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn say(port: &mut SerialPort, text: &[u8]) {
        for byte in text {
            port.write(0, *byte);
        }
    }

    fn port(output: Option<Output>) -> (SerialPort, Arc<Mutex<LineLog>>) {
        let log = Arc::new(Mutex::new(LineLog::new(output)));
        (SerialPort::new(EventFd::new(EFD_NONBLOCK).unwrap(), Arc::clone(&log)), log)
    }

    #[test]
    fn output_reaches_the_file_and_the_memory() {
        let file = rustix::fs::memfd_create("serial", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = std::fs::File::from(file);
        let (mut port, log) = port(Some(Output::new(file.try_clone().unwrap().into())));
        say(&mut port, b"one\r\ntwo\x1b[2J");
        log.lock().unwrap().flush_pending();
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "one\r\ntwo\x1b[2J");
        assert_eq!(log.lock().unwrap().last_lines(), ["one", "two?[2J"]);
    }

    #[test]
    fn memory_is_bounded() {
        let (mut port, log) = port(None);
        for n in 0..100 {
            say(&mut port, format!("line {n} {}\n", "x".repeat(1000)).as_bytes());
        }
        say(&mut port, &[b'y'; 5000]);
        let lines = log.lock().unwrap().last_lines();
        assert_eq!(lines.len(), MAX_LINES);
        assert!(lines.iter().all(|line| line.len() <= MAX_LINE_BYTES));
        assert!(lines[0].starts_with("line 61 "), "{}", lines[0]);
        assert!(log.lock().unwrap().pending.len() <= MAX_PENDING_BYTES);
    }

    #[test]
    fn set_up_is_saved() {
        let (mut port, log) = port(None);
        // Divisor latch, a divisor, then 8 bits without it, and interrupts.
        for (offset, value) in [(3, 0x83), (0, 1), (1, 0), (3, 0x03), (1, 0x05), (7, 0x5a)] {
            port.write(offset, value);
        }
        let state = port.save();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut again = SerialPort::new(irq, Arc::clone(&log));
        again.restore(&state).unwrap();
        assert_eq!([1, 3, 7].map(|offset| again.read(offset)), [0x05, 0x03, 0x5a]);
        assert_eq!(again.save(), state);
        say(&mut again, b"still here\n");
        assert_eq!(log.lock().unwrap().last_lines(), ["still here"]);
        assert_eq!(again.restore(&state[1..]), Err(StateError::Length));
    }

    #[test]
    fn every_register_can_be_touched() {
        let (mut port, _log) = port(None);
        for offset in (0..SerialPort::PORTS).chain([300]) {
            for value in 0..=0xff {
                port.write(offset, value);
                port.read(offset);
            }
        }
    }
}
