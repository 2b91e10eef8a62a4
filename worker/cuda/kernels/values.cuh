// What all kernels share: the dtypes of activations, and counting within a block.
//
// Activations are [rows, width], rows of whole sequences of `tokens` each; a strip is up to 32
// rows of one sequence, the first of which begins with it. Nothing depends on how many rows there
// are: the order of every sum is that of the CPU form in worker/scan.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

// Rows of a strip, and bits of a word of marks.
constexpr u32 STRIP = 32;
// Threads of a block at most.
constexpr u32 THREADS = 256;
// Threads of a warp.
constexpr u32 WARP = 32;
// Values of a digit.
constexpr u32 DIGITS = 256;

struct bf16 {
    unsigned short bits;
};
struct f16 {
    unsigned short bits;
};

__device__ inline float value(float x) { return x; }
__device__ inline float value(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
__device__ inline float value(f16 x) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
    return result;
}

// Bits of |x| as f32: in the order of magnitudes.
template <typename T>
__device__ u32 magnitude(T x) {
    return __float_as_uint(value(x)) & 0x7fffffffu;
}

// Magnitudes as four digits of 8 bits, the highest of which is at a shift of 24.
template <typename T>
__device__ u32 key(T x) {
    return magnitude(x) << 1;
}

// Below this shift the digits of a dtype's magnitudes are 0.
template <typename T>
constexpr int LAST_SHIFT = 0;
template <>
constexpr int LAST_SHIFT<bf16> = 16;
template <>
constexpr int LAST_SHIFT<f16> = 8;

__device__ inline u32 digit_at(u32 key, int shift) { return key >> shift & (DIGITS - 1); }

// Whether the digits above a shift are those of `prefix`.
__device__ inline bool is_within(u32 key, int shift, u32 prefix) { return shift == 24 || key >> (shift + 8) == prefix; }

// What all lanes of a warp have, exchanged.
__device__ inline u32 other(u32 value, u32 distance) { return __shfl_xor_sync(0xffffffffu, value, distance); }

__device__ inline u64 other(u64 value, u32 distance) {
    u64 result;
    asm("mov.b64 %0, {%1, %2};"
        : "=l"(result)
        : "r"(other(u32(value), distance)), "r"(other(u32(value >> 32), distance)));
    return result;
}

// The digit of the value of rank `*rank` (from 0, ascending) into `*digit`, and its rank among the
// values with that digit into `*rank`. `counts` are those of each digit; `sums` has room for each
// warp, as all but `counts` shared by the block. For whole blocks of a power of two of threads, a
// warp at least.
template <typename C>
__device__ void pick(const C *counts, C *sums, u32 *digit, C *rank) {
    const u32 t = threadIdx.x, each = DIGITS / blockDim.x;
    C own = 0;
    for (u32 i = 0; i < each; i++) own += counts[each * t + i];
    const C want = *rank;
    C below = 0, all = own;
    for (u32 distance = 1; distance < WARP; distance *= 2) {
        const C theirs = other(all, distance);
        if (t & distance) below += theirs;
        all += theirs;
    }
    if (t % WARP == 0) sums[t / WARP] = all;
    __syncthreads();
    for (u32 warp = 0; warp < t / WARP; warp++) below += sums[warp];
    if (below <= want && want < below + own) {
        u32 found = each * t;
        while (want >= below + counts[found]) below += counts[found++];
        *digit = found;
        *rank = want - below;
    }
    __syncthreads();
}

// Calls `what` with x[0], x[step], .. : `count` values, in this order. AHEAD of them, a power of
// two, are loaded before the first one is used: memory answers late.
template <u32 AHEAD, typename T, typename F>
__device__ inline void in_order(const T *x, u32 step, u32 count, F what) {
    for (; count >= AHEAD; count -= AHEAD, x += u64(AHEAD) * step) {
        T ahead[AHEAD];
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) ahead[i] = x[u64(i) * step];
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) what(ahead[i]);
    }
    if constexpr (AHEAD > 1) in_order<AHEAD / 2>(x, step, count, what);
}

// How many of `count` values a thread has that begins at `first` and takes each `step`-th.
__device__ inline u32 share_of(u32 count, u32 first, u32 step) {
    return first < count ? (count - first + step - 1) / step : 0;
}

// A kernel for each dtype: `NAME_f32`, `NAME_bf16`, `NAME_f16`, of a template NAME.
#define KERNEL(type, name, parameters, arguments) \
    extern "C" __global__ void name##_##type parameters { name arguments; }
typedef float f32;
