//! KVM's table of interrupt routes: which global system interrupt (GSI) is which input of the interrupt
//! controllers, and which is which message.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::layout;
use super::pci::msix::{Message, MessageRoutes};

/// Inputs of each of the two 8259s.
const PIC_INPUTS: u32 = 8;

/// All routes of one VM. KVM replaces its table as a whole, so there is one owner of it.
pub struct Routes {
    vm: Arc<VmFd>,
    /// The messages, by GSI. The inputs of the interrupt controllers are always there.
    messages: Mutex<BTreeMap<u32, Message>>,
}

impl Routes {
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, messages: Mutex::new(BTreeMap::new()) }
    }
}

impl MessageRoutes for Routes {
    fn set_route(&self, gsi: u32, message: Message) -> io::Result<()> {
        // Held over the system call, so that no older table overwrites a newer one.
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.insert(gsi, message);
        let entries: Vec<_> =
            inputs().chain(messages.iter().map(|(&gsi, message)| msi(gsi, *message))).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| io::ErrorKind::OutOfMemory)?;
        self.vm.set_gsi_routing(&table).map_err(to_io)
    }

    fn connect(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
        self.vm.register_irqfd(event, gsi).map_err(to_io)
    }

    fn disconnect(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
        self.vm.unregister_irqfd(event, gsi).map_err(to_io)
    }
}

fn to_io(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// What KVM starts with: GSI n is input n of the IO-APIC and, for the first sixteen, of the 8259s.
fn inputs() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let pic = (0..2 * PIC_INPUTS).map(|gsi| {
        let chip = if gsi < PIC_INPUTS { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
        input(gsi, chip, gsi % PIC_INPUTS)
    });
    pic.chain((0..layout::IO_APIC_INPUTS).map(|gsi| input(gsi, KVM_IRQCHIP_IOAPIC, gsi)))
}

fn input(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip: kvm_irq_routing_irqchip { irqchip, pin } },
        ..Default::default()
    }
}

fn msi(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}
