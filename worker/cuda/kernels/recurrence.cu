// The recurrences of DeltaNets and Mamba, token by token, as worker/src/kernels/recurrence.rs
// computes them on a CPU: the same operations in the same order. The results are the same bits.
#include "values.cuh"

// Threads of a block.
constexpr u32 BLOCK = 128;
// Threads that share a column of a state: each has every fourth group of four rows.
constexpr u32 SHARES = 4;
// Columns of a thread. Two are served by what is read of keys and queries.
constexpr u32 COLUMNS = 2;
// Columns of a block.
constexpr u32 WIDTH = BLOCK / SHARES * COLUMNS;
// Tokens that are read at once.
constexpr u32 TOKENS = 8;

// The sum over the threads of a column, in each of them: `joined` on a CPU.
__device__ inline float over_shares(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Results of one head, of columns from blockIdx.y * WIDTH on. Keys and queries are [heads / served,
// positions, rows], values and results [heads, positions, width], and `decay`, the factors of the
// state, [heads, positions, factors], where `factors` is 1 or `rows`. `strength` [heads, positions]
// is null where nothing is corrected. ROWS is `rows` at least; rows beyond `rows` stay 0.
template <u32 ROWS>
__device__ void recurrence(const float *query, const float *key, const float *value, const float *decay,
                           const float *strength, u32 positions, u32 served, u32 rows, u32 width, u32 factors,
                           float *out) {
    constexpr u32 QUADS = ROWS / (4 * SHARES);
    __shared__ float4 queries[TOKENS * ROWS / 4], keys[TOKENS * ROWS / 4], decays[TOKENS * ROWS / 4];
    __shared__ float values[TOKENS * WIDTH], strengths[TOKENS];
    const u32 t = threadIdx.x, share = t % SHARES, column = t / SHARES * COLUMNS, first = blockIdx.y * WIDTH;
    const u32 columns = min(width - first, WIDTH);
    // A tensor has fewer than 2^31 values.
    const u32 of_head = blockIdx.x * positions, of_keys = blockIdx.x / served * positions;
    query += of_keys * rows;
    key += of_keys * rows;
    value += of_head * width + first;
    decay += of_head * factors;
    strength = strength ? strength + of_head : nullptr;
    out += of_head * width + first;
    float state[QUADS][4][COLUMNS] = {};
    for (u32 start = 0; start < positions; start += TOKENS) {
        const u32 count = min(TOKENS, positions - start);
        __syncthreads();
#pragma unroll
        for (u32 i = t; i < TOKENS * ROWS; i += BLOCK) {
            const u32 token = i / ROWS, row = i % ROWS;
            const bool is_there = token < count && row < rows;
            const u32 at = (start + token) * rows + row;
            ((float *)queries)[i] = is_there ? query[at] : 0.0f;
            ((float *)keys)[i] = is_there ? key[at] : 0.0f;
            ((float *)decays)[i] = is_there ? decay[(start + token) * factors + min(row, factors - 1)] : 1.0f;
        }
#pragma unroll
        for (u32 i = t; i < TOKENS * WIDTH; i += BLOCK) {
            const u32 token = i / WIDTH, at = i % WIDTH;
            values[i] = token < count && at < columns ? value[(start + token) * width + at] : 0.0f;
        }
        if (strength && t < count) strengths[t] = strength[start + t];
        __syncthreads();
        const float4 *own_queries = queries + share, *own_keys = keys + share, *own_decays = decays + share;
        const float *own_values = values + column;
        for (u32 token = 0; token < count; token++) {
            float write[COLUMNS], read[COLUMNS] = {}, known[COLUMNS] = {};
#pragma unroll
            for (u32 quad = 0; quad < QUADS; quad++) {
                const float4 a = own_decays[quad * SHARES];
                const float remains[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
                for (u32 i = 0; i < 4; i++)
#pragma unroll
                    for (u32 c = 0; c < COLUMNS; c++) state[quad][i][c] *= remains[i];
            }
            if (strength) {
#pragma unroll
                for (u32 quad = 0; quad < QUADS; quad++) {
                    const float4 k = own_keys[quad * SHARES];
                    const float added[4] = {k.x, k.y, k.z, k.w};
#pragma unroll
                    for (u32 i = 0; i < 4; i++)
#pragma unroll
                        for (u32 c = 0; c < COLUMNS; c++) known[c] += added[i] * state[quad][i][c];
                }
            }
#pragma unroll
            for (u32 c = 0; c < COLUMNS; c++) {
                write[c] = own_values[c];
                if (strength) write[c] = (write[c] - over_shares(known[c])) * strengths[token];
            }
#pragma unroll
            for (u32 quad = 0; quad < QUADS; quad++) {
                const float4 k = own_keys[quad * SHARES], q = own_queries[quad * SHARES];
                const float added[4] = {k.x, k.y, k.z, k.w}, asked[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
                for (u32 i = 0; i < 4; i++)
#pragma unroll
                    for (u32 c = 0; c < COLUMNS; c++) {
                        state[quad][i][c] += added[i] * write[c];
                        read[c] += asked[i] * state[quad][i][c];
                    }
            }
#pragma unroll
            for (u32 c = 0; c < COLUMNS; c++) {
                const float sum = over_shares(read[c]);
                if (share == c && column + c < columns) out[(start + token) * width + column + c] = sum;
            }
            own_queries += ROWS / 4;
            own_keys += ROWS / 4;
            own_decays += ROWS / 4;
            own_values += WIDTH;
        }
    }
}

#define OF_ROWS(most, blocks)                                                                               \
    extern "C" __global__ void __launch_bounds__(BLOCK, blocks) recurrence_##most(                          \
        const float *query, const float *key, const float *value, const float *decay, const float *strength, \
        u32 positions, u32 served, u32 rows, u32 width, u32 factors, float *out) {                          \
        recurrence<most>(query, key, value, decay, strength, positions, served, rows, width, factors, out);  \
    }
OF_ROWS(16, 4)
OF_ROWS(64, 4)
OF_ROWS(128, 4)
OF_ROWS(256, 2)
