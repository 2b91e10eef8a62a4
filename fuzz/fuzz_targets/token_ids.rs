//! Files of token ids.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| outliers_fuzz::corpus::token_ids(input));
