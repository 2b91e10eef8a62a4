// Stored bytes to the values of a pass: the kernels beside `decode` in the worker's dtype.rs. Each
// value is computed in f32 as its format defines it and rounded once, as on the CPU.
//
// A launch decodes `count` values of a tensor, after `before` others. `found` is of all of them: 0,
// or, of the first value that does not fit its dtype, the complements of its place (high half) and
// of its bits in f32 (low half).
#include "values.cuh"

// How numbers are stored: `Number` in decode.rs.
constexpr u32 F32 = 0, F16 = 1, BF16 = 2, E8M0 = 3;

// A float of few bits: `code` without its sign, whose mantissa ends at `shift` bits of an f32, in
// which it is 2^bias times too small. The product is exact, also for what is subnormal.
__device__ inline float few_bits(u32 code, u32 shift, float bias, u32 sign) {
    return __uint_as_float(__float_as_uint(__uint_as_float(code << shift) * bias) | sign);
}

// 4 bits of exponent with bias 7, 3 of mantissa; no infinities, all ones is NaN.
__device__ inline float e4m3(u32 code) {
    const float value = few_bits(code & 0x7f, 20, 0x1p120f, (code & 0x80) << 24);
    return (code & 0x7f) == 0x7f ? __uint_as_float(0x7fc00000) : value;
}

// 2 bits of exponent with bias 1, one of mantissa.
__device__ inline float e2m1(u32 code) { return few_bits(code & 7, 22, 0x1p126f, (code & 8) << 28); }

// Powers of two. 255, which is NaN, is refused before.
__device__ inline float e8m0(u32 code) { return __uint_as_float(code == 0 ? 1u << 22 : code << 23); }

__device__ inline float number(const void *stored, u32 kind, u32 at) {
    if (kind == F32) return ((const float *)stored)[at];
    if (kind == F16) return value(((const f16 *)stored)[at]);
    if (kind == BF16) return value(((const bf16 *)stored)[at]);
    const u32 code = ((const unsigned char *)stored)[at];
    return kind == E8M0 ? e8m0(code) : e4m3(code);
}

// Bits of the largest magnitude that a dtype holds, before it is rounded.
template <typename T>
constexpr u32 LIMIT = 0x7f7fffffu;
template <>
constexpr u32 LIMIT<bf16> = 0x7f7f7fffu;
template <>
constexpr u32 LIMIT<f16> = 0x477fefffu;

// To nearest, ties to even. `Compute::narrow` in the worker.
__device__ inline void narrow(float x, f32 &to) { to = x; }
__device__ inline void narrow(float x, bf16 &to) {
    const u32 bits = __float_as_uint(x);
    to.bits = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
__device__ inline void narrow(float x, f16 &to) {
    constexpr u32 LEAST_NORMAL = 113u << 23, HALF = 126u << 23, REBIAS = 112u << 23;
    const u32 bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
    // At 0.5 the last place of an f32 is that of a subnormal f16: adding rounds to it.
    const u32 subnormal = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - HALF;
    const u32 normal = (magnitude - REBIAS + 0xfffu + (magnitude >> 13 & 1)) >> 13;
    to.bits = (magnitude < LEAST_NORMAL ? subnormal : normal) | (bits >> 16 & 0x8000u);
}

// Writes a value, and notes it if it does not fit.
template <typename T>
__device__ void put(float x, u32 at, u32 before, T *values, u64 *found) {
    narrow(x, values[at]);
    if (magnitude(x) <= LIMIT<T>) return;
    u64 noted;
    asm("mov.b64 %0, {%1, %2};" : "=l"(noted) : "r"(~__float_as_uint(x)), "r"(~(before + at)));
    atomicMax(found, noted);
}

// Floats one after the other. They may lie where the values of the same dtype come to lie.
template <typename T>
__device__ void plain(const void *stored, u32 kind, u32 count, u32 before, T *values, u64 *found) {
    const u32 i = blockIdx.x * THREADS + threadIdx.x;
    if (i < count) put(number(stored, kind, i), i, before, values, found);
}

// FP8 in e4m3: whole rows of a matrix of `columns`, under a grid of scales, `across` in a row, each
// of which is for a tile. The first row is row `row` of the first tile.
template <typename T>
__device__ void tiles(const unsigned char *codes, const void *scales, u32 kind, u32 columns, u32 tile_rows,
                      u32 tile_columns, u32 across, u32 row, u32 count, u32 before, T *values, u64 *found) {
    const u32 i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    const u32 tile = (row + i / columns) / tile_rows * across + i % columns / tile_columns;
    put(e4m3(codes[i]) * number(scales, kind, tile), i, before, values, found);
}

// Two codes of 4 bits per byte, the low half first, in groups of an even number of values under one
// scale each, which is first multiplied by `whole`. Codes are integers less 8, or e2m1. One thread
// per byte.
template <typename T>
__device__ void pairs(const unsigned char *codes, u32 are_integers, const void *scales, u32 kind, float whole,
                      u32 group, u32 count, u32 before, T *values, u64 *found) {
    const u32 i = 2 * (blockIdx.x * THREADS + threadIdx.x);
    if (i >= count) return;
    const float scale = number(scales, kind, i / group) * whole;
    const u32 byte = codes[i / 2];
    for (u32 half = 0; half < 2; half++) {
        const u32 code = byte >> 4 * half & 15;
        const float unscaled = are_integers ? float(int(code) - 8) : e2m1(code);
        put(unscaled * scale, i + half, before, values, found);
    }
}

#define EACH_TYPE(type)                                                                                  \
    KERNEL(type, plain, (const void *stored, u32 kind, u32 count, u32 before, type *values, u64 *found), \
           (stored, kind, count, before, values, found))                                                 \
    KERNEL(type, tiles,                                                                                  \
           (const unsigned char *codes, const void *scales, u32 kind, u32 columns, u32 tile_rows,        \
            u32 tile_columns, u32 across, u32 row, u32 count, u32 before, type *values, u64 *found),     \
           (codes, scales, kind, columns, tile_rows, tile_columns, across, row, count, before, values, found)) \
    KERNEL(type, pairs,                                                                                  \
           (const unsigned char *codes, u32 are_integers, const void *scales, u32 kind, float whole,     \
            u32 group, u32 count, u32 before, type *values, u64 *found),                                 \
           (codes, are_integers, scales, kind, whole, group, count, before, values, found))
EACH_TYPE(f32)
EACH_TYPE(bf16)
EACH_TYPE(f16)
