//! The state of a vCPU right after its creation, kept so that a reset can bring it back: KVM has no
//! call that resets a vCPU.

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};

use super::{CpuError, failed};

const MSR_TSC: u32 = 0x10;
const MSR_TSC_ADJUST: u32 = 0x3b;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEFAULT: u32 = 0x2ff;
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs on, all memory write-back.
const MTRR_DEFAULT_WRITE_BACK: u64 = 1 << 11 | 6;

/// Offsets in the local APIC's register page, and the delivery modes that a PC's firmware leaves there.
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const DELIVER_EXTINT: u32 = 7 << 8;
const DELIVER_NMI: u32 = 4 << 8;

/// The registers that KVM can save and restore, as their numbers.
pub fn msr_indices(kvm: &Kvm) -> Result<Vec<u32>, CpuError> {
    let list = kvm.get_msr_index_list().map_err(failed("ask KVM for its list of MSRs"))?;
    // The TSC goes on counting through a reset: setting it on one vCPU after another would set them
    // apart.
    let kept = |&index: &u32| index != MSR_TSC && index != MSR_TSC_ADJUST;
    Ok(list.as_slice().iter().copied().filter(kept).collect())
}

/// What firmware would have set up: called once, after CPUID and before [`InitialState::save`].
pub fn prepare(vcpu: &VcpuFd) -> Result<(), CpuError> {
    for (index, data) in
        [(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (MSR_MTRR_DEFAULT, MTRR_DEFAULT_WRITE_BACK)]
    {
        // Not all processors have each of them, and none is needed.
        set_msrs(vcpu, &[kvm_msr_entry { index, data, ..Default::default() }])?;
    }
    let mut lapic = vcpu.get_lapic().map_err(failed("read the local APIC"))?;
    set_apic_register(&mut lapic, APIC_LVT_LINT0, DELIVER_EXTINT);
    set_apic_register(&mut lapic, APIC_LVT_LINT1, DELIVER_NMI);
    vcpu.set_lapic(&lapic).map_err(failed("set the local APIC"))
}

fn set_apic_register(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (register, byte) in lapic.regs[offset..offset + 4].iter_mut().zip(value.to_le_bytes()) {
        *register = byte as _;
    }
}

/// Sets the MSRs that can be set, one after another; those that can't stay as they are.
fn set_msrs(vcpu: &VcpuFd, mut entries: &[kvm_msr_entry]) -> Result<(), CpuError> {
    while !entries.is_empty() {
        // The list is never longer than KVM's own.
        let Ok(msrs) = Msrs::from_entries(entries) else { return Ok(()) };
        let set = vcpu.set_msrs(&msrs).map_err(failed("set MSRs"))?;
        entries = entries.get(set + 1..).unwrap_or_default();
    }
    Ok(())
}

fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, CpuError> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let entries: Vec<_> =
            rest.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let Ok(mut msrs) = Msrs::from_entries(&entries) else { return Ok(found) };
        let got = vcpu.get_msrs(&mut msrs).map_err(failed("read MSRs"))?;
        found.extend_from_slice(&msrs.as_slice()[..got]);
        rest = rest.get(got + 1..).unwrap_or_default();
    }
    Ok(found)
}

pub struct InitialState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    lapic: Box<kvm_lapic_state>,
    msrs: Vec<kvm_msr_entry>,
    mp_state: kvm_mp_state,
}

impl InitialState {
    /// `first`: whether this is the vCPU that boots the others.
    pub fn save(vcpu: &VcpuFd, msr_indices: &[u32], first: bool) -> Result<Self, CpuError> {
        let mp_state = if first { KVM_MP_STATE_RUNNABLE } else { KVM_MP_STATE_UNINITIALIZED };
        Ok(Self {
            regs: vcpu.get_regs().map_err(failed("read registers"))?,
            sregs: vcpu.get_sregs().map_err(failed("read special registers"))?,
            xsave: Box::new(vcpu.get_xsave().map_err(failed("read the extended state"))?),
            xcrs: vcpu.get_xcrs().map_err(failed("read the extended control registers"))?,
            debug: vcpu.get_debug_regs().map_err(failed("read debug registers"))?,
            events: vcpu.get_vcpu_events().map_err(failed("read pending events"))?,
            lapic: Box::new(vcpu.get_lapic().map_err(failed("read the local APIC"))?),
            msrs: get_msrs(vcpu, msr_indices)?,
            mp_state: kvm_mp_state { mp_state },
        })
    }

    /// Brings the vCPU back to this state.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), CpuError> {
        // The order matters: the special registers hold the APIC's mode, which must be right before its
        // registers are; and a vCPU that waits for a start-up message must have its registers first.
        vcpu.set_regs(&self.regs).map_err(failed("reset registers"))?;
        vcpu.set_sregs(&self.sregs).map_err(failed("reset special registers"))?;
        // SAFETY: no dynamic extended feature is ever enabled for this process, so the state that KVM
        // reads is no larger than `kvm_xsave`.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(failed("reset the extended state"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(failed("reset the extended control registers"))?;
        set_msrs(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events).map_err(failed("reset pending events"))?;
        vcpu.set_lapic(&self.lapic).map_err(failed("reset the local APIC"))?;
        vcpu.set_debug_regs(&self.debug).map_err(failed("reset debug registers"))?;
        vcpu.set_mp_state(self.mp_state).map_err(failed("reset the run state"))
    }
}
