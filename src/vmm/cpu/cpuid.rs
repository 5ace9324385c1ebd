//! What the guest's processors say about themselves: what KVM supports here, brought to the guest's
//! model, with a topology of our own, and without what the guest can't use.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::model;
use super::topology::Topology;
use super::{CpuError, failed};
use crate::vmm::config::CpuModel;

const LEAF1_ECX_DTES64: u32 = 1 << 2;
const LEAF1_ECX_MONITOR: u32 = 1 << 3;
const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_SMX: u32 = 1 << 6;
const LEAF1_ECX_PDCM: u32 = 1 << 15;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_DS: u32 = 1 << 21;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const LEAF6_EAX_ARAT: u32 = 1 << 2;
const LEAF7_EBX_SGX: u32 = 1 << 2;
const LEAF7_EBX_PT: u32 = 1 << 25;
const LEAF7_ECX_SGX_LC: u32 = 1 << 30;
const LEAF7_EDX_HYBRID: u32 = 1 << 15;
const LEAF7_EDX_ARCH_LBR: u32 = 1 << 19;
const LEAF7_EDX_AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
const XCR0_AMX: u32 = 1 << 17 | 1 << 18;
const EXTENDED1_ECX_CMP_LEGACY: u32 = 1 << 1;
const EXTENDED1_ECX_SVM: u32 = 1 << 2;
const EXTENDED1_ECX_IBS: u32 = 1 << 10;
const EXTENDED1_ECX_SKINIT: u32 = 1 << 12;
const EXTENDED1_ECX_TOPOLOGY: u32 = 1 << 22;
/// PERFCTR_CORE, PERFCTR_NB, PERFTSC, PERFCTR_LLC.
const EXTENDED1_ECX_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 27 | 1 << 28;
const EXTENDED1_ECX_MWAITX: u32 = 1 << 29;
/// EBX of leaf 0 for `AuthenticAMD` and `HygonGenuine`.
const AMD: u32 = u32::from_le_bytes(*b"Auth");
const HYGON: u32 = u32::from_le_bytes(*b"Hygo");
const EXTENDED_TOPOLOGY: u32 = 0x8000_001e;
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;
const TOPOLOGY: u32 = 0xb;
const HYPERVISOR: u32 = 0x4000_0000;
const PARAVIRTUAL: u32 = 0x4000_0001;
const TIMING: u32 = 0x4000_0010;
/// KVM emulates an APIC whose timer counts nanoseconds.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// What of KVM's paravirtual features needs nothing of us: kvmclock (old, new, and that it is stable),
/// no I/O delays, asynchronous page faults (and at exits, and by interrupt), steal time, PV EOI, PV
/// unhalt, TLB flushes, IPIs, halt polling under the guest's control, and yielding to another vCPU.
/// Features to come may need us.
const PARAVIRTUAL_KEPT: u32 = 1 << 0
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 7
    | 1 << 9
    | 1 << 10
    | 1 << 11
    | 1 << 12
    | 1 << 13
    | 1 << 14
    | 1 << 24;

/// Leaves of what no guest gets: SGX, processor trace, hybrid cores, last branch records, counters (0x23),
/// SVM, instruction sampling, encrypted guests, counters and topology again (AMD). The host's topology
/// (0xb, 0x1f) is not the guest's.
const NEVER: [u32; 14] = [
    0xb,
    0x12,
    0x14,
    0x1a,
    0x1c,
    0x1f,
    0x23,
    0x8000_000a,
    0x8000_001b,
    0x8000_001c,
    0x8000_001f,
    0x8000_0020,
    0x8000_0022,
    0x8000_0026,
];

/// What a guest of this model sees on this host, to be shaped for each vCPU.
pub fn supported(kvm: &Kvm, model: CpuModel) -> Result<Template, CpuError> {
    let cpuid =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("ask KVM which CPUID it supports"))?;
    Template::new(cpuid.as_slice().to_vec(), model, kvm.check_extension(Cap::TscDeadlineTimer))
}

pub struct Template {
    entries: Vec<kvm_cpuid_entry2>,
}

impl Template {
    /// `tsc_deadline`: the in-kernel APIC emulates it, so that it is no matter whether the host's
    /// processor has it; with it a guest needs no calibration of its APIC timer.
    fn new(
        mut entries: Vec<kvm_cpuid_entry2>,
        model: CpuModel,
        tsc_deadline: bool,
    ) -> Result<Self, CpuError> {
        model::apply(model, &mut entries)?;
        let amx = entries
            .iter()
            .any(|entry| entry.function == 0xd && entry.index == 0 && entry.eax & XCR0_AMX == XCR0_AMX);
        entries.retain(|entry| {
            !NEVER.contains(&entry.function) && (amx || !matches!(entry.function, 0x1d | 0x1e))
        });
        for entry in &mut entries {
            normalise(entry, amx, tsc_deadline);
        }
        offer_topology(&mut entries);
        Ok(Self { entries })
    }

    /// CPUID of one vCPU. `tsc_khz`: how fast its TSC runs, if that is known.
    pub fn for_vcpu(&self, vcpu: u8, topology: Topology, tsc_khz: Option<u32>) -> Result<CpuId, CpuError> {
        let mut entries = self.entries.clone();
        let id = u32::from(topology.apic_id(vcpu));
        for entry in &mut entries {
            place(entry, id, topology);
        }
        // Processors that end before it have one thread, or tell by other leaves.
        if entries.iter().any(|entry| entry.function == 0 && entry.eax >= TOPOLOGY) {
            entries.extend(topology_leaves(id, topology));
        }
        if let Some(tsc_khz) = tsc_khz
            && let Some(signature) = entries.iter_mut().find(|entry| entry.function == HYPERVISOR)
        {
            // Not leaf 0x15: its crystal would have to be the APIC's 1 GHz, and Linux multiplies that with
            // the ratio in 32 bits. Where there is kvmclock, it takes the frequency from there, too.
            signature.eax = TIMING;
            entries.push(kvm_cpuid_entry2 {
                function: TIMING,
                eax: tsc_khz,
                ebx: APIC_BUS_KHZ,
                ..Default::default()
            });
        }
        CpuId::from_entries(&entries).map_err(|_| CpuError::CpuidTooLong { entries: entries.len() })
    }
}

/// Takes away what guests never have, whatever their model, and adds what they always have.
fn normalise(entry: &mut kvm_cpuid_entry2, amx: bool, tsc_deadline: bool) {
    match (entry.function, entry.index) {
        (0x1, _) => {
            // No nested virtualisation: it is a large surface that guests here don't ask for. No waiting by
            // MWAIT, which would keep a processor of the host from others.
            entry.ecx &=
                !(LEAF1_ECX_DTES64 | LEAF1_ECX_MONITOR | LEAF1_ECX_VMX | LEAF1_ECX_SMX | LEAF1_ECX_PDCM);
            entry.ecx |= LEAF1_ECX_HYPERVISOR;
            entry.edx &= !LEAF1_EDX_DS;
            if tsc_deadline {
                entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
            }
        }
        // MWAIT; performance counters: none are given to the guest, so it need not look for them.
        (0x5 | 0xa, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // Heat and power are the host's.
        (0x6, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (entry.eax & LEAF6_EAX_ARAT, 0, 0, 0),
        (0x7, 0) => {
            entry.ebx &= !(LEAF7_EBX_SGX | LEAF7_EBX_PT);
            entry.ecx &= !LEAF7_ECX_SGX_LC;
            entry.edx &= !(LEAF7_EDX_HYBRID | LEAF7_EDX_ARCH_LBR);
            if !amx {
                entry.edx &= !LEAF7_EDX_AMX;
            }
        }
        (PARAVIRTUAL, _) => entry.eax &= PARAVIRTUAL_KEPT,
        (0x8000_0001, _) => {
            entry.ecx &= !(EXTENDED1_ECX_SVM
                | EXTENDED1_ECX_IBS
                | EXTENDED1_ECX_SKINIT
                | EXTENDED1_ECX_COUNTERS
                | EXTENDED1_ECX_MWAITX);
        }
        _ => {}
    }
}

/// On AMD's processors Linux believes no topology, not even leaf 0xb, without TOPOEXT and its leaf. All that
/// they do is tell, so that it is no matter whether this host has them.
fn offer_topology(entries: &mut Vec<kvm_cpuid_entry2>) {
    let tells = entries.iter().any(|entry| entry.function == 0 && matches!(entry.ebx, AMD | HYGON))
        && entries.iter().any(|entry| entry.function == 0x8000_0000 && entry.eax >= EXTENDED_TOPOLOGY);
    if !tells {
        return;
    }
    for entry in entries.iter_mut().filter(|entry| entry.function == 0x8000_0001) {
        entry.ecx |= EXTENDED1_ECX_TOPOLOGY;
    }
    if !entries.iter().any(|entry| entry.function == EXTENDED_TOPOLOGY) {
        entries.push(kvm_cpuid_entry2 { function: EXTENDED_TOPOLOGY, ..Default::default() });
    }
}

/// Fills in where the vCPU sits.
fn place(entry: &mut kvm_cpuid_entry2, id: u32, topology: Topology) {
    let package_threads = topology.threads_per_package();
    match entry.function {
        0x1 => {
            entry.ebx = (entry.ebx & 0x0000_ffff) | (id << 24) | (package_threads << 16);
            entry.edx =
                if package_threads > 1 { entry.edx | LEAF1_EDX_HTT } else { entry.edx & !LEAF1_EDX_HTT };
        }
        // Caches (Intel), by how many APIC ids lie in reach: the first two levels belong to a core, the
        // rest to the package.
        0x4 if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 0x7;
            let sharing = if level >= 3 { topology.package_bits() } else { topology.thread_bits() };
            let cores = (1 << topology.core_bits()) - 1;
            entry.eax = (entry.eax & 0x3fff) | ((1 << sharing) - 1) << 14 | cores << 26;
        }
        0x8000_0001 if entry.ecx & EXTENDED1_ECX_TOPOLOGY != 0 => {
            entry.ecx &= !EXTENDED1_ECX_CMP_LEGACY;
            if package_threads > 1 {
                entry.ecx |= EXTENDED1_ECX_CMP_LEGACY;
            }
        }
        0x8000_0008 => {
            entry.ecx = (entry.ecx & !0xf0ff) | (topology.package_bits() << 12) | (package_threads - 1)
        }
        // Caches (AMD), by how many threads share them.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 0x7;
            let sharing = if level >= 3 { package_threads } else { topology.threads_per_core() };
            entry.eax = (entry.eax & 0x3fff) | (sharing - 1) << 14;
        }
        EXTENDED_TOPOLOGY => {
            let core = (id & ((1 << topology.package_bits()) - 1)) >> topology.thread_bits();
            entry.eax = id;
            entry.ebx = (topology.threads_per_core() - 1) << 8 | core;
            // One node to a package.
            entry.ecx = id >> topology.package_bits();
            entry.edx = 0;
        }
        _ => {}
    }
}

/// Leaf 0xb: the threads of a core, the threads of a package, and no level above.
fn topology_leaves(id: u32, topology: Topology) -> [kvm_cpuid_entry2; 3] {
    let level = |index, bits, threads, kind: u32| kvm_cpuid_entry2 {
        function: TOPOLOGY,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: bits,
        ebx: threads,
        ecx: kind << 8 | index,
        edx: id,
        ..Default::default()
    };
    [
        level(0, topology.thread_bits(), topology.threads_per_core(), LEVEL_THREAD),
        level(1, topology.package_bits(), topology.threads_per_package(), LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::topology::topology;
    use super::*;

    fn template(entries: &[(u32, u32)]) -> Template {
        let entries = entries.iter().map(|&(function, index)| kvm_cpuid_entry2 {
            function,
            index,
            // A third-level cache, or a first-level one.
            eax: if index == 3 { 0x63 } else { 0x21 },
            ebx: 0xffff_ffff,
            ecx: 0x7fff_ffff,
            edx: 0xffff_ffff,
            ..Default::default()
        });
        Template::new(entries.collect(), CpuModel::Host, true).unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found = |entry: &&kvm_cpuid_entry2| (entry.function, entry.index) == (function, index);
        *cpuid.as_slice().iter().find(found).unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"))
    }

    /// As the manuals of both makers tell software to read them.
    #[test]
    fn all_leaves_tell_the_same_topology() {
        let template = template(&[
            (0, 0),
            (1, 0),
            (4, 0),
            (4, 3),
            (0xb, 0),
            (0x1f, 0),
            (0x8000_0001, 0),
            (0x8000_0008, 0),
            (0x8000_001d, 0),
            (0x8000_001d, 3),
            (0x8000_001e, 0),
        ]);
        for (sockets, cores, threads) in [(1, 1, 1), (1, 4, 1), (2, 3, 2), (4, 1, 1), (1, 8, 2), (2, 1, 3)] {
            let topology = topology(sockets, cores, threads);
            let package = u32::from(cores) * u32::from(threads);
            for vcpu in 0..sockets * cores * threads {
                let cpuid = template.for_vcpu(vcpu, topology, None).unwrap();
                let id = u32::from(topology.apic_id(vcpu));
                let one = leaf(&cpuid, 1, 0);
                assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff), (id, package));
                assert_eq!(one.edx & LEAF1_EDX_HTT != 0, package > 1);

                let (core_level, package_level) = (leaf(&cpuid, 0xb, 0), leaf(&cpuid, 0xb, 1));
                assert_eq!([core_level.edx, package_level.edx], [id; 2]);
                assert_eq!((core_level.ebx, package_level.ebx), (threads.into(), package));
                let (socket, thread) = (id >> package_level.eax, id & ((1 << core_level.eax) - 1));
                let core = (id >> core_level.eax) & ((1 << (package_level.eax - core_level.eax)) - 1);
                let expected = (vcpu / (cores * threads), vcpu / threads % cores, vcpu % threads);
                assert_eq!((socket, core, thread), (expected.0.into(), expected.1.into(), expected.2.into()));
                assert_eq!(leaf(&cpuid, 0xb, 2).ecx >> 8, 0, "no further level");

                let [l1, l3] = [0, 3].map(|index| leaf(&cpuid, 4, index).eax >> 14 & 0xfff);
                assert_eq!(l1 + 1, u32::from(threads).next_power_of_two());
                assert_eq!(l3 + 1, 1 << package_level.eax);

                assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx & 0xff, package - 1);
                assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx >> 12 & 0xf, package_level.eax);
                let amd = leaf(&cpuid, 0x8000_001e, 0);
                assert_eq!((amd.eax, amd.ebx & 0xff, amd.ecx), (id, core, socket));
                assert_eq!(amd.ebx >> 8 & 0xff, u32::from(threads) - 1);
                let [l1, l3] = [0, 3].map(|index| leaf(&cpuid, 0x8000_001d, index).eax >> 14 & 0xfff);
                assert_eq!((l1 + 1, l3 + 1), (threads.into(), package));
            }
        }
    }

    #[test]
    fn guests_see_a_hypervisor_without_nesting_counters_or_mwait() {
        let template =
            template(&[(1, 0), (5, 0), (0xa, 0), (7, 0), (0x14, 0), (0x8000_0001, 0), (0x8000_000a, 0)]);
        let cpuid = template.for_vcpu(0, topology(1, 1, 1), None).unwrap();
        let one = leaf(&cpuid, 1, 0);
        let never = LEAF1_ECX_VMX | LEAF1_ECX_MONITOR | LEAF1_ECX_PDCM;
        assert_eq!(one.ecx & (never | LEAF1_ECX_HYPERVISOR), LEAF1_ECX_HYPERVISOR);
        assert_ne!(one.ecx & LEAF1_ECX_TSC_DEADLINE, 0);
        for function in [5, 0xa] {
            let empty = leaf(&cpuid, function, 0);
            assert_eq!([empty.eax, empty.ebx, empty.ecx, empty.edx], [0; 4]);
        }
        assert_eq!(leaf(&cpuid, 7, 0).edx & LEAF7_EDX_AMX, 0, "no state, no tiles");
        let extended = leaf(&cpuid, 0x8000_0001, 0).ecx;
        assert_eq!(extended & (EXTENDED1_ECX_SVM | EXTENDED1_ECX_COUNTERS | EXTENDED1_ECX_MWAITX), 0);
        assert!(!cpuid.as_slice().iter().any(|entry| matches!(entry.function, 0x14 | 0x8000_000a)));
    }

    #[test]
    fn amd_processors_tell_their_topology_even_if_the_hosts_do_not() {
        let entry = |function, eax, ebx| kvm_cpuid_entry2 { function, eax, ebx, ..Default::default() };
        for (vendor, last, tells) in
            [(AMD, 0x8000_001e, true), (AMD, 0x8000_0008, false), (1, 0x8000_001e, false)]
        {
            let entries = vec![entry(0, 0xd, vendor), entry(0x8000_0000, last, 0), entry(0x8000_0001, 0, 0)];
            let template = Template::new(entries, CpuModel::Host, true).unwrap();
            let cpuid = template.for_vcpu(3, topology(1, 2, 2), None).unwrap();
            assert_eq!(leaf(&cpuid, 0x8000_0001, 0).ecx & EXTENDED1_ECX_TOPOLOGY != 0, tells);
            let found = cpuid.as_slice().iter().find(|entry| entry.function == EXTENDED_TOPOLOGY);
            assert_eq!(found.map(|entry| (entry.eax, entry.ebx)), tells.then_some((3, 1 << 8 | 1)));
        }
    }

    #[test]
    fn kvm_offers_what_needs_nothing_of_us_and_the_speed_of_the_clock() {
        let template = template(&[(HYPERVISOR, 0), (PARAVIRTUAL, 0)]);
        let cpuid = template.for_vcpu(0, topology(1, 1, 1), Some(2_400_000)).unwrap();
        assert_eq!(leaf(&cpuid, HYPERVISOR, 0).eax, TIMING);
        let timing = leaf(&cpuid, TIMING, 0);
        assert_eq!((timing.eax, timing.ebx), (2_400_000, APIC_BUS_KHZ));
        assert_eq!(leaf(&cpuid, PARAVIRTUAL, 0).eax & !PARAVIRTUAL_KEPT, 0);
        assert_ne!(PARAVIRTUAL_KEPT & 1 << 5, 0, "steal time");
        let unknown = template.for_vcpu(0, topology(1, 1, 1), None).unwrap();
        assert!(!unknown.as_slice().iter().any(|entry| entry.function == TIMING));
    }
}
