#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::devices::block_read_only(data));
