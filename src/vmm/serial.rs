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

/// The register whose reading says that the guest has taken note of the interrupt.
const INTERRUPT_IDENTIFICATION: u64 = 2;

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

    /// Raises the interrupt again if the guest has not yet asked what the last one was for; `false` if
    /// there is none. The port's line is an edge: were one lost (masked at the wrong moment, or between
    /// the layers of nested virtualisation), the guest would wait for it for ever, in the middle of a line.
    pub fn raise_again(&self) -> bool {
        let pending = self.interrupt.pending.load(Ordering::Acquire);
        if pending {
            // It fails only when the counter is full, and then the interrupt is on its way.
            let _ = self.interrupt.line.write(1);
        }
        pending
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
        assert!(port.raise_again(), "the guest hasn't asked yet");
        assert_eq!(interrupt.read().unwrap(), 1);
        port.read(INTERRUPT_IDENTIFICATION, &mut [0]);
        assert!(!port.raise_again());
        assert!(interrupt.read().is_err());
        assert!(wanted.read().is_err());
        let mut byte = [0];
        for _ in 0..64 {
            port.read(0, &mut byte);
            assert_eq!(byte, *b"x");
        }
        assert_eq!(wanted.read().unwrap(), 1, "there is room again");
        assert_eq!(port.type_in(b"y"), 1);
        port.reset();
        port.read(0, &mut byte);
        assert_eq!(byte, [0], "a reset empties the port");
    }
}
