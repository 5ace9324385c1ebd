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
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::acpi::{self, AcpiError};
use super::boot::{self, BootError, BootFiles, Entry};
use super::bus::{Bus, BusError};
use super::config::VmConfig;
use super::console::Output;
use super::cpu::{self, CpuError};
use super::device::ThreadStart;
use super::device::block::{Block, BlockError, BlockHandle};
use super::device::entropy::Entropy;
use super::device::net::{Net, NetError, NetHandle};
use super::event::{EventSender, MachineEvent};
use super::gate::{Gate, Order};
use super::layout;
use super::memory::{self, GuestMemory, MemoryError};
use super::power;
use super::serial::SerialPort;
use super::transport::VirtioDevice;
use super::transport::mmio::MmioTransport;
use super::vcpu::{Shared, Vcpu, VcpuHandle};

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
    #[error("{0}")]
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
    pub boot: BootFiles,
    /// In the order of `config.disks`: the image and its backing chain.
    pub disks: Vec<(OwnedFd, Vec<OwnedFd>)>,
    /// In the order of `config.nics`.
    pub taps: Vec<OwnedFd>,
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
    vm: VmFd,
    memory: GuestMemory,
    memory_bytes: u64,
    vcpu_count: u8,
    boot: BootFiles,
    gate: Arc<Gate>,
    vcpus: Vec<VcpuHandle>,
    serial: Arc<Mutex<SerialPort>>,
    transports: Vec<Arc<Mutex<MmioTransport>>>,
    disks: Vec<(String, BlockHandle)>,
    nics: Vec<(String, NetHandle)>,
    power_button: EventFd,
    interrupt_chips: Vec<kvm_irqchip>,
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
        let vm = kvm_fd.create_vm().map_err(kvm("create the VM"))?;
        let memory = memory::create_of(&layout::ram_ranges(config.memory_bytes), config.memory)?;
        register_memory(&vm, &memory)?;
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(kvm("place KVM's identity map"))?;
        vm.set_tss_address(layout::KVM_TSS).map_err(kvm("place KVM's task state segment"))?;
        vm.create_irq_chip().map_err(kvm("create the interrupt controllers"))?;
        let interrupt_chips = save_interrupt_chips(&vm)?;

        let (pio, serial, serial_signals) = make_serial(&vm)?;
        let power_button = eventfd()?;
        vm.register_irqfd(&power_button, layout::POWER_BUTTON_GSI)
            .map_err(kvm("bind the power button's interrupt"))?;

        let mut devices = Devices { vm: &vm, memory: &memory, mmio: Bus::new(), transports: Vec::new() };
        let (disks, nics) = make_devices(config, files.disks, files.taps, start, &mut devices)?;
        let Devices { mmio, transports, .. } = devices;

        let (queue, events) = mpsc::channel();
        let events_wake = Arc::new(eventfd()?);
        let gate = Arc::new(Gate::new(config.vcpus.into()));
        let shared = Shared {
            gate: gate.clone(),
            pio: Arc::new(pio),
            mmio: Arc::new(mmio),
            events: EventSender { queue, wake: events_wake.clone() },
        };
        let vcpus = make_vcpus(&kvm_fd, &vm, config.vcpus, &shared)?;

        let machine = Machine {
            vm,
            memory,
            memory_bytes: config.memory_bytes,
            vcpu_count: config.vcpus,
            boot: files.boot,
            gate,
            vcpus: Vec::new(),
            serial,
            transports,
            disks,
            nics,
            power_button,
            interrupt_chips,
        };
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
        let rsdp = acpi::write_tables(&self.memory, self.vcpu_count, self.transports.len())?;
        let entry = boot::load(&self.memory, self.memory_bytes, &self.boot, rsdp)?;
        cpu::entry::write_gdt(&self.memory, entry).map_err(BootError::Memory)?;
        self.memory
            .write_slice(&power::RESET_VECTOR_CODE, GuestAddress(layout::RESET_VECTOR))
            .map_err(BootError::Memory)?;
        Ok(entry)
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
    pub fn reset(&self) -> Result<(), MachineError> {
        self.pause()?;
        for transport in &self.transports {
            lock(transport).reset();
        }
        lock(&self.serial).reset();
        // Nothing of the guest runs now, nor does a device touch its memory.
        memory::clear(&self.memory)?;
        for chip in &self.interrupt_chips {
            self.vm.set_irqchip(chip).map_err(kvm("reset the interrupt controllers"))?;
        }
        let entry = self.load()?;
        self.order(Order::Reset(entry))
    }

    /// Ends the vCPUs, quiets the devices and flushes the disks. What couldn't be flushed is reported.
    pub fn stop(mut self) -> Result<(), MachineError> {
        self.order(Order::End)?;
        for vcpu in self.vcpus.drain(..) {
            vcpu.join();
        }
        for transport in &self.transports {
            lock(transport).reset();
        }
        let mut first_error = Ok(());
        for (_, disk) in &self.disks {
            if let Err(error) = disk.flush()
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
    pub fn raise_serial_again(&self) -> bool {
        lock(&self.serial).raise_again()
    }

    /// Types into the serial port; gives how many bytes it took.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        lock(&self.serial).type_in(bytes)
    }

    /// In the order of the configuration's disks.
    pub fn disk_capacity_bytes(&self) -> Vec<u64> {
        self.disks.iter().map(|(_, disk)| disk.capacity_bytes()).collect()
    }

    pub fn disk(&self, name: &str) -> Option<&BlockHandle> {
        self.disks.iter().find_map(|(disk, handle)| (disk == name).then_some(handle))
    }

    pub fn nic(&self, name: &str) -> Option<&NetHandle> {
        self.nics.iter().find_map(|(nic, handle)| (nic == name).then_some(handle))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
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

fn save_interrupt_chips(vm: &VmFd) -> Result<Vec<kvm_irqchip>, MachineError> {
    [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
        .into_iter()
        .map(|chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(kvm("read the interrupt controllers"))?;
            Ok(chip)
        })
        .collect()
}

type SerialSignals = (Arc<Output>, Arc<EventFd>);

fn make_serial(vm: &VmFd) -> Result<(Bus, Arc<Mutex<SerialPort>>, SerialSignals), MachineError> {
    let interrupt = Arc::new(eventfd()?);
    vm.register_irqfd(&interrupt, layout::SERIAL_GSI).map_err(kvm("bind the serial port's interrupt"))?;
    let output = Output::new(eventfd()?);
    let input_wanted = Arc::new(eventfd()?);
    let serial = SerialPort::new(interrupt, input_wanted.clone(), output.clone());
    let serial = Arc::new(Mutex::new(serial));
    let mut pio = Bus::new();
    pio.insert(layout::SERIAL_PORT.into(), layout::SERIAL_PORTS.into(), serial.clone())?;
    Ok((pio, serial, (output, input_wanted)))
}

/// Puts virtio devices into their slots.
struct Devices<'a> {
    vm: &'a VmFd,
    memory: &'a GuestMemory,
    mmio: Bus,
    transports: Vec<Arc<Mutex<MmioTransport>>>,
}

impl Devices<'_> {
    fn add(&mut self, device: Box<dyn VirtioDevice>) -> Result<(), MachineError> {
        let slot = self.transports.len();
        let address = layout::virtio_address(slot);
        let transport =
            MmioTransport::new(device, self.memory.clone()).map_err(io("make a virtio device"))?;
        self.vm
            .register_irqfd(transport.irq(), layout::virtio_gsi(slot))
            .map_err(kvm("bind a device's interrupt"))?;
        for notifier in transport.notifiers() {
            let at = IoEventAddress::Mmio(address + notifier.offset);
            self.vm
                .register_ioevent(notifier.event, &at, notifier.datamatch)
                .map_err(kvm("bind a device's notification"))?;
        }
        let transport = Arc::new(Mutex::new(transport));
        self.mmio.insert(address, layout::VIRTIO_MMIO_BYTES, transport.clone())?;
        self.transports.push(transport);
        Ok(())
    }
}

type Handles = (Vec<(String, BlockHandle)>, Vec<(String, NetHandle)>);

/// Disks first, then NICs, then the entropy device: the order in which the guest finds and names them.
fn make_devices(
    config: &VmConfig,
    disk_files: Vec<(OwnedFd, Vec<OwnedFd>)>,
    taps: Vec<OwnedFd>,
    start: &ThreadStart,
    devices: &mut Devices<'_>,
) -> Result<Handles, MachineError> {
    let mut disks = Vec::with_capacity(disk_files.len());
    for (disk, (file, backing)) in config.disks.iter().zip(disk_files) {
        let block = Block::new(disk, file, backing, start).map_err(MachineError::Disk)?;
        disks.push((disk.name.clone(), block.handle()));
        devices.add(Box::new(block))?;
    }
    let mut nics = Vec::with_capacity(taps.len());
    for (nic, tap) in config.nics.iter().zip(taps) {
        let net = Net::new(nic, tap, start).map_err(MachineError::Nic)?;
        nics.push((nic.name.clone(), net.handle()));
        devices.add(Box::new(net))?;
    }
    let entropy = Entropy::new(start).map_err(io("start the entropy device's thread"))?;
    devices.add(Box::new(entropy))?;
    Ok((disks, nics))
}

fn make_vcpus(kvm_fd: &Kvm, vm: &VmFd, count: u8, shared: &Shared) -> Result<Vec<Vcpu>, MachineError> {
    let template = cpu::cpuid::supported(kvm_fd)?;
    let msr_indices = cpu::state::msr_indices(kvm_fd)?;
    (0..count)
        .map(|index| {
            let fd = vm.create_vcpu(index.into()).map_err(kvm("create a vCPU"))?;
            let cpuid = template.for_vcpu(index, count);
            Ok(Vcpu::new(fd, index, &cpuid, &msr_indices, shared.clone())?)
        })
        .collect()
}
