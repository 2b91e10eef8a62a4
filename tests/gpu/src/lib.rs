//! A fake NVIDIA GPU that runs on the CPU: the functions of the driver (`libcuda.so.1`) and of
//! cuBLAS that the worker calls. Tests with it check that every operation gives the CPU's results,
//! that the compute stream waits for weights uploaded on another stream, and that memory is not
//! used too early or too late. It does not show the speed of a GPU.
//!
//! Kernels are interpreted as the PTX that the worker brings. Streams are threads, which take
//! their time (`OUTLIERS_GPU_DELAY_US`, at most so long now and then); host memory that is not
//! pinned is copied at once, pinned memory when the stream comes to it. `OUTLIERS_GPUS` says how
//! many there are (1), `OUTLIERS_GPU_MEMORY` how many bytes each has (8 GiB); the most that was
//! ever used at once is written to the file `OUTLIERS_GPU_PEAK`, and how often each kernel was
//! launched to the file `OUTLIERS_GPU_LAUNCHES`. With `OUTLIERS_GPU_GROUPED=0` cuBLAS refuses to
//! multiply several matrices by one call.
#![cfg(target_os = "linux")]

mod blas;
mod driver;
mod memory;
mod ptx;
mod stream;
