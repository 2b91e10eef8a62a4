//! End-to-end tests.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod ablation;
mod checkpoints;
mod clouds;
mod datasets;
mod deploy;
mod detach;
mod docs;
mod endings;
mod exports;
mod host;
mod hub;
mod inputs;
mod measures;
mod metamorphic;
mod published;
mod readme;
mod real_worker;
mod release;
mod rewrite;
mod schema;
mod sites;
mod slurm;
mod ssh;
mod sshd;
mod streamed;
mod survey;
mod weight_files;
mod worker;
