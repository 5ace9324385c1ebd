//! What a machine has from its start to its end, beside its disks and NICs: pvpanic, the generation id,
//! and the virtio devices of which there is one.

use std::sync::{Arc, Mutex};

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::backplane::{Backplane, Buses, Class};
use super::{MachineError, eventfd, io, kvm, lock};
use crate::vmm::boot::BootError;
use crate::vmm::config::VmConfig;
use crate::vmm::device::ThreadStart;
use crate::vmm::device::balloon::{Balloon, BalloonHandle};
use crate::vmm::device::entropy::Entropy;
use crate::vmm::device::vsock::{Vsock, VsockFiles};
use crate::vmm::event::EventSender;
use crate::vmm::generation_id::GenerationId;
use crate::vmm::layout;
use crate::vmm::memory::GuestMemory;
use crate::vmm::metrics::{EntropyCounters, Metrics, VsockCounters};
use crate::vmm::pvpanic::Pvpanic;

pub struct Fixed {
    pvpanic: Arc<Mutex<Pvpanic>>,
    generation: Option<Generation>,
    balloon: Option<BalloonHandle>,
    vsock: Option<Arc<VsockCounters>>,
    entropy: Option<Arc<EntropyCounters>>,
}

struct Generation {
    id: GenerationId,
    /// Tells the guest that it changed.
    changed: EventFd,
}

impl Fixed {
    pub fn new(
        config: &VmConfig,
        vm: &VmFd,
        buses: &Buses,
        events: EventSender,
    ) -> Result<Self, MachineError> {
        let pvpanic = Arc::new(Mutex::new(Pvpanic::new(events)));
        buses.pio.insert(layout::PVPANIC_PORT.into(), layout::PVPANIC_PORTS.into(), pvpanic.clone())?;
        let generation = match &config.generation_id {
            None => None,
            Some(text) => {
                let id = parse_generation(text)?;
                let changed = eventfd()?;
                vm.register_irqfd(&changed, layout::GENERATION_ID_GSI)
                    .map_err(kvm("bind the generation id's interrupt"))?;
                Some(Generation { id, changed })
            }
        };
        Ok(Self { pvpanic, generation, balloon: None, vsock: None, entropy: None })
    }

    /// Puts the virtio devices behind all others: the order in which a guest names disks and NICs must not
    /// depend on them.
    pub fn add_devices(
        &mut self,
        config: &VmConfig,
        vsock: Option<VsockFiles>,
        backplane: &mut Backplane,
        start: &ThreadStart,
    ) -> Result<(), MachineError> {
        let entropy = Entropy::new(config.entropy, start).map_err(io("start the entropy device's thread"))?;
        self.entropy = Some(entropy.counters());
        backplane.insert(Class::Fixed, Box::new(entropy))?;
        if let Some(balloon) = config.balloon {
            let balloon = Balloon::new(balloon, config.memory_bytes, config.memory.pages, start)
                .map_err(MachineError::Balloon)?;
            self.balloon = Some(balloon.handle());
            backplane.insert(Class::Fixed, Box::new(balloon))?;
        }
        if let (Some(vsock), Some(files)) = (config.vsock, vsock) {
            let vsock = Vsock::new(vsock, files, start).map_err(io("make the vsock device"))?;
            self.vsock = Some(vsock.counters());
            backplane.insert(Class::Fixed, Box::new(vsock))?;
        }
        Ok(())
    }

    pub fn has_generation_id(&self) -> bool {
        self.generation.is_some()
    }

    /// Puts into the guest's memory what it finds there at its start.
    pub fn load(&self, memory: &GuestMemory) -> Result<(), MachineError> {
        match &self.generation {
            Some(generation) => Ok(generation.id.write(memory).map_err(BootError::Memory)?),
            None => Ok(()),
        }
    }

    pub fn reset(&self) {
        lock(&self.pvpanic).reset();
    }

    /// The guest's state is another one from now on, and it is told so.
    pub fn set_generation_id(&mut self, memory: &GuestMemory, text: &str) -> Result<(), MachineError> {
        let id = parse_generation(text)?;
        let Some(generation) = &mut self.generation else { return Err(MachineError::NoGenerationId) };
        if generation.id == id {
            return Ok(());
        }
        generation.id = id;
        id.write(memory).map_err(BootError::Memory)?;
        generation.changed.write(1).map_err(io("announce the generation id"))
    }

    pub fn balloon(&self) -> Option<&BalloonHandle> {
        self.balloon.as_ref()
    }

    pub fn count(&self, metrics: &mut Metrics) {
        metrics.balloon = self.balloon.as_ref().map(|balloon| balloon.counters().snapshot());
        metrics.vsock = self.vsock.as_ref().map(|vsock| vsock.snapshot());
        metrics.entropy = self.entropy.as_ref().map(|entropy| entropy.snapshot()).unwrap_or_default();
    }
}

fn parse_generation(text: &str) -> Result<GenerationId, MachineError> {
    GenerationId::parse(text).ok_or_else(|| MachineError::GenerationId(text.to_owned()))
}
