//! CPU models: which instructions the guest may find, whatever this host's processor has beyond.
//!
//! A level of the x86-64 psABI is a list of features. A guest of that level sees these, and none above:
//! what runs on one host runs on every other that can give the level. Three things stay the host's:
//! who made the processor and how it is called, the paging and protection that a kernel uses for itself,
//! and what it needs against the flaws of just this processor; programs see none of these.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::CpuError;
use crate::vmm::config::CpuModel;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

use Register::{Eax, Ebx, Ecx, Edx};

impl Register {
    pub fn of(self, entry: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Eax => &mut entry.eax,
            Ebx => &mut entry.ebx,
            Ecx => &mut entry.ecx,
            Edx => &mut entry.edx,
        }
    }
}

/// One bit of subleaf 0, by the name that Linux gives it.
struct Feature(u32, Register, u32, &'static str);

/// What of x86-64 itself programs see, and what makes it 64 bits wide.
const BASELINE: &[Feature] = &[
    Feature(0x1, Edx, 0, "fpu"),
    Feature(0x1, Edx, 8, "cx8"),
    Feature(0x1, Edx, 15, "cmov"),
    Feature(0x1, Edx, 23, "mmx"),
    Feature(0x1, Edx, 24, "fxsr"),
    Feature(0x1, Edx, 25, "sse"),
    Feature(0x1, Edx, 26, "sse2"),
    Feature(0x8000_0001, Edx, 11, "syscall"),
    Feature(0x8000_0001, Edx, 20, "nx"),
    Feature(0x8000_0001, Edx, 29, "lm"),
];

const V2: &[Feature] = &[
    Feature(0x1, Ecx, 0, "pni"),
    Feature(0x1, Ecx, 9, "ssse3"),
    Feature(0x1, Ecx, 13, "cx16"),
    Feature(0x1, Ecx, 19, "sse4_1"),
    Feature(0x1, Ecx, 20, "sse4_2"),
    Feature(0x1, Ecx, 23, "popcnt"),
    Feature(0x8000_0001, Ecx, 0, "lahf_lm"),
];

/// OSXSAVE belongs to it too: it shows as soon as the guest's kernel turns XSAVE on.
const V3: &[Feature] = &[
    Feature(0x1, Ecx, 12, "fma"),
    Feature(0x1, Ecx, 22, "movbe"),
    Feature(0x1, Ecx, 26, "xsave"),
    Feature(0x1, Ecx, 28, "avx"),
    Feature(0x1, Ecx, 29, "f16c"),
    Feature(0x7, Ebx, 3, "bmi1"),
    Feature(0x7, Ebx, 5, "avx2"),
    Feature(0x7, Ebx, 8, "bmi2"),
    Feature(0x8000_0001, Ecx, 5, "abm"),
];

/// The words that are made of features, and of each what stays as the host has it: leaf, subleaf,
/// register, mask.
const WORDS: &[(u32, u32, Register, u32)] = &[
    // PCID; x2APIC, the deadline timer and the sign of a hypervisor, which KVM makes itself.
    (0x1, 0, Ecx, 1 << 17 | 1 << 21 | 1 << 24 | 1 << 31),
    // VME, DE, PSE, TSC, MSR, PAE, MCE, APIC, SEP, MTRR, PGE, MCA, PAT, PSE36, CLFLUSH: each processor of 64
    // bits has them, though nested KVM may lack one. Several threads to a package.
    (0x1, 0, Edx, 0x000b_7afe | 1 << 28),
    // An APIC timer that never stops.
    (0x6, 0, Eax, 1 << 2),
    (0x6, 0, Ebx, 0),
    (0x6, 0, Ecx, 0),
    // TSC_ADJUST, SMEP, INVPCID, SMAP.
    (0x7, 0, Ebx, 1 << 1 | 1 << 7 | 1 << 10 | 1 << 20),
    // UMIP.
    (0x7, 0, Ecx, 1 << 2),
    // SRBDS_CTRL, MD_CLEAR, SPEC_CTRL, STIBP, L1D_FLUSH, ARCH_CAPABILITIES, SSBD.
    (0x7, 0, Edx, 1 << 9 | 1 << 10 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 31),
    (0x7, 1, Eax, 0),
    (0x7, 1, Ebx, 0),
    (0x7, 1, Ecx, 0),
    (0x7, 1, Edx, 0),
    (0x7, 2, Eax, 0),
    (0x7, 2, Ebx, 0),
    (0x7, 2, Ecx, 0),
    // PSFD, IPRED_CTRL, RRSBA_CTRL, DDPD_U, BHI_CTRL, MCDT_NO.
    (0x7, 2, Edx, 0x3f),
    // CMP_LEGACY and TOPOEXT: how AMD tells the topology.
    (0x8000_0001, 0, Ecx, 1 << 1 | 1 << 22),
    // AMD's copies of leaf 1; pages of 1 GiB.
    (0x8000_0001, 0, Edx, 0x0183_f3ff | 1 << 26),
    (0x8000_0007, 0, Eax, 0),
    (0x8000_0007, 0, Ebx, 0),
    (0x8000_0007, 0, Ecx, 0),
    // A TSC that runs at one speed.
    (0x8000_0007, 0, Edx, 1 << 8),
    // IBPB, IBRS, STIBP, STIBP_ALWAYS_ON, IBRS_SAME_MODE, SSBD, VIRT_SSBD, SSB_NO, PSFD, BTC_NO, IBPB_RET.
    (0x8000_0008, 0, Ebx, 0x770a_d000),
    (0x8000_0008, 0, Edx, 0),
    // NO_NESTED_DATA_BP, LFENCE_RDTSC, VERW_CLEAR, NULL_SEL_CLR_BASE, AUTOIBRS, SBPB, IBPB_BRTYPE, SRSO_NO,
    // SRSO_USER_KERNEL_NO.
    (0x8000_0021, 0, Eax, 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 0xf << 27),
    (0x8000_0021, 0, Ebx, 0),
    // TSA_SQ_NO, TSA_L1_NO.
    (0x8000_0021, 0, Ecx, 1 << 1 | 1 << 2),
    (0x8000_0021, 0, Edx, 0),
];

/// All leaves of a level: those made of features, names, caches, sizes, and what KVM says of itself.
const LEAVES: &[u32] = &[
    0x0,
    0x1,
    0x2,
    0x4,
    0x6,
    0x7,
    0x4000_0000,
    0x4000_0001,
    0x8000_0000,
    0x8000_0001,
    0x8000_0002,
    0x8000_0003,
    0x8000_0004,
    0x8000_0005,
    0x8000_0006,
    0x8000_0007,
    0x8000_0008,
    0x8000_0019,
    0x8000_001d,
    0x8000_001e,
    0x8000_0021,
];
const LAST_LEAF: u32 = 0xd;
const LAST_EXTENDED_LEAF: u32 = 0x8000_0021;
/// Of leaf 7.
const LAST_SUBLEAF: u32 = 2;

/// Of XCR0: the state of x87, SSE and AVX.
const XCR0_AVX: u32 = 0b111;
/// How large that state is, and where its AVX part begins: fixed by the architecture.
const AVX_STATE_BYTES: u32 = 256;
const AVX_STATE_OFFSET: u32 = 576;

fn levels(model: CpuModel) -> &'static [&'static [Feature]] {
    match model {
        CpuModel::Host => &[],
        CpuModel::X86_64V2 => &[BASELINE, V2],
        CpuModel::X86_64V3 => &[BASELINE, V2, V3],
    }
}

fn name(model: CpuModel) -> &'static str {
    match model {
        CpuModel::Host => "host",
        CpuModel::X86_64V2 => "x86-64-v2",
        CpuModel::X86_64V3 => "x86-64-v3",
    }
}

/// Makes of what KVM supports here what a guest of this model sees. A host that lacks a part of it can't
/// run the guest, and every missing part is named.
pub fn apply(model: CpuModel, entries: &mut Vec<kvm_cpuid_entry2>) -> Result<(), CpuError> {
    if model == CpuModel::Host {
        return Ok(());
    }
    let features = || levels(model).iter().copied().flatten();
    let missing: Vec<&str> =
        features().filter(|feature| !has(entries, feature)).map(|found| found.3).collect();
    let avx_state = model != CpuModel::X86_64V3
        || entries.iter().any(|entry| is(entry, 0xd, 0) && entry.eax & XCR0_AVX == XCR0_AVX);
    if !missing.is_empty() || !avx_state {
        let mut missing = missing;
        missing.extend((!avx_state).then_some("the state of AVX"));
        return Err(CpuError::Model { model: name(model), missing: missing.join(", ") });
    }
    entries.retain(|entry| {
        LEAVES.contains(&entry.function) && (entry.function != 0x7 || entry.index <= LAST_SUBLEAF)
    });
    for entry in &mut *entries {
        for &(leaf, index, register, kept) in WORDS {
            if is(entry, leaf, index) {
                let of_word = |feature: &&Feature| index == 0 && feature.0 == leaf && feature.1 == register;
                let level = features().filter(of_word).fold(0, |mask, feature| mask | 1 << feature.2);
                *register.of(entry) &= level | kept;
            }
        }
        match (entry.function, entry.index) {
            (0x0, _) => entry.eax = entry.eax.min(LAST_LEAF),
            (0x7, 0) => entry.eax = entry.eax.min(LAST_SUBLEAF),
            (0x8000_0000, _) => entry.eax = entry.eax.min(LAST_EXTENDED_LEAF),
            _ => {}
        }
    }
    if model == CpuModel::X86_64V3 {
        entries.extend(avx_state_leaves());
    }
    Ok(())
}

/// Leaf 0xd. KVM keeps EBX of the first subleaf in step with the guest's XCR0, which is 1 at reset.
fn avx_state_leaves() -> [kvm_cpuid_entry2; 3] {
    let end = AVX_STATE_OFFSET + AVX_STATE_BYTES;
    [(XCR0_AVX, AVX_STATE_OFFSET, end), (0, 0, 0), (AVX_STATE_BYTES, AVX_STATE_OFFSET, 0)].map({
        let mut index = 0;
        move |(eax, ebx, ecx)| {
            index += 1;
            kvm_cpuid_entry2 {
                function: 0xd,
                index: index - 1,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax,
                ebx,
                ecx,
                ..Default::default()
            }
        }
    })
}

fn is(entry: &kvm_cpuid_entry2, leaf: u32, index: u32) -> bool {
    entry.function == leaf && entry.index == index
}

fn has(entries: &[kvm_cpuid_entry2], &Feature(leaf, register, bit, _): &Feature) -> bool {
    let mut found = entries.iter().filter(|entry| is(entry, leaf, 0)).copied();
    found.any(|mut entry| *register.of(&mut entry) & 1 << bit != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A processor of whose features each bit is as given, and those of a level besides.
    fn processor(model: CpuModel, noise: u64) -> Vec<kvm_cpuid_entry2> {
        let mut random = noise;
        let mut word = || {
            // xorshift64*: plain, and all that is needed to differ.
            random ^= random >> 12;
            random ^= random << 25;
            random ^= random >> 27;
            (random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
        };
        let subleaves = |leaf: u32| match leaf {
            0x7 => 3,
            0xd => 20,
            _ => 1,
        };
        let leaves = LEAVES.iter().copied().chain([
            0x5,
            0xa,
            0xd,
            0x12,
            0x14,
            0x1a,
            0x1d,
            0x24,
            0x8000_000a,
            0x8000_001f,
            0x8000_0026,
        ]);
        let mut entries = Vec::new();
        for leaf in leaves {
            for index in 0..subleaves(leaf) {
                let [eax, ebx, ecx, edx] = [word(), word(), word(), word()];
                entries.push(kvm_cpuid_entry2 {
                    function: leaf,
                    index,
                    eax,
                    ebx,
                    ecx,
                    edx,
                    ..Default::default()
                });
            }
        }
        for entry in &mut entries {
            match (entry.function, entry.index) {
                (0x0, _) => entry.eax = 0x20,
                (0x7, 0) => entry.eax = 2,
                (0x8000_0000, _) => entry.eax = 0x8000_0026,
                (0xd, 0) => entry.eax |= XCR0_AVX,
                _ => {}
            }
            for Feature(leaf, register, bit, _) in levels(model).iter().copied().flatten() {
                if is(entry, *leaf, 0) {
                    *register.of(entry) |= 1 << bit;
                }
            }
        }
        entries
    }

    /// What a program of the guest can tell of the instructions: all but what stays the host's.
    fn instructions(entries: &[kvm_cpuid_entry2]) -> Vec<(u32, u32, [u32; 4])> {
        let mut words = Vec::new();
        for entry in entries {
            let mut entry = *entry;
            for &(leaf, index, register, kept) in WORDS {
                if is(&entry, leaf, index) {
                    *register.of(&mut entry) &= !kept;
                }
            }
            match entry.function {
                // Names, signature, caches, sizes of addresses.
                0x0 => (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0),
                0x1 => (entry.eax, entry.ebx) = (0, 0),
                0x2 | 0x4 | 0x4000_0000..=0x4000_0001 | 0x8000_0002..=0x8000_0006 | 0x8000_0019 => continue,
                0x6 => entry.edx = 0,
                0x8000_0000 => (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0),
                0x8000_0001 => (entry.eax, entry.ebx) = (0, 0),
                0x8000_0008 => (entry.eax, entry.ecx) = (0, 0),
                0x8000_001d | 0x8000_001e => continue,
                _ => {}
            }
            words.push((entry.function, entry.index, [entry.eax, entry.ebx, entry.ecx, entry.edx]));
        }
        words
    }

    fn applied(model: CpuModel, mut entries: Vec<kvm_cpuid_entry2>) -> Vec<kvm_cpuid_entry2> {
        apply(model, &mut entries).unwrap();
        entries
    }

    proptest! {
        #[test]
        fn all_hosts_that_give_a_level_give_the_same(one in 1u64.., two in 1u64..) {
            for model in [CpuModel::X86_64V2, CpuModel::X86_64V3] {
                let [one, two] = [one, two].map(|noise| instructions(&applied(model, processor(model, noise))));
                prop_assert_eq!(&one, &two);
            }
        }

        /// To mask twice is to mask once: what a guest sees is a host of that level itself.
        #[test]
        fn a_guest_is_a_host_of_its_level(noise in 1u64..) {
            for model in [CpuModel::X86_64V2, CpuModel::X86_64V3] {
                let once = applied(model, processor(model, noise));
                let again = applied(model, once.clone());
                prop_assert_eq!(instructions(&again), instructions(&once));
            }
        }
    }

    /// The features of a level, by the words of the psABI and nothing else.
    #[test]
    fn nothing_above_the_level_is_left() {
        let everything = |model| {
            let mut entries = processor(model, 7);
            for entry in &mut entries {
                if WORDS.iter().any(|(leaf, index, ..)| is(entry, *leaf, *index))
                    && (entry.function, entry.index) != (7, 0)
                {
                    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (u32::MAX, u32::MAX, u32::MAX, u32::MAX);
                } else if entry.function == 7 {
                    (entry.ebx, entry.ecx, entry.edx) = (u32::MAX, u32::MAX, u32::MAX);
                }
            }
            instructions(&applied(model, entries))
        };
        let word = |words: &[(u32, u32, [u32; 4])], leaf, register: usize| {
            words.iter().find(|(found, index, _)| (*found, *index) == (leaf, 0)).unwrap().2[register]
        };
        let v2 = everything(CpuModel::X86_64V2);
        // SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT; nothing of leaf 7; LAHF.
        assert_eq!(word(&v2, 1, 2), 0x0098_2201);
        assert_eq!([word(&v2, 7, 1), word(&v2, 7, 2), word(&v2, 7, 3)], [0; 3]);
        assert_eq!(word(&v2, 0x8000_0001, 2), 1);
        assert!(!v2.iter().any(|(leaf, ..)| *leaf == 0xd), "without XSAVE there is no state to describe");
        let v3 = everything(CpuModel::X86_64V3);
        // FMA, MOVBE, XSAVE, AVX, F16C more; BMI1, AVX2, BMI2; LZCNT.
        assert_eq!(word(&v3, 1, 2), 0x0098_2201 | 0x3440_1000);
        assert_eq!([word(&v3, 7, 1), word(&v3, 7, 2), word(&v3, 7, 3)], [0x128, 0, 0]);
        assert_eq!(word(&v3, 0x8000_0001, 2), 0x21);
        let states: Vec<_> = v3.iter().filter(|(leaf, ..)| *leaf == 0xd).map(|word| word.2).collect();
        assert_eq!(states, [[7, 576, 832, 0], [0; 4], [256, 576, 0, 0]]);
    }

    #[test]
    fn a_host_that_lacks_a_part_is_refused_and_the_part_named() {
        for model in [CpuModel::X86_64V2, CpuModel::X86_64V3] {
            for Feature(leaf, register, bit, called) in levels(model).iter().copied().flatten() {
                let mut entries = processor(model, 3);
                for entry in entries.iter_mut().filter(|entry| is(entry, *leaf, 0)) {
                    *register.of(entry) &= !(1 << bit);
                }
                let error = apply(model, &mut entries).unwrap_err().to_string();
                assert!(error.ends_with(&format!(": {called}")), "{error}");
            }
        }
        let mut entries = processor(CpuModel::X86_64V3, 3);
        for entry in entries.iter_mut().filter(|entry| is(entry, 0xd, 0)) {
            entry.eax = 0b11;
        }
        entries.retain(|entry| entry.function != 0x8000_0001);
        let error = apply(CpuModel::X86_64V3, &mut entries).unwrap_err().to_string();
        assert_eq!(
            error,
            "this host can't give a guest the CPU model x86-64-v3: it lacks: syscall, nx, lm, lahf_lm, abm, the state of AVX"
        );
    }
}
