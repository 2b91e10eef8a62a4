//! What a rented host prints, and what its files hold.

#![no_main]

libfuzzer_sys::fuzz_target!(|script: &[u8]| outliers_fuzz::host::hear(script));
