//! What a host's SFTP server answers.

#![no_main]

libfuzzer_sys::fuzz_target!(|script: &[u8]| outliers_fuzz::sftp::read(script));
