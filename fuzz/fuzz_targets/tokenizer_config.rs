#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gqa2mla::fuzzing::tokenizer_config(data));
