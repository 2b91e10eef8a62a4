//! A `model.safetensors.index.json`.

#![no_main]

libfuzzer_sys::fuzz_target!(|text: &[u8]| outliers_fuzz::checkpoint::index(text));
