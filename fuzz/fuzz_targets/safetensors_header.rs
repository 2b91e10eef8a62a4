//! A safetensors file.

#![no_main]

libfuzzer_sys::fuzz_target!(|file: &[u8]| outliers_fuzz::checkpoint::header(file));
