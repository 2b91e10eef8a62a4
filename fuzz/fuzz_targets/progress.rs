//! A worker's progress file and log.

#![no_main]

libfuzzer_sys::fuzz_target!(|text: &[u8]| outliers_fuzz::host::follow(text));
