//! `outliers-worker`: arguments to job to run; errors to exit codes.

use std::process::ExitCode;

#[global_allocator]
static HEAP: outliers_heap::Heap = outliers_heap::Heap;

fn main() -> ExitCode {
    outliers_worker::commands::app::main_impl()
}
