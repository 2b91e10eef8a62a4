//! End-to-end tests.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails; helpers are no exception")]

mod hub;
