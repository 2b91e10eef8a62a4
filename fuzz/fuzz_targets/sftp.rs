//! Answers of a host's SFTP server.

#![no_main]

libfuzzer_sys::fuzz_target!(|script: &[u8]| outliers_fuzz::sftp::read(script));
