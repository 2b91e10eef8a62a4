// The triangular systems of DeltaNets, as the worker's loop for CPUs inverts them: the same
// operations in the same order.
#include "values.cuh"

// Tokens of a chunk at most, and threads of a block.
constexpr u32 CHUNK = 64;

// The inverse of the identity plus what of each of `systems` [blocks, n, n] is below the diagonal,
// by forward substitution. A block has a system, a thread a column.
extern "C" __global__ void invert(const float *systems, u32 n, float *inverses) {
    __shared__ float system[CHUNK * CHUNK];
    __shared__ float inverse[CHUNK * CHUNK];
    const u32 column = threadIdx.x;
    systems += u64(blockIdx.x) * n * n;
    inverses += u64(blockIdx.x) * n * n;
    for (u32 i = column; i < n * n; i += CHUNK) system[i] = systems[i];
    __syncthreads();
    if (column >= n) return;
    for (u32 row = 0; row < n; row++) {
        float value = row == column ? 1.0f : 0.0f;
        for (u32 k = column; k < row; k++) value -= system[row * n + k] * inverse[k * CHUNK + column];
        inverse[row * CHUNK + column] = value;
        inverses[row * n + column] = value;
    }
}
