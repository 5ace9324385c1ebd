//! The machine: KVM's VM with its memory, interrupts, devices and vCPUs, and what can be done to it as
//! a whole. It decides nothing: the event loop ([`crate::vmm::supervisor`]) does, and owns it.
//!
//! ```text
//!   Built ── start ──▶ Machine: running ◀──▶ paused
//!                         │ reset (same process, same descriptors)
//!                         └ stop: vCPUs joined, devices quiet, disks flushed
//! ```

use std::io;
use std::os::fd::{FromRawFd as _, IntoRawFd as _, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_PMU_CAP_DISABLE, kvm_enable_cap, kvm_irqchip, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

mod backplane;
mod counts;
mod fixed;

use self::backplane::{Backplane, Buses, Class};
use self::fixed::Fixed;
use crate::vmm::acpi::{self, AcpiError};
use crate::vmm::boot::{BootError, BootFiles, BootSource, DiskLoader, Entry};
use crate::vmm::bus::{Bus, BusError};
use crate::vmm::config::{BootConfig, VmConfig};
use crate::vmm::console::Output;
use crate::vmm::cpu::topology::Topology;
use crate::vmm::cpu::{self, CpuError};
use crate::vmm::device::ThreadStart;
use crate::vmm::device::balloon::{BalloonError, BalloonHandle};
use crate::vmm::device::block::{Block, BlockError, BlockHandle};
use crate::vmm::device::net::{Net, NetError, NetHandle, NicFiles};
use crate::vmm::device::vsock::VsockFiles;
use crate::vmm::event::{EventSender, MachineEvent};
use crate::vmm::gate::{Gate, Order};
use crate::vmm::layout;
use crate::vmm::memory::{self, GuestMemory, MemoryError};
use crate::vmm::power;
use crate::vmm::serial::{Raised, SerialPort};
use crate::vmm::vcpu::{Shared, Vcpu, VcpuHandle};

/// How long a vCPU may take to leave the guest and obey: it may be waiting for a disk in a device.
const OBEY_TIMEOUT: Duration = Duration::from_secs(30);

/// What this VMM can't do without.
const CAPABILITIES: [(Cap, &str); 7] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
];

#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("this host's KVM lacks {0}")]
    Capability(&'static str),
    #[error("{what}: {source}")]
    Kvm {
        what: &'static str,
        #[source]
        source: kvm_ioctls::Error,
    },
    #[error("{0}")]
    Cpu(#[from] CpuError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("{0}")]
    Boot(#[from] BootError),
    #[error("{0}")]
    Acpi(#[from] AcpiError),
    #[error("{0}")]
    Bus(#[from] BusError),
    #[error("{what}: {source}")]
    Io {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("{0}: {source}", source = source_of(.0))]
    Disk(#[source] BlockError),
    #[error("{0}: {source}", source = source_of(.0))]
    Nic(#[source] NetError),
    #[error("{0}")]
    Balloon(#[source] BalloonError),
    #[error("{0:?} is no generation id: a UUID is wanted")]
    GenerationId(String),
    #[error("this machine was started without a generation id")]
    NoGenerationId,
    #[error("every slot for a device is taken")]
    NoFreeSlot,
    #[error("the vCPUs did not obey within {} s", OBEY_TIMEOUT.as_secs())]
    Stuck,
}

/// The causes of an error, in one line: a launcher gets text alone.
pub fn source_of(error: &dyn std::error::Error) -> String {
    let mut causes = Vec::new();
    let mut next = error.source();
    while let Some(cause) = next {
        causes.push(cause.to_string());
        next = cause.source();
    }
    if causes.is_empty() { "refused".to_owned() } else { causes.join(": ") }
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { what, source }
}

fn io(what: &'static str) -> impl FnOnce(io::Error) -> MachineError {
    move |source| MachineError::Io { what, source }
}

/// The open files that a machine is made of.
#[derive(Debug)]
pub struct MachineFiles {
    pub kvm: OwnedFd,
    /// Of a direct kernel boot.
    pub boot: Option<BootFiles>,
    /// In the order of `config.disks`: the image and its backing chain.
    pub disks: Vec<(OwnedFd, Vec<OwnedFd>)>,
    /// In the order of `config.nics`.
    pub nics: Vec<NicFiles>,
    /// If there is one in the configuration.
    pub vsock: Option<VsockFiles>,
}

/// What the event loop listens to.
pub struct Signals {
    pub events: mpsc::Receiver<MachineEvent>,
    pub events_wake: Arc<EventFd>,
    pub output: Arc<Output>,
    pub input_wanted: Arc<EventFd>,
}

/// All but the vCPU threads; nothing of the guest has run.
pub struct Built {
    machine: Machine,
    vcpus: Vec<Vcpu>,
    entry: Entry,
}

pub struct Machine {
    vm: Arc<VmFd>,
    memory: GuestMemory,
    memory_bytes: u64,
    apic_ids: Vec<u8>,
    /// `None` until the disks are there.
    boot: Option<BootSource>,
    gate: Arc<Gate>,
    vcpus: Vec<VcpuHandle>,
    serial: Arc<Mutex<SerialPort>>,
    backplane: Backplane,
    disks: Vec<Plugged<BlockHandle>>,
    nics: Vec<Plugged<NetHandle>>,
    fixed: Fixed,
    power_button: EventFd,
    interrupt_chips: Vec<kvm_irqchip>,
    /// Where devices say what the event loop must know.
    events: EventSender,
}

/// A disk or a NIC: its name, its place, and its control side.
struct Plugged<H> {
    name: String,
    slot: u8,
    handle: H,
}

impl Built {
    /// Makes the machine and loads its kernel. `start` is called on each device's thread. Credentials
    /// must have been dropped: threads inherit them.
    pub fn new(
        config: &VmConfig,
        files: MachineFiles,
        start: &ThreadStart,
    ) -> Result<(Self, Signals), MachineError> {
        // SAFETY: the descriptor is open and ours, and `Kvm` becomes its one owner. That it is KVM's is
        // for the first call to find out.
        let kvm_fd = unsafe { Kvm::from_raw_fd(files.kvm.into_raw_fd()) };
        for (capability, name) in CAPABILITIES {
            if !kvm_fd.check_extension(capability) {
                return Err(MachineError::Capability(name));
            }
        }
        let vm = Arc::new(kvm_fd.create_vm().map_err(kvm("create the VM"))?);
        let memory = memory::create_of(&layout::ram_ranges(config.memory_bytes), config.memory)?;
        register_memory(&vm, &memory)?;
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(kvm("place KVM's identity map"))?;
        vm.set_tss_address(layout::KVM_TSS).map_err(kvm("place KVM's task state segment"))?;
        vm.create_irq_chip().map_err(kvm("create the interrupt controllers"))?;
        let interrupt_chips = mask_interrupt_chips(&vm)?;

        let buses = Buses { pio: Arc::new(Bus::new()), mmio: Arc::new(Bus::new()) };
        let (serial, serial_signals) = make_serial(&vm, &buses.pio)?;
        let power_button = eventfd()?;
        vm.register_irqfd(&power_button, layout::POWER_BUTTON_GSI)
            .map_err(kvm("bind the power button's interrupt"))?;

        let (queue, events) = mpsc::channel();
        let events_wake = Arc::new(eventfd()?);
        let sender = EventSender { queue, wake: events_wake.clone() };
        let backplane = Backplane::new(config.machine, vm.clone(), memory.clone(), &buses, sender.clone())?;
        let fixed = Fixed::new(config, &vm, &buses, sender.clone())?;
        let gate = Arc::new(Gate::new(config.vcpus.into()));
        let shared = Shared { gate: gate.clone(), pio: buses.pio, mmio: buses.mmio, events: sender.clone() };
        let topology = Topology::new(&config.cpu, config.vcpus)?;
        let vcpus = make_vcpus(&kvm_fd, &vm, config, topology, &shared)?;

        let mut machine = Machine {
            vm,
            memory,
            memory_bytes: config.memory_bytes,
            apic_ids: topology.apic_ids(),
            boot: None,
            gate,
            vcpus: Vec::new(),
            serial,
            backplane,
            disks: Vec::new(),
            nics: Vec::new(),
            fixed,
            power_button,
            interrupt_chips,
            events: sender,
        };
        machine.add_devices(config, files.disks, files.nics, start)?;
        machine.fixed.add_devices(config, files.vsock, &mut machine.backplane, start)?;
        machine.boot = Some(machine.boot_source(&config.boot, files.boot, start)?);
        let entry = machine.load()?;
        let (output, input_wanted) = serial_signals;
        let signals = Signals { events, events_wake, output, input_wanted };
        Ok((Self { machine, vcpus, entry }, signals))
    }

    /// Starts the vCPU threads, each with `start` first, and brings them to the kernel's entry. They
    /// don't run the guest before [`Machine::resume`].
    pub fn start(
        self,
        start: impl Fn() -> io::Result<()> + Clone + Send + 'static,
    ) -> Result<Machine, MachineError> {
        let Self { mut machine, vcpus, entry } = self;
        for vcpu in vcpus {
            let handle = vcpu.spawn(start.clone()).map_err(io("start a vCPU's thread"))?;
            machine.vcpus.push(handle);
        }
        machine.order(Order::Reset(entry))?;
        Ok(machine)
    }
}

impl Machine {
    /// Puts everything that a guest starts from into its memory.
    fn load(&self) -> Result<Entry, MachineError> {
        let tables = acpi::Tables {
            apic_ids: &self.apic_ids,
            devices: self.backplane.acpi(),
            generation_id: self.fixed.has_generation_id(),
        };
        let rsdp = acpi::write_tables(&self.memory, tables)?;
        self.fixed.load(&self.memory)?;
        let boot = self.boot.as_ref().ok_or(BootError::NoKernel)?;
        let entry = boot.load(&self.memory, self.memory_bytes, rsdp)?;
        cpu::entry::write_gdt(&self.memory, entry).map_err(BootError::Memory)?;
        self.memory
            .write_slice(&power::RESET_VECTOR_CODE, GuestAddress(layout::RESET_VECTOR))
            .map_err(BootError::Memory)?;
        Ok(entry)
    }

    fn boot_source(
        &self,
        config: &BootConfig,
        files: Option<BootFiles>,
        start: &ThreadStart,
    ) -> Result<BootSource, MachineError> {
        match config {
            BootConfig::Kernel(_) => Ok(BootSource::Files(files.ok_or(BootError::NoKernel)?)),
            BootConfig::Disk(boot) => {
                let disk = self.disk(&boot.disk).cloned();
                let disk = disk.ok_or_else(|| BootError::NoSuchDisk { disk: boot.disk.clone() })?;
                let loader = DiskLoader::spawn(boot, disk, start);
                Ok(BootSource::Disk(loader.map_err(io("start the boot loader's thread"))?))
            }
        }
    }

    fn order(&self, order: Order) -> Result<(), MachineError> {
        self.gate.give(order);
        for vcpu in &self.vcpus {
            vcpu.kick();
        }
        if self.gate.wait_obeyed(OBEY_TIMEOUT) { Ok(()) } else { Err(MachineError::Stuck) }
    }

    /// Takes all vCPUs out of the guest.
    pub fn pause(&self) -> Result<(), MachineError> {
        self.order(Order::Park)
    }

    /// Lets all vCPUs run.
    pub fn resume(&self) -> Result<(), MachineError> {
        self.order(Order::Run)
    }

    /// Resets the machine; afterwards the vCPUs stand at the kernel's entry, parked. The kernel is read
    /// again from the same open files; interrupts and notifications stay bound.
    ///
    /// Devices that the guest was asked to let go of are gone afterwards: nothing of it uses them any more.
    /// Their names are the result.
    pub fn reset(&mut self) -> Result<Vec<String>, MachineError> {
        self.pause()?;
        let leaving = self.leaving();
        for device in &leaving {
            self.remove_device(device);
        }
        self.backplane.reset();
        lock(&self.serial).reset();
        self.fixed.reset();
        // Nothing of the guest runs now, nor does a device touch its memory.
        memory::clear(&self.memory)?;
        for chip in &self.interrupt_chips {
            self.vm.set_irqchip(chip).map_err(kvm("reset the interrupt controllers"))?;
        }
        let entry = self.load()?;
        self.order(Order::Reset(entry))?;
        Ok(leaving)
    }

    /// Ends the vCPUs, quiets the devices and flushes the disks. What couldn't be flushed is reported.
    pub fn stop(mut self) -> Result<(), MachineError> {
        self.order(Order::End)?;
        for vcpu in self.vcpus.drain(..) {
            vcpu.join();
        }
        self.backplane.reset();
        let mut first_error = Ok(());
        for disk in &self.disks {
            if let Err(error) = disk.handle.flush()
                && first_error.is_ok()
            {
                first_error = Err(MachineError::Disk(error));
            }
        }
        first_error
    }

    pub fn press_power_button(&self) -> io::Result<()> {
        self.power_button.write(1)
    }

    /// See [`SerialPort::raise_again`].
    pub fn raise_serial_again(&self) -> Raised {
        lock(&self.serial).raise_again()
    }

    /// Types into the serial port; gives how many bytes it took.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        lock(&self.serial).type_in(bytes)
    }

    /// In the order of the configuration's disks.
    pub fn disk_capacity_bytes(&self) -> Vec<u64> {
        self.disks.iter().map(|disk| disk.handle.capacity_bytes()).collect()
    }

    pub fn disk(&self, name: &str) -> Option<&BlockHandle> {
        self.disks.iter().find(|disk| disk.name == name).map(|disk| &disk.handle)
    }

    pub fn nic(&self, name: &str) -> Option<&NetHandle> {
        self.nics.iter().find(|nic| nic.name == name).map(|nic| &nic.handle)
    }

    pub fn balloon(&self) -> Option<&BalloonHandle> {
        self.fixed.balloon()
    }

    /// See [`crate::vmm::protocol::Verb::SetGenerationId`].
    pub fn set_generation_id(&mut self, id: &str) -> Result<(), MachineError> {
        self.fixed.set_generation_id(&self.memory, id)
    }

    /// Disks first, then NICs: the order in which the guest finds and names them.
    fn add_devices(
        &mut self,
        config: &VmConfig,
        disks: Vec<(OwnedFd, Vec<OwnedFd>)>,
        nics: Vec<NicFiles>,
        start: &ThreadStart,
    ) -> Result<(), MachineError> {
        for (disk, (file, backing)) in config.disks.iter().zip(disks) {
            let block =
                Block::new(disk, file, backing, start, self.events.clone()).map_err(MachineError::Disk)?;
            self.insert_disk(&disk.name, block)?;
        }
        for (nic, files) in config.nics.iter().zip(nics) {
            let net = Net::new(nic, files, start).map_err(MachineError::Nic)?;
            self.insert_nic(&nic.name, net)?;
        }
        Ok(())
    }

    fn insert_disk(&mut self, name: &str, block: Block) -> Result<u8, MachineError> {
        let handle = block.handle();
        let slot = self.backplane.insert(Class::Disk, Box::new(block))?;
        self.disks.push(Plugged { name: name.to_owned(), slot, handle });
        Ok(slot)
    }

    fn insert_nic(&mut self, name: &str, net: Net) -> Result<u8, MachineError> {
        let handle = net.handle();
        let slot = self.backplane.insert(Class::Nic, Box::new(net))?;
        self.nics.push(Plugged { name: name.to_owned(), slot, handle });
        Ok(slot)
    }

    /// For devices that are made to be plugged in.
    pub fn events(&self) -> EventSender {
        self.events.clone()
    }

    /// Whether devices may come and go while the guest runs.
    pub fn can_hotplug(&self) -> bool {
        self.backplane.can_hotplug()
    }

    /// Plugs a disk into the running machine, and tells the guest.
    pub fn plug_disk(&mut self, name: &str, block: Block) -> Result<(), MachineError> {
        let slot = self.insert_disk(name, block)?;
        self.backplane.announce(slot);
        Ok(())
    }

    /// Plugs a NIC into the running machine, and tells the guest.
    pub fn plug_nic(&mut self, name: &str, net: Net) -> Result<(), MachineError> {
        let slot = self.insert_nic(name, net)?;
        self.backplane.announce(slot);
        Ok(())
    }

    fn slots(&self) -> impl Iterator<Item = (&str, u8)> {
        let disks = self.disks.iter().map(|disk| (disk.name.as_str(), disk.slot));
        disks.chain(self.nics.iter().map(|nic| (nic.name.as_str(), nic.slot)))
    }

    /// Asks the guest to let go of a disk or a NIC; false if there is none of this name. The guest's answer
    /// is [`MachineEvent::Ejected`].
    pub fn ask_to_eject(&self, device: &str) -> bool {
        let slot = self.slots().find(|&(name, _)| name == device).map(|(_, slot)| slot);
        if let Some(slot) = slot {
            self.backplane.ask_to_eject(slot);
        }
        slot.is_some()
    }

    /// The disks and NICs that the guest was asked to let go of, and hasn't.
    fn leaving(&self) -> Vec<String> {
        let leaving = self.slots().filter(|&(_, slot)| self.backplane.is_leaving(slot));
        leaving.map(|(name, _)| name.to_owned()).collect()
    }

    /// The guest has let go of what is in this slot: it is taken out, and its name given.
    pub fn ejected(&mut self, slot: u8) -> Option<String> {
        let device = self.slots().find(|&(_, other)| other == slot).map(|(name, _)| name.to_owned())?;
        self.remove_device(&device);
        Some(device)
    }

    /// Takes a disk or a NIC out. A disk is flushed and its files are closed.
    fn remove_device(&mut self, device: &str) {
        let slot = self.slots().find(|&(name, _)| name == device).map(|(_, slot)| slot);
        self.disks.retain(|disk| disk.name != device);
        self.nics.retain(|nic| nic.name != device);
        if let Some(slot) = slot {
            self.backplane.remove(slot);
        }
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A device whose lock is poisoned panicked, and a panic ends the process.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn eventfd() -> Result<EventFd, MachineError> {
    EventFd::new(EFD_NONBLOCK).map_err(io("make an event descriptor"))
}

fn register_memory(vm: &VmFd, memory: &GuestMemory) -> Result<(), MachineError> {
    for (slot, region) in memory.iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is a mapping of ours that is never unmapped (see memory).
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm("give the guest its memory"))?;
    }
    Ok(())
}

/// The state of the interrupt controllers at the start and at each reset.
///
/// ACPI tells the guest that there are no 8259s, so it doesn't set them up; but KVM's have all inputs open
/// and their vectors from 0 on. An interrupt before the guest has its IO-APIC (a device is plugged in while it
/// boots, a key is typed) would then come as the exception of that number. So they start masked.
fn mask_interrupt_chips(vm: &VmFd) -> Result<Vec<kvm_irqchip>, MachineError> {
    [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
        .into_iter()
        .map(|chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(kvm("read the interrupt controllers"))?;
            if chip_id != KVM_IRQCHIP_IOAPIC {
                chip.chip.pic.imr = 0xff;
                vm.set_irqchip(&chip).map_err(kvm("mask the 8259s"))?;
            }
            Ok(chip)
        })
        .collect()
}

type SerialSignals = (Arc<Output>, Arc<EventFd>);

fn make_serial(vm: &VmFd, pio: &Bus) -> Result<(Arc<Mutex<SerialPort>>, SerialSignals), MachineError> {
    let interrupt = Arc::new(eventfd()?);
    vm.register_irqfd(&interrupt, layout::SERIAL_GSI).map_err(kvm("bind the serial port's interrupt"))?;
    let output = Output::new(eventfd()?);
    let input_wanted = Arc::new(eventfd()?);
    let serial = SerialPort::new(interrupt, input_wanted.clone(), output.clone());
    let serial = Arc::new(Mutex::new(serial));
    pio.insert(layout::SERIAL_PORT.into(), layout::SERIAL_PORTS.into(), serial.clone())?;
    Ok((serial, (output, input_wanted)))
}

fn make_vcpus(
    kvm_fd: &Kvm,
    vm: &VmFd,
    config: &VmConfig,
    topology: Topology,
    shared: &Shared,
) -> Result<Vec<Vcpu>, MachineError> {
    let template = cpu::cpuid::supported(kvm_fd, config.cpu.model)?;
    let msr_indices = cpu::state::msr_indices(kvm_fd)?;
    let pinning = &config.cpu.pinning;
    if pinning.len() > usize::from(config.vcpus) {
        return Err(CpuError::Pinning { pinned: pinning.len(), vcpus: config.vcpus }.into());
    }
    // Without counters KVM has less to switch. A KVM that has no such choice gives none by CPUID alone.
    let no_counters = kvm_enable_cap {
        cap: KVM_CAP_PMU_CAPABILITY,
        args: [KVM_PMU_CAP_DISABLE.into(), 0, 0, 0],
        ..Default::default()
    };
    let _ = vm.enable_cap(&no_counters);
    (0..config.vcpus)
        .map(|index| {
            // KVM takes the number for the APIC id.
            let fd = vm.create_vcpu(topology.apic_id(index).into()).map_err(kvm("create a vCPU"))?;
            let cpuid = template.for_vcpu(index, topology, fd.get_tsc_khz().ok())?;
            let vcpu = Vcpu::new(fd, index, &cpuid, &msr_indices, shared.clone())?;
            Ok(vcpu.pinned_to(pinning.get(usize::from(index)).cloned().unwrap_or_default()))
        })
        .collect()
}
