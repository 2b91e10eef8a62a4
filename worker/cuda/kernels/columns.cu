// Columns of activations: how often they exceed and where, extremes, sums of powers. `Columns` in
// worker/scan.
#include "values.cuh"

// What is kept of each (strip, column), in planes [strips, width]: rows that exceed and those with
// x > 0 among them, as bits; the largest and the smallest value, sums of x, x^2, x^3, x^4.
// One thread per column; blocks of THREADS columns along y, a strip each along x.
template <typename T>
__device__ void strips(const T *x, u32 width, u32 tokens, float threshold, u32 *marks, float *parts) {
    const u32 column = blockIdx.y * THREADS + threadIdx.x;
    if (column >= width) return;
    const u32 strips = (tokens + STRIP - 1) / STRIP;
    const u32 sequence = blockIdx.x / strips, first = blockIdx.x % strips * STRIP;
    const u32 rows = tokens - first < STRIP ? tokens - first : STRIP;
    x += (u64(sequence) * tokens + first) * width + column;
    u32 exceeds = 0, positive = 0;
    float max = -__int_as_float(0x7f800000), min = __int_as_float(0x7f800000);
    float sum = 0, sum2 = 0, sum3 = 0, sum4 = 0;
    u32 row = 0;
    in_order<8>(x, width, rows, [&](T x) {
        const float v = value(x), v2 = v * v;
        const u32 hit = fabsf(v) >= threshold;
        exceeds |= hit << row;
        positive |= (hit & u32(v > 0)) << row;
        row++;
        max = v > max ? v : max;
        min = v < min ? v : min;
        sum += v;
        sum2 += v2;
        sum3 += v2 * v;
        sum4 += v2 * v2;
    });
    const u64 plane = u64(gridDim.x) * width, at = u64(blockIdx.x) * width + column;
    marks[at] = exceeds;
    marks[plane + at] = positive;
    parts[at] = max;
    parts[plane + at] = min;
    parts[2 * plane + at] = sum;
    parts[3 * plane + at] = sum2;
    parts[4 * plane + at] = sum3;
    parts[5 * plane + at] = sum4;
}

// Joins the strips of each sequence, in their order. `counts` and `extremes` are two planes
// [sequences, width], `sums` four. Blocks along y of a column for PLANES threads, a sequence each
// along x. A warp has one plane.
extern "C" __global__ void join(const u32 *marks, const float *parts, u32 width, u32 strips, u32 *counts,
                                float *extremes, double *sums) {
    constexpr u32 PLANES = 8;
    const u32 columns = blockDim.x / PLANES, plane = threadIdx.x / columns;
    const u32 column = blockIdx.y * columns + threadIdx.x % columns;
    if (column >= width) return;
    const u64 of_sequences = u64(gridDim.x) * width, of_strips = of_sequences * strips;
    const u64 at = u64(blockIdx.x) * width + column, from = u64(blockIdx.x) * strips * width + column;
    if (plane < 2) {
        u32 count = 0;
        in_order<16>(marks + plane * of_strips + from, width, strips, [&](u32 marks) { count += __popc(marks); });
        counts[plane * of_sequences + at] = count;
        return;
    }
    parts += (plane - 2) * of_strips + from;
    if (plane == 2) {
        float max = -__int_as_float(0x7f800000);
        in_order<16>(parts, width, strips, [&](float part) { max = part > max ? part : max; });
        extremes[at] = max;
    } else if (plane == 3) {
        float min = __int_as_float(0x7f800000);
        in_order<16>(parts, width, strips, [&](float part) { min = part < min ? part : min; });
        extremes[of_sequences + at] = min;
    } else {
        double sum = 0;
        in_order<16>(parts, width, strips, [&](float part) { sum += double(part); });
        sums[(plane - 4) * of_sequences + at] = sum;
    }
}

// The words of marks of some columns, `[listed, strips]` of all strips. A listed column per block
// along x, blocks of THREADS strips along y.
extern "C" __global__ void positions(const u32 *marks, const u32 *listed, u32 width, u32 strips, u32 *words) {
    const u32 strip = blockIdx.y * THREADS + threadIdx.x;
    if (strip < strips) words[u64(blockIdx.x) * strips + strip] = marks[u64(strip) * width + listed[blockIdx.x]];
}

#define EACH_TYPE(type)                                                                      \
    KERNEL(type, strips, (const type *x, u32 width, u32 tokens, float threshold, u32 *marks, float *parts), \
           (x, width, tokens, threshold, marks, parts))
EACH_TYPE(f32)
EACH_TYPE(bf16)
EACH_TYPE(f16)
