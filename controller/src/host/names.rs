//! Checks of names that become paths, on this machine or on the host.

use super::{HostError, HostErrorKind};
use crate::files::is_plain_name;

/// Checks a run's name: letters, digits, `-` and `_`, at most 100.
pub(super) fn check_run(run: &str) -> Result<(), HostError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    if !run.is_empty() && run.len() <= 100 && !run.starts_with('-') && run.bytes().all(plain) {
        return Ok(());
    }
    Err(HostError::new(HostErrorKind::Local, format!("{run:?} cannot name a run: only letters, digits, - and _")))
}

/// Checks a path below the home folder: plain components only.
pub(super) fn check_relative(path: &str) -> Result<(), HostError> {
    let component = |part: &str| is_plain_name(part) || (part.starts_with('.') && is_plain_name(&part[1..]));
    if path.split('/').all(component) {
        return Ok(());
    }
    Err(HostError::new(HostErrorKind::Local, format!("{path:?} is no plain path below the host's home folder")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_paths_below_home_are_accepted() {
        assert!(check_relative("outliers/models/abc").is_ok() && check_relative(".cache/outliers").is_ok());
        for bad in ["", "/x", "a//b", "a/../b", "..", "a/", "~/x\n", "a/.", "a/..b/../c"] {
            assert!(check_relative(bad).is_err(), "{bad:?}");
        }
        assert!(
            check_run("r1a2").is_ok()
                && check_run("a/b").is_err()
                && check_run("..").is_err()
                && check_run("").is_err()
        );
    }
}
