//! An NVIDIA GPU made of this machine's processor: the functions of the driver (`libcuda.so.1`)
//! and of cuBLAS, as far as the worker calls them. It shows what a test without a GPU cannot: that
//! every operation exists there and means the same, that weights which come by a stream of their
//! own are waited for, and that memory is neither used too early nor too late. How fast a GPU is
//! it does not show.
//!
//! Kernels are interpreted as the PTX that the worker brings. Streams are threads, which take
//! their time (`OUTLIERS_GPU_DELAY_US`, at most so long now and then); host memory that is not
//! pinned is copied at once, pinned memory when the stream comes to it. `OUTLIERS_GPUS` says how
//! many there are (1), `OUTLIERS_GPU_MEMORY` how many bytes each has (8 GiB); the most that was
//! ever used at once is written to the file `OUTLIERS_GPU_PEAK`, and how often each kernel was
//! launched to the file `OUTLIERS_GPU_LAUNCHES`.
#![cfg(target_os = "linux")]

mod blas;
mod driver;
mod memory;
mod ptx;
mod stream;
