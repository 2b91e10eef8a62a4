//! Files of a tokenizer, in any format.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| outliers_fuzz::corpus::tokenizer(input));
