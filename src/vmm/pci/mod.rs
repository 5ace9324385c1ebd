//! PCI, as far as a virtual machine needs it: one bus, its configuration space by ECAM and by the legacy
//! ports, functions with one memory BAR and MSI-X, and slots whose devices come and go while the guest
//! runs.
//!
//! ```text
//!   vCPU ── 0xcf8/0xcfc ──▶ ┌─────────┐       ┌────────────┐ BAR ┌─────┐
//!        ── ECAM ─────────▶ │ PciRoot │──▶ 32 │ PciFunction│────▶│ Bus │ MMIO, ioeventfds
//!        ── 0x620… ───────▶ │ Hotplug │ slots └────────────┘     └─────┘
//!                           └─────────┘             │ MSI-X ──▶ irqfd, KVM's routes
//! ```
//!
//! There is no INTx: who doesn't enable MSI-X polls. There are no bridges, so no bus number but 0. The
//! machine assigns all BARs, as firmware does; a guest may move them.
//!
//! Everything here is driven by a guest and hostile.

pub mod bars;
pub mod config;
pub mod hotplug;
pub mod msix;
pub mod root;

/// Slots (device numbers) of the bus. Slot 0 is the host bridge.
pub const SLOTS: u8 = 32;

/// Bits of the command register (PCI 3.0, section 6.2.2).
pub const COMMAND_MEMORY: u16 = 1 << 1;
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;

/// A device on the bus.
pub trait PciFunction: Send {
    /// Reads 1 to 4 bytes that don't cross a multiple of 4. `offset` is below 4096.
    fn read_config(&mut self, offset: u16, data: &mut [u8]);
    /// The same, to write.
    fn write_config(&mut self, offset: u16, data: &[u8]);
    /// Where its BAR is to be, and whether it answers there. `None`: it has none.
    fn bar(&self) -> Option<Bar>;
}

/// A memory BAR of 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    pub address: u32,
    /// The command register lets it answer.
    pub decoding: bool,
}
