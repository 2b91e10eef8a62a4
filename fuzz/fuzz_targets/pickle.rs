//! A `pytorch_model.bin`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| outliers_fuzz::checkpoint::pickle(input));
