//! A rented host as a place to run the worker: reach, probe, push, launch, follow, bring home.
//!
//! Layout on the host, below its home folder:
//! `.cache/outliers/bin/<sha256>/outliers-worker` (content-addressed), `outliers/<run>/` with the job, the output files of
//! [`outliers_protocol::files`], the pid file and the exit-code file.
