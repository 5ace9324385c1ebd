//! A small guest of our own, for hosts whose KVM can't run Linux: 32-bit integer code, entered by PVH.
//!
//! It prints `boot`, the number of boots that its memory remembers, and a newline, then obeys single
//! letters typed at its serial port:
//!
//! ```text
//!   q power off      r reset by ACPI      c reset by 0xcf9     k reset by the keyboard controller
//!   t triple fault   h halt for ever      s print by rep outsb o print 4 KiB of dots
//!   n read a port and an address where nothing is             P say to pvpanic that it crashed
//!   D say to pvpanic that it crashed and writes a dump        else echo
//! ```

use std::arch::global_asm;

/// Where the guest is loaded and entered.
const LOAD_ADDRESS: u32 = 0x10_0000;

global_asm!(
    ".pushsection .rodata.vmctl_guest, \"a\", @progbits",
    ".code32",
    "vmctl_guest_start:",
    "    mov esp, 0x90000",
    // The count of boots: 1 unless memory outlives a reset.
    "    inc dword ptr [0x200000]",
    // mov edi, the text's address
    "    .byte 0xbf",
    "    .long 0x100000 + (vmctl_guest_boot - vmctl_guest_start)",
    "    call vmctl_guest_puts",
    "    mov eax, [0x200000]",
    "    add al, 0x30",
    "    call vmctl_guest_putc",
    "    mov al, 10",
    "    call vmctl_guest_putc",
    "vmctl_guest_loop:",
    "    mov dx, 0x3fd",
    "    in al, dx",
    "    test al, 1",
    "    jz vmctl_guest_loop",
    "    mov dx, 0x3f8",
    "    in al, dx",
    "    cmp al, 'q'",
    "    je vmctl_guest_off",
    "    cmp al, 'r'",
    "    je vmctl_guest_reset",
    "    cmp al, 'c'",
    "    je vmctl_guest_cf9",
    "    cmp al, 'k'",
    "    je vmctl_guest_keyboard",
    "    cmp al, 't'",
    "    je vmctl_guest_fault",
    "    cmp al, 'h'",
    "    je vmctl_guest_halt",
    "    cmp al, 's'",
    "    je vmctl_guest_string",
    "    cmp al, 'o'",
    "    je vmctl_guest_dots",
    "    cmp al, 'n'",
    "    je vmctl_guest_nothing",
    "    cmp al, 'P'",
    "    je vmctl_guest_panic",
    "    cmp al, 'D'",
    "    je vmctl_guest_dump",
    "    call vmctl_guest_putc",
    "    jmp vmctl_guest_loop",
    "vmctl_guest_off:",
    "    mov dx, 0x600",
    "    mov al, 0x34",
    "    out dx, al",
    "    jmp vmctl_guest_stray",
    "vmctl_guest_reset:",
    "    mov dx, 0x602",
    "    mov al, 6",
    "    out dx, al",
    "    jmp vmctl_guest_stray",
    "vmctl_guest_cf9:",
    "    mov dx, 0xcf9",
    "    mov al, 6",
    "    out dx, al",
    "    jmp vmctl_guest_stray",
    "vmctl_guest_keyboard:",
    "    in al, 0x64",
    "    test al, 2",
    "    jnz vmctl_guest_keyboard",
    "    mov al, 0xfe",
    "    out 0x64, al",
    // Nobody comes here: who asks for a reset or power-off runs no further.
    "vmctl_guest_stray:",
    "    mov al, '!'",
    "    call vmctl_guest_putc",
    "    jmp vmctl_guest_loop",
    "vmctl_guest_fault:",
    "    push 0",
    "    push 0",
    "    lidt [esp]",
    "    ud2",
    "vmctl_guest_halt:",
    "    cli",
    "    hlt",
    "    jmp vmctl_guest_halt",
    "vmctl_guest_string:",
    // mov esi, the text's address
    "    .byte 0xbe",
    "    .long 0x100000 + (vmctl_guest_text - vmctl_guest_start)",
    "    mov ecx, 7",
    "    mov dx, 0x3f8",
    "    rep outsb",
    "    jmp vmctl_guest_loop",
    "vmctl_guest_dots:",
    "    mov ecx, 4096",
    "2:  mov al, '.'",
    "    call vmctl_guest_putc",
    "    dec ecx",
    "    jnz 2b",
    "    mov al, 10",
    "    call vmctl_guest_putc",
    "    jmp vmctl_guest_loop",
    "vmctl_guest_nothing:",
    "    mov dx, 0x5f0",
    "    in al, dx",
    "    cmp al, 0xff",
    "    jne vmctl_guest_stray",
    "    mov eax, [0xd00ff000]",
    "    cmp eax, 0xffffffff",
    "    jne vmctl_guest_stray",
    "    mov dword ptr [0xd00ff000], 1",
    "    mov al, 'N'",
    "    call vmctl_guest_putc",
    "    jmp vmctl_guest_loop",
    // What a driver does: it says only what is understood.
    "vmctl_guest_panic:",
    "    mov dx, 0x505",
    "    in al, dx",
    "    and al, 1",
    "    out dx, al",
    "    jmp vmctl_guest_stray",
    "vmctl_guest_dump:",
    "    mov dx, 0x505",
    "    in al, dx",
    "    and al, 2",
    "    out dx, al",
    "    out dx, al",
    "    mov al, '+'",
    "    call vmctl_guest_putc",
    "    jmp vmctl_guest_loop",
    "vmctl_guest_puts:",
    "    mov al, [edi]",
    "    test al, al",
    "    jz 3f",
    "    call vmctl_guest_putc",
    "    inc edi",
    "    jmp vmctl_guest_puts",
    "vmctl_guest_putc:",
    "    mov dx, 0x3f8",
    "    out dx, al",
    "3:  ret",
    "vmctl_guest_boot: .asciz \"boot\"",
    "vmctl_guest_text: .ascii \"string\\n\"",
    "vmctl_guest_end:",
    ".code64",
    ".popsection",
);

unsafe extern "C" {
    static vmctl_guest_start: u8;
    static vmctl_guest_end: u8;
}

fn code() -> &'static [u8] {
    let (start, end) = (&raw const vmctl_guest_start, &raw const vmctl_guest_end);
    // SAFETY: both symbols bound one read-only blob in this binary, the start first.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

/// The guest as an ELF kernel with a PVH note.
pub fn kernel() -> Vec<u8> {
    elf(code(), Some(LOAD_ADDRESS))
}

/// A guest that faults at its first instruction.
pub fn crashing_kernel() -> Vec<u8> {
    // ud2 without an interrupt table.
    elf(&[0x0f, 0x0b], Some(LOAD_ADDRESS))
}

/// The guest as an ELF kernel without a note.
pub fn kernel_without_note() -> Vec<u8> {
    elf(code(), None)
}

/// An ELF64 file with one loaded segment and, if there is an entry, a PVH note that names it.
pub fn elf(code: &[u8], entry: Option<u32>) -> Vec<u8> {
    const HEADER: u64 = 64;
    const PROGRAM_HEADER: u64 = 56;
    let note: Vec<u8> = match entry {
        Some(entry) => [
            &4u32.to_le_bytes()[..],
            &4u32.to_le_bytes(),
            &18u32.to_le_bytes(),
            b"Xen\0",
            &entry.to_le_bytes(),
        ]
        .concat(),
        None => Vec::new(),
    };
    let note_at = HEADER + 2 * PROGRAM_HEADER;
    let code_at = 0x1000;
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend([2u16, 62].iter().flat_map(|value| value.to_le_bytes()));
    file.extend(1u32.to_le_bytes());
    file.extend([u64::from(LOAD_ADDRESS), HEADER, 0].iter().flat_map(|value| value.to_le_bytes()));
    file.extend(0u32.to_le_bytes());
    let program_headers = if entry.is_some() { 2 } else { 1 };
    file.extend(
        [HEADER as u16, PROGRAM_HEADER as u16, program_headers, 0, 0, 0]
            .iter()
            .flat_map(|value| value.to_le_bytes()),
    );
    let mut program_header = |kind: u32, flags: u32, offset: u64, address: u64, size: u64| {
        file.extend([kind, flags].iter().flat_map(|value| value.to_le_bytes()));
        file.extend(
            [offset, address, address, size, size, 0x1000].iter().flat_map(|value| value.to_le_bytes()),
        );
    };
    program_header(1, 5, code_at, LOAD_ADDRESS.into(), code.len() as u64);
    program_header(4, 4, note_at, 0, note.len() as u64);
    file.extend(note);
    file.resize(code_at as usize, 0);
    file.extend(code);
    file
}
