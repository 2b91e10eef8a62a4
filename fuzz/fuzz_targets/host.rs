//! Output and files of a rented host.

#![no_main]

libfuzzer_sys::fuzz_target!(|script: &[u8]| outliers_fuzz::host::run_script(script));
