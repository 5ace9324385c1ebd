//! A guest that obeys a script: 64-bit integer code, entered by PVH, which interprets a list of operations
//! that a test has put into it. All wit is in the test; the guest reads, writes, loops and waits.
//!
//! It maps the first 16 GiB one to one. Its second vCPU, if the script starts it, obeys a list of its own.
//! Interrupts of all vectors from 32 on are counted and ended. It uses memory up to 0x6_ffff and from
//! [`LOAD_ADDRESS`] on; what lies between [`FREE`] and the end of memory is the script's.

use std::arch::global_asm;

use super::guest;

/// Where the guest is loaded and entered.
const LOAD_ADDRESS: u32 = 0x10_0000;
/// Memory that neither the guest nor a script of usual length uses.
pub const FREE: u64 = 0x80_0000;
/// Counts interrupts, 8 bytes.
pub const INTERRUPTS: u64 = 0x6_2000;
const OPERATION_BYTES: usize = 32;

global_asm!(
    ".pushsection .rodata.vmctl_script, \"a\", @progbits",
    ".code32",
    "vs_start:",
    "    cli",
    "    mov esp, 0x90000",
    // Page tables: one top, one below, 16 with 2 MiB pages.
    "    mov edi, 0x40000",
    "    xor eax, eax",
    "    mov ecx, 0x800",
    "    rep stosd",
    "    mov dword ptr [0x40000], 0x41003",
    "    mov edi, 0x41000",
    "    mov eax, 0x42003",
    "    mov ecx, 16",
    "2:  mov [edi], eax",
    "    add eax, 0x1000",
    "    add edi, 8",
    "    dec ecx",
    "    jnz 2b",
    "    mov edi, 0x42000",
    "    mov eax, 0x83",
    "    xor edx, edx",
    "    mov ecx, 8192",
    "2:  mov [edi], eax",
    "    mov [edi + 4], edx",
    "    add edi, 8",
    "    add eax, 0x200000",
    "    adc edx, 0",
    "    dec ecx",
    "    jnz 2b",
    // The other vCPU's way up: mov esi, the trampoline's address
    "    .byte 0xbe",
    "    .long 0x100000 + (vs_trampoline - vs_start)",
    "    mov edi, 0x60000",
    "    .byte 0xb9",
    "    .long vs_trampoline_end - vs_trampoline",
    "    rep movsb",
    // lgdt
    "    .byte 0x0f, 0x01, 0x15",
    "    .long 0x100000 + (vs_gdtr - vs_start)",
    "    mov eax, 0x20",
    "    mov cr4, eax",
    "    mov eax, 0x40000",
    "    mov cr3, eax",
    "    mov ecx, 0xc0000080",
    "    rdmsr",
    "    or eax, 0x100",
    "    wrmsr",
    "    mov eax, cr0",
    "    or eax, 0x80000001",
    "    mov cr0, eax",
    // jmp 8:vs_long
    "    .byte 0xea",
    "    .long 0x100000 + (vs_long - vs_start)",
    "    .word 8",
    ".code16",
    "vs_trampoline:",
    "    cli",
    "    mov ax, cs",
    "    mov ds, ax",
    "    .byte 0x0f, 0x01, 0x16",
    "    .word vs_gdtr16 - vs_trampoline",
    "    mov eax, 0x20",
    "    mov cr4, eax",
    "    mov eax, 0x40000",
    "    mov cr3, eax",
    "    mov ecx, 0xc0000080",
    "    rdmsr",
    "    or eax, 0x100",
    "    wrmsr",
    "    mov eax, 0x80000011",
    "    mov cr0, eax",
    "    .byte 0x66, 0xea",
    "    .long 0x100000 + (vs_long_second - vs_start)",
    "    .word 8",
    "vs_gdtr16:",
    "    .word 23",
    "    .long 0x100000 + (vs_gdt - vs_start)",
    "vs_trampoline_end:",
    ".balign 8",
    "vs_gdt:",
    "    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff",
    "vs_gdtr:",
    "    .word 23",
    "    .long 0x100000 + (vs_gdt - vs_start)",
    "vs_idtr:",
    "    .word 0xfff",
    "    .quad 0x61000",
    ".code64",
    "vs_long:",
    "    mov ax, 0x10",
    "    mov ds, ax",
    "    mov es, ax",
    "    mov ss, ax",
    "    mov rsp, 0x90000",
    // The interrupt table: nothing for exceptions (they end in a triple fault), one handler for the rest.
    "    mov edi, 0x61000",
    "    xor eax, eax",
    "    mov ecx, 64",
    "    rep stosq",
    "    lea rax, [rip + vs_interrupt]",
    "    mov rdx, rax",
    "    and eax, 0xffff",
    "    or eax, 0x80000",
    "    and edx, 0xffff0000",
    "    or edx, 0x8e00",
    "    mov ecx, 224",
    "2:  mov [rdi], eax",
    "    mov [rdi + 4], edx",
    "    mov qword ptr [rdi + 8], 0",
    "    add rdi, 16",
    "    dec ecx",
    "    jnz 2b",
    "    lidt [rip + vs_idtr]",
    "    lea rsi, [rip + vs_program + 16]",
    "    jmp vs_begin",
    "vs_long_second:",
    "    mov ax, 0x10",
    "    mov ds, ax",
    "    mov es, ax",
    "    mov ss, ax",
    "    mov rsp, 0x88000",
    "    lidt [rip + vs_idtr]",
    "    lea rsi, [rip + vs_program]",
    "    add rsi, [rsi]",
    "vs_begin:",
    "    mov r12, rsi",
    "    xor r15d, r15d",
    "vs_next:",
    "    movzx eax, byte ptr [rsi]",
    "    and eax, 15",
    "    mov rdi, [rsi + 8]",
    "    lea rdx, [rip + vs_table]",
    "    movsxd rax, dword ptr [rdx + rax * 4]",
    "    add rdx, rax",
    "    mov rax, [rsi + 16]",
    "    jmp rdx",
    "vs_done:",
    "    add rsi, 32",
    "    jmp vs_next",
    ".balign 4",
    "vs_table:",
    "    .long vs_end - vs_table, vs_write - vs_table, vs_read - vs_table, vs_out - vs_table",
    "    .long vs_in - vs_table, vs_store - vs_table, vs_branch - vs_table, vs_loop - vs_table",
    "    .long vs_put - vs_table, vs_print - vs_table, vs_copy - vs_table, vs_wait - vs_table",
    "    .long vs_flag - vs_table, vs_spin - vs_table, vs_typed - vs_table, vs_string - vs_table",
    "vs_end:",
    "    mov al, 'E'",
    "    mov dx, 0x3f8",
    "    out dx, al",
    "    cli",
    "2:  hlt",
    "    jmp 2b",
    "vs_store:",
    "    mov rax, r15",
    "vs_write:",
    "    movzx ecx, byte ptr [rsi + 1]",
    "    cmp cl, 2",
    "    jb 3f",
    "    je 4f",
    "    cmp cl, 4",
    "    je 5f",
    "    mov [rdi], rax",
    "    jmp vs_done",
    "3:  mov [rdi], al",
    "    jmp vs_done",
    "4:  mov [rdi], ax",
    "    jmp vs_done",
    "5:  mov [rdi], eax",
    "    jmp vs_done",
    "vs_read:",
    "    movzx ecx, byte ptr [rsi + 1]",
    "    cmp cl, 2",
    "    jb 3f",
    "    je 4f",
    "    cmp cl, 4",
    "    je 5f",
    "    mov r15, [rdi]",
    "    jmp vs_done",
    "3:  movzx r15d, byte ptr [rdi]",
    "    jmp vs_done",
    "4:  movzx r15d, word ptr [rdi]",
    "    jmp vs_done",
    "5:  mov r15d, [rdi]",
    "    jmp vs_done",
    "vs_out:",
    "    mov edx, edi",
    "    cmp byte ptr [rsi + 2], 0",
    "    cmovne eax, r15d",
    "    movzx ecx, byte ptr [rsi + 1]",
    "    cmp cl, 2",
    "    jb 3f",
    "    je 4f",
    "    out dx, eax",
    "    jmp vs_done",
    "3:  out dx, al",
    "    jmp vs_done",
    "4:  out dx, ax",
    "    jmp vs_done",
    "vs_in:",
    "    mov edx, edi",
    "    xor eax, eax",
    "    movzx ecx, byte ptr [rsi + 1]",
    "    cmp cl, 2",
    "    jb 3f",
    "    je 4f",
    "    in eax, dx",
    "    jmp 5f",
    "3:  in al, dx",
    "    jmp 5f",
    "4:  in ax, dx",
    "5:  mov r15d, eax",
    "    jmp vs_done",
    "vs_branch:",
    "    mov rdx, r15",
    "    and rdx, [rsi + 24]",
    "    cmp rdx, rax",
    "    jne vs_done",
    "vs_jump:",
    "    shl rdi, 5",
    "    lea rsi, [r12 + rdi]",
    "    jmp vs_next",
    "vs_loop:",
    "    dec dword ptr [rsi + 4]",
    "    jnz vs_jump",
    "    mov [rsi + 4], eax",
    "    jmp vs_done",
    "vs_put:",
    "    mov dx, 0x3f8",
    "    out dx, al",
    "    jmp vs_done",
    "vs_print:",
    "    mov ecx, 16",
    "    mov rbx, r15",
    "    mov dx, 0x3f8",
    "2:  rol rbx, 4",
    "    mov al, bl",
    "    and al, 15",
    "    add al, '0'",
    "    cmp al, '9'",
    "    jbe 3f",
    "    add al, 39",
    "3:  out dx, al",
    "    dec ecx",
    "    jnz 2b",
    "    mov al, 10",
    "    out dx, al",
    "    jmp vs_done",
    "vs_copy:",
    "    mov r8, rsi",
    "    mov ecx, [rsi + 4]",
    "    lea rsi, [rip + vs_program]",
    "    add rsi, rax",
    "    rep movsb",
    "    mov rsi, r8",
    "    jmp vs_done",
    "vs_wait:",
    "    sti",
    "    hlt",
    "    cli",
    "    jmp vs_done",
    "vs_flag:",
    "    test al, al",
    "    jz 3f",
    "    sti",
    "    jmp vs_done",
    "3:  cli",
    "    jmp vs_done",
    "vs_spin:",
    "    pause",
    "    dec rax",
    "    jnz vs_spin",
    "    jmp vs_done",
    "vs_typed:",
    "    xor r15d, r15d",
    "    mov dx, 0x3fd",
    "    in al, dx",
    "    test al, 1",
    "    jz vs_done",
    "    mov dx, 0x3f8",
    "    in al, dx",
    "    movzx r15d, al",
    "    jmp vs_done",
    // rep outs or ins of bytes at port rdi, memory at rax.
    "vs_string:",
    "    mov r8, rsi",
    "    mov edx, edi",
    "    mov ecx, [r8 + 4]",
    "    cmp byte ptr [r8 + 1], 0",
    "    je 3f",
    "    mov rdi, rax",
    "    rep insb",
    "    jmp 4f",
    "3:  mov rsi, rax",
    "    rep outsb",
    "4:  mov rsi, r8",
    "    jmp vs_done",
    "vs_interrupt:",
    "    push rax",
    "    lock inc qword ptr [0x62000]",
    "    mov eax, 0xfee000b0",
    "    mov dword ptr [rax], 0",
    "    pop rax",
    "    iretq",
    ".balign 16",
    "vs_program:",
    "vs_code_end:",
    ".popsection",
);

unsafe extern "C" {
    static vs_start: u8;
    static vs_code_end: u8;
}

fn code() -> &'static [u8] {
    let (start, end) = (&raw const vs_start, &raw const vs_code_end);
    // SAFETY: both symbols bound one read-only blob in this binary, the start first.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

/// One operation. Widths are 1, 2, 4 or 8 bytes, ports up to 4. The accumulator is the last thing read.
#[derive(Clone, Debug)]
pub enum Op {
    /// Prints `E` and halts for ever.
    End,
    Write {
        address: u64,
        width: u8,
        value: u64,
    },
    Read {
        address: u64,
        width: u8,
    },
    Out {
        port: u16,
        width: u8,
        value: u32,
    },
    /// Writes the accumulator to a port.
    Forward {
        port: u16,
        width: u8,
    },
    In {
        port: u16,
        width: u8,
    },
    /// Writes the accumulator.
    Store {
        address: u64,
        width: u8,
    },
    /// Goes to operation `target` if the accumulator, masked, has this value.
    Branch {
        mask: u64,
        value: u64,
        target: usize,
    },
    /// Goes to operation `target`, `times - 1` times.
    Loop {
        target: usize,
        times: u32,
    },
    Put(u8),
    /// Prints the accumulator as 16 digits and a newline.
    Print,
    Copy {
        address: u64,
        data: Vec<u8>,
    },
    /// Halts until an interrupt comes.
    Halt,
    Interrupts(bool),
    Spin(u64),
    /// What was typed, or 0.
    Typed,
    /// `rep outsb` (or `insb`) of `count` bytes of memory at `address`.
    Ports {
        port: u16,
        input: bool,
        address: u64,
        count: u32,
    },
}

/// What one vCPU does, an operation after the other.
pub type Script = Vec<Op>;

/// The guest with its scripts, as an ELF kernel with a PVH note.
pub fn kernel(first: &[Op], second: &[Op]) -> Vec<u8> {
    let mut data_at = 16 + OPERATION_BYTES * (first.len() + second.len() + 2);
    let mut data = Vec::new();
    let mut program = Vec::new();
    program.extend((16 + OPERATION_BYTES as u64 * (first.len() as u64 + 1)).to_le_bytes());
    program.extend([0; 8]);
    for script in [first, second] {
        for op in script.iter().chain([&Op::End]) {
            program.extend(encode(op, data_at as u64));
            if let Op::Copy { data: bytes, .. } = op {
                data.extend(bytes);
                data_at += bytes.len();
            }
        }
    }
    let image = [code(), &program, &data].concat();
    assert!(u64::from(LOAD_ADDRESS) + (image.len() as u64) < FREE, "the script is too long");
    guest::elf(&image, Some(LOAD_ADDRESS))
}

fn encode(op: &Op, data_at: u64) -> [u8; OPERATION_BYTES] {
    let (code, width, count, address, value, mask): (u8, u8, u32, u64, u64, u64) = match *op {
        Op::End => (0, 0, 0, 0, 0, 0),
        Op::Write { address, width, value } => (1, width, 0, address, value, 0),
        Op::Read { address, width } => (2, width, 0, address, 0, 0),
        Op::Out { port, width, value } => (3, width, 0, port.into(), value.into(), 0),
        // A flag beside the operation says that the value is the accumulator.
        Op::Forward { port, width } => (3, width, 0, port.into(), 0, 0),
        Op::In { port, width } => (4, width, 0, port.into(), 0, 0),
        Op::Store { address, width } => (5, width, 0, address, 0, 0),
        Op::Branch { mask, value, target } => (6, 0, 0, target as u64, value, mask),
        Op::Loop { target, times } => (7, 0, times, target as u64, times.into(), 0),
        Op::Put(byte) => (8, 0, 0, 0, byte.into(), 0),
        Op::Print => (9, 0, 0, 0, 0, 0),
        Op::Copy { address, ref data } => (10, 0, data.len() as u32, address, data_at, 0),
        Op::Halt => (11, 0, 0, 0, 0, 0),
        Op::Interrupts(on) => (12, 0, 0, 0, on.into(), 0),
        Op::Spin(turns) => (13, 0, 0, 0, turns.max(1), 0),
        Op::Typed => (14, 0, 0, 0, 0, 0),
        Op::Ports { port, input, address, count } => (15, input.into(), count, port.into(), address, 0),
    };
    let mut bytes = [0; OPERATION_BYTES];
    bytes[0] = code;
    bytes[1] = width;
    bytes[2] = matches!(op, Op::Forward { .. }).into();
    bytes[4..8].copy_from_slice(&count.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..24].copy_from_slice(&value.to_le_bytes());
    bytes[24..].copy_from_slice(&mask.to_le_bytes());
    bytes
}

/// Starts the second vCPU: INIT, a rest, and the start-up message with the trampoline's page.
pub fn start_second() -> [Op; 6] {
    const COMMAND_HIGH: u64 = 0xfee0_0310;
    const COMMAND_LOW: u64 = 0xfee0_0300;
    let write = |address, value| Op::Write { address, width: 4, value };
    [
        write(COMMAND_HIGH, 1 << 24),
        write(COMMAND_LOW, 0x4500),
        Op::Spin(1000),
        write(COMMAND_HIGH, 1 << 24),
        write(COMMAND_LOW, 0x4660),
        Op::Spin(1000),
    ]
}
