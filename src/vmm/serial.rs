//! The serial port: vm-superio's 16550 at COM1, its output into the console's ring, its input from the
//! attached clients.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_superio::Trigger;
use vm_superio::serial::{Serial, SerialEvents};
use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;
use super::console::{Output, Printer};

/// What the guest wants to be interrupted for.
const INTERRUPT_ENABLE: u64 = 1;
/// The register whose reading says that the guest has taken note of the interrupt.
const INTERRUPT_IDENTIFICATION: u64 = 2;
/// In the line control register: the first two registers are the divisor.
const DIVISOR_LATCH: u8 = 1 << 7;
const ENABLE_RECEIVED: u8 = 1 << 0;
const ENABLE_TRANSMITTER_EMPTY: u8 = 1 << 1;

/// Raises the port's interrupt.
#[derive(Clone)]
struct Interrupt {
    line: Arc<EventFd>,
    /// Raised, and not yet asked about by the guest.
    pending: Arc<AtomicBool>,
}

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.pending.store(true, Ordering::Release);
        self.line.write(1)
    }
}

/// Tells the event loop that the guest has read all input, if it waits for that.
#[derive(Clone)]
struct Drained {
    wanted: Arc<AtomicBool>,
    wake: Arc<EventFd>,
}

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        if self.wanted.swap(false, Ordering::AcqRel) {
            let _ = self.wake.write(1);
        }
    }
}

/// Whether the interrupt was raised again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Raised {
    No,
    /// The guest hasn't read what the last one was for.
    NotAskedFor,
    /// It has, but has neither written nor read since, nor ceased to want it.
    StillWaitedFor,
}

pub struct SerialPort {
    serial: Serial<Interrupt, Drained, Printer>,
    interrupt: Interrupt,
    drained: Drained,
    printer: Printer,
}

impl SerialPort {
    /// `input_wanted` is written when there is room for input again, after [`SerialPort::type_in`] ran
    /// out of it.
    pub fn new(interrupt: Arc<EventFd>, input_wanted: Arc<EventFd>, output: Arc<Output>) -> Self {
        let interrupt = Interrupt { line: interrupt, pending: Arc::new(AtomicBool::new(false)) };
        let drained = Drained { wanted: Arc::new(AtomicBool::new(false)), wake: input_wanted };
        let printer = Printer(output);
        let serial = Serial::with_events(interrupt.clone(), drained.clone(), printer.clone());
        Self { serial, interrupt, drained, printer }
    }

    /// Back to the state at power-on; input that the guest hasn't read is lost.
    pub fn reset(&mut self) {
        self.serial = Serial::with_events(self.interrupt.clone(), self.drained.clone(), self.printer.clone());
        self.interrupt.pending.store(false, Ordering::Release);
        self.drained.in_buffer_empty();
    }

    /// Raises the interrupt again if the guest has not yet asked what the last one was for, or has asked
    /// and still waits for what is there. The port's line is an edge: were one lost (masked at the wrong
    /// moment, or between the layers of nested virtualisation), the guest would wait for it for ever, in
    /// the middle of a line.
    pub fn raise_again(&mut self) -> Raised {
        if self.interrupt.pending.load(Ordering::Acquire) {
            // It fails only when the counter is full, and then the interrupt is on its way.
            let _ = self.interrupt.line.write(1);
            return Raised::NotAskedFor;
        }
        let state = self.serial.state();
        let enabled = state.interrupt_enable;
        let waits = enabled & ENABLE_TRANSMITTER_EMPTY != 0
            || enabled & ENABLE_RECEIVED != 0 && !state.in_buffer.is_empty();
        if !waits || state.line_control & DIVISOR_LATCH != 0 {
            return Raised::No;
        }
        // What is enabled once more is raised, as its conditions still hold.
        let _ = self.serial.write(INTERRUPT_ENABLE as u8, enabled);
        Raised::StillWaitedFor
    }

    /// Hands as many of these bytes to the guest as its port takes now; gives how many.
    pub fn type_in(&mut self, bytes: &[u8]) -> usize {
        let room = self.serial.fifo_capacity().min(bytes.len());
        // An error means that the interrupt couldn't be raised, or no room: nothing to do about either.
        let taken = if room == 0 { 0 } else { self.serial.enqueue_raw_bytes(&bytes[..room]).unwrap_or(0) };
        if taken < bytes.len() {
            self.drained.wanted.store(true, Ordering::Release);
        }
        taken
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        // All registers are one byte wide.
        if let [byte] = data {
            if offset == INTERRUPT_IDENTIFICATION {
                self.interrupt.pending.store(false, Ordering::Release);
            }
            *byte = self.serial.read(offset as u8);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let &[byte] = data {
            // It fails only when the interrupt can't be raised.
            let _ = self.serial.write(offset as u8, byte);
            if offset == INTERRUPT_ENABLE && self.interrupt.pending.load(Ordering::Acquire) {
                // Nothing may be printed before the guest has taken it: the event loop looks after it.
                self.printer.0.announce();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn eventfd() -> EventFd {
        EventFd::new(EFD_NONBLOCK).unwrap()
    }

    #[test]
    fn output_goes_to_the_ring_and_input_waits_for_room() {
        let (interrupt, wanted, output) = (Arc::new(eventfd()), Arc::new(eventfd()), Output::new(eventfd()));
        let mut port = SerialPort::new(interrupt.clone(), wanted.clone(), output.clone());
        for &byte in b"hello" {
            port.write(0, &[byte]);
        }
        port.write(0, b"no"); // two bytes at a register of one
        let mut text = [0; 16];
        assert_eq!(output.copy(0, &mut text), (5, 5));
        assert_eq!(&text[..5], b"hello");

        port.write(1, &[1]); // interrupt when data is received
        assert_eq!(port.type_in(&[b'x'; 100]), 64);
        assert_eq!(interrupt.read().unwrap(), 1);
        assert_eq!(port.raise_again(), Raised::NotAskedFor);
        assert_eq!(interrupt.read().unwrap(), 1);
        port.read(INTERRUPT_IDENTIFICATION, &mut [0]);
        assert!(wanted.read().is_err());
        let mut byte = [0];
        for _ in 0..64 {
            port.read(0, &mut byte);
            assert_eq!(byte, *b"x");
        }
        assert_eq!(port.raise_again(), Raised::No);
        assert!(interrupt.read().is_err());
        assert_eq!(wanted.read().unwrap(), 1, "there is room again");
        assert_eq!(port.type_in(b"y"), 1);
        port.reset();
        port.read(0, &mut byte);
        assert_eq!(byte, [0], "a reset empties the port");
    }

    /// The guest's side of an interrupt: what it asks for is what the port says.
    fn identified(port: &mut SerialPort) -> u8 {
        let mut byte = [0];
        port.read(INTERRUPT_IDENTIFICATION, &mut byte);
        byte[0] & 0xf
    }

    #[test]
    fn a_guest_that_asked_and_did_nothing_is_told_again() {
        const NONE: u8 = 1;
        let (interrupt, output) = (Arc::new(eventfd()), Output::new(eventfd()));
        let mut port = SerialPort::new(interrupt.clone(), Arc::new(eventfd()), output.clone());
        let cases = [(ENABLE_TRANSMITTER_EMPTY, &b""[..], 2), (ENABLE_RECEIVED, b"x", 4)];
        for (enabled, typed, identification) in cases {
            port.write(INTERRUPT_ENABLE, &[enabled]);
            port.type_in(typed);
            assert_eq!(output.wake().read().is_ok(), typed.is_empty(), "told though nothing is printed yet");
            output.acknowledge();
            assert_eq!(interrupt.read().unwrap(), 1);
            assert_eq!(identified(&mut port), identification);
            assert_eq!(port.raise_again(), Raised::StillWaitedFor);
            assert_eq!(interrupt.read().unwrap(), 1);
            assert_eq!(identified(&mut port), identification);
            port.write(INTERRUPT_ENABLE, &[0]);
            assert_eq!(port.raise_again(), Raised::No);
            assert_eq!(identified(&mut port), NONE);
        }
        // The same register is the divisor's, and stays it.
        port.write(INTERRUPT_ENABLE, &[ENABLE_RECEIVED]);
        identified(&mut port);
        port.write(3, &[DIVISOR_LATCH]);
        port.write(INTERRUPT_ENABLE, &[7]);
        assert_eq!(port.raise_again(), Raised::No);
        let mut divisor = [0];
        port.read(1, &mut divisor);
        assert_eq!(divisor, [7]);
    }
}
