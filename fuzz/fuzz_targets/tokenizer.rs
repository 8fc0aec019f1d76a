#![no_main]

use std::sync::Once;

static QUIET: Once = Once::new();

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    // libFuzzer ends the process at every panic; those of the tokenizer library are caught and become errors.
    QUIET.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !gqa2mla::source::panics_are_contained() {
                usual(info);
            }
        }));
    });
    gqa2mla::fuzzing::tokenizer(data);
});
