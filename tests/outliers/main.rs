//! End-to-end tests.

mod ssh;
