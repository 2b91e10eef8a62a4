//! The program `outliers-worker`.

use std::process::ExitCode;

#[global_allocator]
static HEAP: outliers_heap::Heap = outliers_heap::Heap;

fn main() -> ExitCode {
    outliers_worker::commands::app::main_impl()
}
