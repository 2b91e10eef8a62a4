// Softmax attention of whole sequences in one pass: scores stay in registers (FlashAttention-2,
// arXiv 2307.08691). Products are of bf16 and sums of f32; shares are rounded to bf16 before they
// multiply values.
//
// A block has ROWS queries of one head, 16 for each warp. It goes through tiles of keys and values,
// the next of which is copied while one is multiplied. Blocks with the last queries, which see most
// keys, are launched first.
#include "values.cuh"

constexpr u32 WARPS = THREADS / 32;
constexpr u32 ROWS = 16 * WARPS;
constexpr float LOG2_E = 1.44269504088896340736f;

__device__ inline float exp2_of(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// Both as bf16, `low` in the lower half.
__device__ inline u32 pair(float low, float high) {
    u32 result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

// 16 bytes to shared memory, or as many zeros. They are there when the copies were waited for.
__device__ inline void copy(u32 to, const void *from, bool is_there) {
    const u32 bytes = is_there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Four matrices of 8 rows of 16 bytes, whose addresses the lanes have, one after the other.
__device__ inline void load(u32 (&to)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

__device__ inline void load_transposed(u32 (&to)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

// Adds a product of 16 x 16 and 16 x 8 to 16 x 8. A lane has rows `lane / 4` and 8 further, columns
// `2 (lane % 4)` and the next one.
__device__ inline void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Of the four lanes that have a row.
__device__ inline float largest_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ inline float sum_of_row(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

struct Window {
    // Keys that a query sees at most; keys of a chunk, 0 without chunks.
    u32 keys, chunk;

    // The first key that the query of a position sees.
    __device__ u32 first(u32 position) const {
        const u32 first = position + 1 > keys ? position + 1 - keys : 0;
        return chunk ? max(first, position - position % chunk) : first;
    }
};

// Rows of `WIDTH` values in shared memory. With an odd number of 16 bytes in each, the same 16
// bytes of eight rows lie in different banks.
template <u32 WIDTH>
constexpr u32 ROW_BYTES = (WIDTH / 8 | 1) * 16;

// Copies rows `first ..` of `[rows, WIDTH]`, zeros for those that are not there.
template <u32 WIDTH, u32 KEYS>
__device__ inline void copy_tile(u32 to, const bf16 *from, u32 first, u32 rows) {
    constexpr u32 PARTS = WIDTH / 8, ALL = KEYS * PARTS;
    from += u64(first) * WIDTH;
#pragma unroll
    for (u32 done = 0; done < ALL; done += THREADS) {
        const u32 i = done + threadIdx.x;
        // Where the parts of a row divide the threads, addresses differ by what the compiler knows.
        const u32 row = THREADS % PARTS ? i / PARTS : threadIdx.x / PARTS + done / PARTS;
        const u32 part = (THREADS % PARTS ? i : threadIdx.x) % PARTS;
        if (ALL % THREADS == 0 || i < ALL) {
            // Nothing is read where nothing is.
            copy(to + row * ROW_BYTES<WIDTH> + 16 * part, from + row * WIDTH + 8 * part, first + row < rows);
        }
    }
}

// Queries are `[sequences * positions, heads, D]`, those of tokens `query_stride` apart; keys
// `[sequences * heads / group, positions, D]` and values alike, V wide; `out` `[sequences *
// positions, heads * V]`. `sinks`, if any, has a logit for each head. `shares`, if any, gets of
// each query of `[sequences * heads, positions]` the largest share of a key and that of the first
// key. The grid is sequences * heads by blocks of ROWS queries.
template <u32 D, u32 V, u32 KEYS>
__device__ void attention(const bf16 *query, const bf16 *key, const bf16 *value, const float *sinks, u32 positions,
                          u32 heads, u32 group, u32 query_stride, Window window, float scale, bf16 *out,
                          float2 *shares) {
    constexpr u32 KEY_BYTES = KEYS * ROW_BYTES<D>, TILE_BYTES = KEY_BYTES + KEYS * ROW_BYTES<V>;
    extern __shared__ __align__(16) unsigned char tiles[];
    const u32 shared = u32(__cvta_generic_to_shared(tiles));
    const u32 lane = threadIdx.x % 32, head = blockIdx.x % heads;
    const u32 first_of_block = (gridDim.y - 1 - blockIdx.y) * ROWS;
    const u32 first_of_warp = first_of_block + threadIdx.x / 32 * 16;
    const u32 rows[2] = {first_of_warp + lane / 4, first_of_warp + lane / 4 + 8};
    const u64 token = u64(blockIdx.x / heads) * positions;
    key += u64(blockIdx.x / group) * positions * D;
    value += u64(blockIdx.x / group) * positions * V;

    u32 q[D / 16][4];
    {
        const u32 *of_row[2];
        for (u32 i = 0; i < 2; i++) {
            const u64 at = (token + min(rows[i], positions - 1)) * query_stride + head * D;
            of_row[i] = reinterpret_cast<const u32 *>(query + at) + lane % 4;
        }
#pragma unroll
        for (u32 k = 0; k < D / 16; k++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) q[k][i] = of_row[i % 2][8 * k + i / 2 * 4];
        }
    }

    // What this lane has to load of a tile's keys and values. Of keys, the second matrix is the
    // second half of the rows of the first one: so both factors of a product are adjacent.
    const u32 key_at = (lane - (lane + 8) / 16 * 8) * ROW_BYTES<D> + lane / 8 % 2 * 16;
    const u32 value_at = KEY_BYTES + lane % 16 * ROW_BYTES<V> + lane / 16 * 16;

    // By row: the largest score, the sum of this lane's exponentials, the score of the first key.
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {}, first_score[2] = {-INFINITY, -INFINITY};
    float mixed[V / 8][4] = {};
    const float factor = scale * LOG2_E;

    const u32 seen[2] = {window.first(rows[0]), window.first(rows[1])};
    const u32 seen_of_warp = window.first(first_of_warp), seen_by_last = window.first(first_of_warp + 15);
    u32 tile = window.first(first_of_block) / KEYS;
    const u32 end = (min(first_of_block + ROWS, positions) - 1) / KEYS + 1;
    copy_tile<D, KEYS>(shared + tile % 2 * TILE_BYTES, key, tile * KEYS, positions);
    copy_tile<V, KEYS>(shared + tile % 2 * TILE_BYTES + KEY_BYTES, value, tile * KEYS, positions);
    asm volatile("cp.async.commit_group;" ::: "memory");
    for (; tile < end; tile++) {
        const u32 at = shared + tile % 2 * TILE_BYTES, first_key = tile * KEYS;
        // The tile is there, and nobody reads the other one any more.
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncthreads();
        if (tile + 1 < end) {
            const u32 next = shared + (tile + 1) % 2 * TILE_BYTES;
            copy_tile<D, KEYS>(next, key, first_key + KEYS, positions);
            copy_tile<V, KEYS>(next + KEY_BYTES, value, first_key + KEYS, positions);
            asm volatile("cp.async.commit_group;" ::: "memory");
        }
        if (first_key > first_of_warp + 15 || first_key + KEYS <= seen_of_warp || first_of_warp >= positions) continue;

        float score[KEYS / 8][4] = {};
        // Loads take longer than products: those of a step are on their way while the step before
        // is multiplied. A step has 16 values of 16 keys, or of 32 where registers are left.
        constexpr u32 LOADS = D <= 80 ? 1 : 2, PARTS = KEYS / 16 / LOADS, STEPS = D / 16 * PARTS;
        u32 keys[2][LOADS][4];
        const auto load_keys = [&](u32 step) {
#pragma unroll
            for (u32 i = 0; i < LOADS; i++) {
                const u32 first = (step % PARTS * LOADS + i) * 16;
                load(keys[step % 2][i], at + key_at + first * ROW_BYTES<D> + step / PARTS * 32);
            }
        };
        load_keys(0);
#pragma unroll
        for (u32 step = 0; step < STEPS; step++) {
            if (step + 1 < STEPS) load_keys(step + 1);
#pragma unroll
            for (u32 n = 0; n < 2 * LOADS; n++) {
                const u32(&of)[4] = keys[step % 2][n / 2];
                multiply(score[step % PARTS * 2 * LOADS + n], q[step / PARTS], of[n % 2 * 2], of[n % 2 * 2 + 1]);
            }
        }
        // Tiles that all queries of the warp see need no mask.
        if (first_key + KEYS - 1 > first_of_warp || first_key < seen_by_last) {
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    const u32 position = first_key + 8 * n + lane % 4 * 2 + i % 2;
                    if (position > rows[i / 2] || position < seen[i / 2]) score[n][i] = -INFINITY;
                }
            }
        }
        if (tile == 0) {
            first_score[0] = score[0][0];
            first_score[1] = score[0][2];
        }
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            float larger = top[i];
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; n++) larger = fmaxf(larger, fmaxf(score[n][2 * i], score[n][2 * i + 1]));
            larger = largest_of_row(larger);
            // Of a row that has seen nothing yet all exponentials are 0.
            const float subtracted = larger == -INFINITY ? 0.0f : larger * factor;
            // Exactly 1 where no score is larger: both were rounded alike.
            const float shrink = exp2_of(top[i] * factor - subtracted);
            top[i] = larger;
            sum[i] *= shrink;
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (u32 j = 2 * i; j < 2 * i + 2; j++) {
                    score[n][j] = exp2_of(fmaf(score[n][j], factor, -subtracted));
                    sum[i] += score[n][j];
                }
            }
#pragma unroll
            for (u32 n = 0; n < V / 8; n++) {
                mixed[n][2 * i] *= shrink;
                mixed[n][2 * i + 1] *= shrink;
            }
        }
#pragma unroll
        for (u32 k = 0; k < KEYS / 16; k++) {
            // The lanes have two sums of 16 x 8 as they must have a factor of 16 x 16.
            const u32 share[4] = {pair(score[2 * k][0], score[2 * k][1]), pair(score[2 * k][2], score[2 * k][3]),
                                  pair(score[2 * k + 1][0], score[2 * k + 1][1]),
                                  pair(score[2 * k + 1][2], score[2 * k + 1][3])};
#pragma unroll
            for (u32 n = 0; n < V / 16; n++) {
                u32 values[4];
                load_transposed(values, at + value_at + k * 16 * ROW_BYTES<V> + n * 32);
                multiply(mixed[2 * n], share, values[0], values[1]);
                multiply(mixed[2 * n + 1], share, values[2], values[3]);
            }
        }
    }

    const float sink = sinks ? sinks[head] * LOG2_E : -INFINITY;
    for (u32 i = 0; i < 2; i++) {
        const float own = top[i] * factor, larger = fmaxf(own, sink), kept = exp2_of(own - larger);
        const float share = kept / (sum_of_row(sum[i]) * kept + exp2_of(sink - larger));
        if (rows[i] >= positions) continue;
        bf16 *to = out + ((token + rows[i]) * heads + head) * V + lane % 4 * 2;
#pragma unroll
        for (u32 n = 0; n < V / 8; n++) {
            *reinterpret_cast<u32 *>(to + 8 * n) = pair(mixed[n][2 * i] * share, mixed[n][2 * i + 1] * share);
        }
        if (shares && lane % 4 == 0) {
            const auto share_of = [&](float score) { return exp2_of(fmaf(score, factor, -own)) * share; };
            shares[u64(blockIdx.x) * positions + rows[i]] = make_float2(share_of(top[i]), share_of(first_score[i]));
        }
    }
}

// Narrow heads leave registers for a second block of a processor.
#define ATTENTION(D, V, KEYS)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, D <= 80 ? 2 : 1) attention_##D##_##V(                        \
        const bf16 *query, const bf16 *key, const bf16 *value, const float *sinks, u32 positions, u32 heads,           \
        u32 group, u32 query_stride, u32 window, u32 chunk, float scale, bf16 *out, float2 *shares) {                  \
        attention<D, V, KEYS>(query, key, value, sinks, positions, heads, group, query_stride, {window, chunk}, scale, \
                              out, shares);                                                                            \
    }

ATTENTION(64, 64, 64)
ATTENTION(80, 80, 64)
ATTENTION(96, 96, 64)
ATTENTION(128, 128, 64)
ATTENTION(192, 128, 64)
// Half as many keys, so that both tiles fit into 100 KB.
ATTENTION(256, 256, 32)
