//! What the guest's processors say about themselves: what KVM supports here, with APIC ids and a
//! topology of our own (one package, one thread per core), and without what the guest can't use.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::{CpuError, failed};

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const EXTENDED1_ECX_CMP_LEGACY: u32 = 1 << 1;
const EXTENDED1_ECX_SVM: u32 = 1 << 2;
const EXTENDED1_ECX_TOPOLOGY: u32 = 1 << 22;
const EXTENDED1_ECX_PERF_CORE: u32 = 1 << 23;
const EXTENDED1_ECX_PERF_NB: u32 = 1 << 24;
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// What KVM supports on this host, to be shaped for each vCPU.
pub fn supported(kvm: &Kvm) -> Result<Template, CpuError> {
    let cpuid =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("ask KVM which CPUID it supports"))?;
    Ok(Template { cpuid, tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer) })
}

pub struct Template {
    cpuid: CpuId,
    /// The in-kernel APIC emulates it, so that it is no matter whether the host's processor has it; with
    /// it a guest needs no calibration of its APIC timer.
    tsc_deadline: bool,
}

impl Template {
    /// CPUID of the vCPU with this APIC id, of so many.
    pub fn for_vcpu(&self, apic_id: u8, vcpus: u8) -> CpuId {
        let mut cpuid = self.cpuid.clone();
        let id = u32::from(apic_id);
        let count = u32::from(vcpus);
        // How many low bits of an APIC id number the cores of the package.
        let core_bits = count.next_power_of_two().trailing_zeros();
        for entry in cpuid.as_mut_slice() {
            shape(entry, id, count, core_bits, self.tsc_deadline);
        }
        cpuid
    }
}

fn shape(entry: &mut kvm_cpuid_entry2, id: u32, count: u32, core_bits: u32, tsc_deadline: bool) {
    match entry.function {
        0x1 => {
            entry.ebx = (entry.ebx & 0x0000_ffff) | (id << 24) | (count << 16);
            // No nested virtualisation: it is a large surface that guests here don't ask for.
            entry.ecx &= !LEAF1_ECX_VMX;
            entry.ecx |= LEAF1_ECX_HYPERVISOR;
            if tsc_deadline {
                entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
            }
            entry.edx = if count > 1 { entry.edx | LEAF1_EDX_HTT } else { entry.edx & !LEAF1_EDX_HTT };
        }
        // Caches (Intel): the first two levels belong to a core, the rest to the package.
        0x4 if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 0x7;
            let sharing = if level >= 3 { (1 << core_bits) - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | (((1 << core_bits) - 1) << 26);
        }
        // No performance counters: none are given to the guest, so it need not look for them.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0xb | 0x1f => {
            entry.edx = id;
            (entry.eax, entry.ebx, entry.ecx) = match entry.index {
                0 => (0, 1, LEVEL_THREAD << 8),
                1 => (core_bits, count, 1 | LEVEL_CORE << 8),
                index => (0, 0, index),
            };
        }
        0x8000_0001 => {
            entry.ecx &= !(EXTENDED1_ECX_SVM | EXTENDED1_ECX_PERF_CORE | EXTENDED1_ECX_PERF_NB);
            if entry.ecx & EXTENDED1_ECX_TOPOLOGY != 0 && count > 1 {
                entry.ecx |= EXTENDED1_ECX_CMP_LEGACY;
            }
        }
        0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | (core_bits << 12) | (count - 1),
        // Caches (AMD), as above.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 0x7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
        }
        0x8000_001e => {
            entry.eax = id;
            // One thread per core, one node.
            entry.ebx = (entry.ebx & !0xffff) | id;
            entry.ecx = 0;
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(entries: &[(u32, u32)]) -> Template {
        let entries: Vec<_> = entries
            .iter()
            .map(|&(function, index)| kvm_cpuid_entry2 {
                function,
                index,
                eax: 0x63,
                ebx: 0xffff_ffff,
                ecx: 0x7fff_ffff,
                edx: 0xffff_ffff,
                ..Default::default()
            })
            .collect();
        Template { cpuid: CpuId::from_entries(&entries).unwrap(), tsc_deadline: true }
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id_and_all_share_a_package() {
        let template = template(&[(1, 0), (0xb, 0), (0xb, 1), (0xb, 2), (0x8000_0008, 0), (0x8000_001e, 0)]);
        for (vcpus, bits) in [(1, 0), (2, 1), (3, 2), (16, 4)] {
            for id in 0..vcpus {
                let cpuid = template.for_vcpu(id, vcpus);
                let [one, thread, core, end, sizes, amd] = cpuid.as_slice() else { panic!() };
                let id = u32::from(id);
                assert_eq!(one.ebx >> 24, id);
                assert_eq!((one.ebx >> 16) & 0xff, u32::from(vcpus));
                assert_eq!((thread.eax, thread.ebx & 0xffff, thread.edx), (0, 1, id));
                assert_eq!((core.eax, core.ebx & 0xffff, core.edx), (bits, u32::from(vcpus), id));
                assert_eq!((end.ecx >> 8) & 0xff, 0, "no further level");
                assert_eq!(sizes.ecx & 0xff, u32::from(vcpus) - 1);
                assert_eq!(amd.eax, id);
            }
        }
    }

    #[test]
    fn guests_see_a_hypervisor_without_nesting_or_counters() {
        let template = template(&[(1, 0), (0xa, 0), (0x8000_0001, 0)]);
        let cpuid = template.for_vcpu(0, 1);
        let [one, counters, extended] = cpuid.as_slice() else { panic!() };
        assert_eq!(one.ecx & (LEAF1_ECX_VMX | LEAF1_ECX_HYPERVISOR), LEAF1_ECX_HYPERVISOR);
        assert_ne!(one.ecx & LEAF1_ECX_TSC_DEADLINE, 0);
        assert_eq!(one.edx & LEAF1_EDX_HTT, 0);
        assert_eq!((counters.eax, counters.edx), (0, 0));
        assert_eq!(extended.ecx & EXTENDED1_ECX_SVM, 0);
    }
}
