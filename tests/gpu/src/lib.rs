//! A fake NVIDIA GPU that runs on the CPU: the functions of the driver (`libcuda.so.1`) and of
//! cuBLAS that the worker calls. Tests with it check that every operation gives the CPU's results,
//! that the compute stream waits for weights uploaded on another stream, and that memory is not
//! used too early or too late. It does not show the speed of a GPU.
//!
//! Kernels are interpreted from the worker's PTX. Streams are threads with random delays
//! (`OUTLIERS_GPU_DELAY_US`, the most microseconds). Pageable host memory is copied at once,
//! pinned memory in stream order. `OUTLIERS_GPUS` is the number of GPUs (1), `OUTLIERS_GPU_MEMORY`
//! the bytes of each (8 GiB). The peak of used memory is written to the file `OUTLIERS_GPU_PEAK`,
//! and the number of launches of each kernel to the file `OUTLIERS_GPU_LAUNCHES`. With
//! `OUTLIERS_GPU_GROUPED=0` cuBLAS refuses to multiply several matrices by one call.
#![cfg(target_os = "linux")]

mod blas;
mod driver;
mod memory;
mod ptx;
mod stream;
