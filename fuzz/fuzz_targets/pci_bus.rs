#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::pci::bus(data));
