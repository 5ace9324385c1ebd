#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::images::qcow2_image(data));
