// Norms, rotations, the softmax of attention, convolutions, gates and sums, each in one pass, as
// worker/src/fused.rs computes them on a CPU: the same operations in the same order, in f32, and
// rounded to the dtype in the same places. The results are the same bits.
#include "values.cuh"

template <typename T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
    return x;
}
template <>
__device__ inline bf16 narrow<bf16>(float x) {
    const u32 bits = __float_as_uint(x);
    const u32 rounded = bits + 0x7fff + (bits >> 16 & 1);
    // What is no number stays so.
    return {(unsigned short)((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40 : rounded >> 16)};
}
template <>
__device__ inline f16 narrow<f16>(float x) {
    f16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    return result;
}

__device__ inline float larger(float a, float b) { return b > a ? b : a; }

// e^x for x <= 0.
__device__ inline float exp_negative(float x) {
    x = fmaxf(x, -87.0f);
    const float n = (x * 1.44269504088896340736f + 12582912.0f) - 12582912.0f;
    const float r = x - n * 0.6933594f - n * -2.1219444e-4f;
    float p = 1.9875692e-4f;
    p = p * r + 1.3982e-3f;
    p = p * r + 8.333452e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    const float y = p * r * r + r + 1.0f;
    return y * __uint_as_float(u32(__float2int_rz(n) + 127) << 23);
}

__device__ inline float sigmoid(float x) {
    const float e = exp_negative(-fabsf(x));
    return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

__device__ inline float gelu_tanh(float x) {
    return x * sigmoid(1.5957692f * (x + 0.044715f * x * x * x));
}

__device__ inline float at_most(float x, float limit) { return x > limit ? limit : x; }

// ------------------------------------------------------------------------------- rows as a whole

// A row has sixteen threads, as the CPU form has sixteen lanes.
constexpr u32 LANES = 16;

// The threads of a block's row. Threads without a row have a row without values.
struct RowThread {
    u32 row, lane;

    __device__ RowThread() : row(blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES), lane(threadIdx.x % LANES) {}
};

// The sum of `term(i)` over a row: of each lane, then of all lanes, then of what is left over.
// `lanes` has room for twice THREADS; for whole blocks.
template <typename F>
__device__ float lane_sum(u32 width, float *lanes, F term) {
    const u32 t = threadIdx.x, lane = t % LANES, whole = width - width % LANES;
    float own = 0;
    for (u32 i = lane; i < whole; i += LANES) own += term(i);
    const float left = whole + lane < width ? term(whole + lane) : 0.0f;
    __syncthreads();
    lanes[t] = own;
    lanes[THREADS + t] = left;
    __syncthreads();
    float sum = 0, rest = 0;
    for (u32 i = 0; i < LANES; i++) sum += lanes[t - lane + i];
    for (u32 i = 0; i < LANES; i++) rest += lanes[THREADS + t - lane + i];
    return sum + rest;
}

// The largest `term(i)` of a row; minus infinity if there is none. NaNs are passed over. As above.
template <typename F>
__device__ float lane_max(u32 width, float *lanes, F term) {
    const u32 t = threadIdx.x, lane = t % LANES, whole = width - width % LANES;
    float own = -INFINITY;
    for (u32 i = lane; i < whole; i += LANES) own = larger(own, term(i));
    const float left = whole + lane < width ? term(whole + lane) : -INFINITY;
    __syncthreads();
    lanes[t] = own;
    lanes[THREADS + t] = left;
    __syncthreads();
    float top = -INFINITY;
    for (u32 i = 0; i < LANES; i++) top = larger(top, lanes[THREADS + t - lane + i]);
    for (u32 i = 0; i < LANES; i++) top = larger(top, lanes[t - lane + i]);
    return top;
}

// x / sqrt(mean(x^2) + eps) * gain, and then + residual if there is one.
template <typename T>
__device__ void rms_norm(const T *x, const T *gain, const T *residual, u32 rows, u32 width, float eps, T *out) {
    __shared__ float lanes[2 * THREADS];
    const RowThread at;
    const u32 end = at.row < rows ? width : 0;
    x += u64(at.row) * width;
    const float squares = lane_sum(end, lanes, [=](u32 i) { return value(x[i]) * value(x[i]); });
    const float scale = 1.0f / sqrtf(squares / float(width) + eps);
    u32 i = at.lane;
    in_order<4>(x + i, LANES, share_of(end, i, LANES), [&](T x) {
        const T normed = narrow<T>(value(narrow<T>(value(x) * scale)) * value(gain[i]));
        const u64 place = u64(at.row) * width + i;
        out[place] = residual ? narrow<T>(value(normed) + value(residual[place])) : normed;
        i += LANES;
    });
}

// (x - mean) / sqrt(variance + eps) * gain + bias.
template <typename T>
__device__ void layer_norm(const T *x, const T *gain, const T *bias, u32 rows, u32 width, float eps, T *out) {
    __shared__ float lanes[2 * THREADS];
    const RowThread at;
    const u32 end = at.row < rows ? width : 0;
    x += u64(at.row) * width;
    out += u64(at.row) * width;
    const float mean = lane_sum(end, lanes, [=](u32 i) { return value(x[i]); }) / float(width);
    const float squares =
        lane_sum(end, lanes, [=](u32 i) { return (value(x[i]) - mean) * (value(x[i]) - mean); });
    const float scale = 1.0f / sqrtf(squares / float(width) + eps);
    u32 i = at.lane;
    in_order<4>(x + i, LANES, share_of(end, i, LANES), [&](T x) {
        out[i] = narrow<T>((value(x) - mean) * scale * value(gain[i]) + value(bias[i]));
        i += LANES;
    });
}

// What a block of scores stands for: `ScoreBlock` in worker/src/fused.rs. A window of whole chunks
// has `chunk` keys; without one, `chunk` is 0 and a query sees the last `window` keys.
struct VisibleKeys {
    u32 start, end;

    __device__ VisibleKeys(u32 position, u32 first_key, u32 keys, u32 window, u32 chunk) {
        const u32 first = chunk ? position - position % chunk : position + 1 - min(window, position + 1);
        start = column(first, first_key, keys);
        end = column(position + 1, first_key, keys);
    }

    __device__ static u32 column(u32 key, u32 first_key, u32 keys) {
        return min(key > first_key ? key - first_key : 0, keys);
    }
};

// Softmax of x * scale over the keys that a row's query sees, 0 elsewhere. Row r belongs to query
// r % queries of head (first_head + r / queries) % heads, whose sink, if there are sinks, is one
// more logit.
template <typename T>
__device__ void softmax(T *x, u32 rows, u32 keys, u32 queries, u32 first_query, u32 first_key, u32 window, u32 chunk,
                        float scale, const float *sinks, u32 first_head, u32 heads) {
    __shared__ float lanes[2 * THREADS];
    const RowThread at;
    const bool is_there = at.row < rows;
    const VisibleKeys visible(first_query + at.row % queries, first_key, keys, window, chunk);
    const u32 start = is_there ? visible.start : 0, end = is_there ? visible.end : 0;
    const float sink = sinks ? sinks[(first_head + at.row / queries) % heads] : -INFINITY;
    x += u64(at.row) * keys;
    const T *from = x + start;
    const float top = fmaxf(lane_max(end - start, lanes, [=](u32 i) { return value(from[i]); }) * scale, sink);
    const auto share = [=](u32 i) { return exp_negative(value(from[i]) * scale - top); };
    const float of_sink = sink == -INFINITY ? 0.0f : exp_negative(sink - top);
    const float inverse = 1.0f / (lane_sum(end - start, lanes, share) + of_sink);
    if (!is_there) return;
    for (u32 i = at.lane; i < keys; i += LANES)
        x[i] = i < start || i >= end ? narrow<T>(0.0f) : narrow<T>(share(i - start) * inverse);
}

// Of each row the largest value, the sum of e^(value - largest), and the value at its target's
// column: 0 where that is none.
template <typename T>
__device__ void logit_parts(const T *x, const u32 *targets, u32 first, u32 rows, u32 width, float *parts) {
    __shared__ float lanes[2 * THREADS];
    const RowThread at;
    const u32 end = at.row < rows ? width : 0;
    x += u64(at.row) * width;
    const float top = lane_max(end, lanes, [=](u32 i) { return value(x[i]); });
    const float sum = lane_sum(end, lanes, [=](u32 i) { return exp_negative(value(x[i]) - top); });
    if (at.lane > 0 || at.row >= rows) return;
    // Targets before the first column wrap around to beyond the last.
    const u32 target = targets[at.row] - first;
    parts += 3 * u64(at.row);
    parts[0] = top;
    parts[1] = sum;
    parts[2] = target < width ? value(x[target]) : 0.0f;
}

// The causal convolution of each channel over `kernel` tokens, plus its bias if there are some,
// then SiLU, then, if `length` is not 0, each row as a vector of that length: `Convolution` in
// worker/src/delta_net. x is [sequences * positions, heads * width], out [sequences * heads *
// positions, width] in f32. Taps of a channel are beside each other, the last for the current
// token; before a sequence there are zeros.
template <typename T>
__device__ void convolution(const T *x, const float *taps, const float *bias, u32 rows, u32 positions, u32 heads,
                            u32 width, u32 kernel, u32 first_channel, float length, float *out) {
    __shared__ float lanes[2 * THREADS];
    const RowThread at;
    const u32 end = at.row < rows ? width : 0;
    const u32 position = at.row % positions, head = at.row / positions % heads, sequence = at.row / positions / heads;
    const u32 columns = heads * width, seen = min(kernel, position + 1);
    x += (u64(sequence) * positions + position + 1 - seen) * columns + head * width;
    const u32 channel = first_channel + head * width;
    taps += u64(channel) * kernel + (kernel - seen);
    out += u64(at.row) * width;
    for (u32 i = at.lane; i < end; i += LANES) {
        float sum = 0;
        for (u32 tap = 0; tap < seen; tap++) sum += value(x[u64(tap) * columns + i]) * taps[u64(i) * kernel + tap];
        if (bias) sum += bias[channel + i];
        out[i] = sum * sigmoid(sum);
    }
    if (length == 0.0f) return;
    // Each thread reads what it has written itself.
    const float squares = lane_sum(end, lanes, [=](u32 i) { return out[i] * out[i]; });
    const float scale = length / sqrtf(squares + 1e-6f);
    for (u32 i = at.lane; i < end; i += LANES) out[i] *= scale;
}

// -------------------------------------------------------------------------------- value by value

// Columns of a block, which are of row blockIdx.x.
constexpr u32 COLUMNS = 4 * THREADS;

// Does something for each of the block's columns.
template <typename F>
__device__ void each_column(u32 width, F what) {
    const u32 first = blockIdx.y * COLUMNS + threadIdx.x, end = min(width, (blockIdx.y + 1) * COLUMNS);
    for (u32 i = first; i < end; i += THREADS) what(i);
}

// Turns each pair of a part of each head by its position's angle. `table` has the cosines of all
// positions and pairs, then `sines` values behind them the sines. Members of pair p of a head are
// at first + p * step and `distance` behind.
template <typename T>
__device__ void rope(T *x, const float *table, u32 sines, u32 width, u32 positions, u32 head_dim, u32 first, u32 pairs,
                     u32 step, u32 distance) {
    x += u64(blockIdx.x) * width;
    table += u64(blockIdx.x % positions) * pairs;
    each_column(width / head_dim * pairs, [=](u32 i) {
        const u32 head = i / pairs, pair = i % pairs;
        T *one = x + head * head_dim + first + pair * step, *other = one + distance;
        const float cosine = table[pair], sine = table[sines + pair];
        const float a = value(*one), b = value(*other);
        *one = narrow<T>(a * cosine - b * sine);
        *other = narrow<T>(b * cosine + a * sine);
    });
}

// `Gate` in worker/src/fused.rs.
enum GateKind : u32 { SILU, SIGMOID, GELU_TANH, CLAMPED };

// What a gate lets through of `up`. Rows of both are `stride` values apart and their columns
// `step`; `out` is [rows, width], and may be where the gates are.
template <typename T>
__device__ void gate(const T *gates, const T *up, u32 stride, u32 step, u32 width, u32 kind, float limit, float alpha,
                     T *out) {
    gates += u64(blockIdx.x) * stride;
    up += u64(blockIdx.x) * stride;
    out += u64(blockIdx.x) * width;
    each_column(width, [=](u32 i) {
        const float g = value(gates[i * step]), u = value(up[i * step]);
        if (kind == CLAMPED) {
            const float open = at_most(g, limit), through = -at_most(-at_most(u, limit), limit);
            out[i] = narrow<T>((through + 1.0f) * (open * sigmoid(alpha * open)));
        } else {
            const float open = kind == SILU ? g * sigmoid(g) : kind == SIGMOID ? sigmoid(g) : gelu_tanh(g);
            out[i] = narrow<T>(value(narrow<T>(open)) * u);
        }
    });
}

// `Activation` in worker/src/fused.rs.
enum ActivationKind : u32 { RELU, RELU_SQUARED, GELU };

template <typename T>
__device__ void activate(T *x, u32 width, u32 kind) {
    x += u64(blockIdx.x) * width;
    each_column(width, [=](u32 i) {
        const float v = value(x[i]), positive = v < 0.0f ? 0.0f : v;
        x[i] = narrow<T>(kind == RELU ? positive : kind == RELU_SQUARED ? positive * positive : gelu_tanh(v));
    });
}

// x + y, in the place of x. Rows of y are `stride` values apart: 0 where there is one for all.
template <typename T>
__device__ void sum(T *x, const T *y, u32 width, u32 stride) {
    x += u64(blockIdx.x) * width;
    y += u64(blockIdx.x) * stride;
    each_column(width, [=](u32 i) { x[i] = narrow<T>(value(x[i]) + value(y[i])); });
}

#define EACH_TYPE(type)                                                                             \
    KERNEL(type, rms_norm,                                                                          \
           (const type *x, const type *gain, const type *residual, u32 rows, u32 width, float eps,  \
            type *__restrict__ out),                                                                \
           (x, gain, residual, rows, width, eps, out))                                              \
    KERNEL(type, layer_norm,                                                                        \
           (const type *x, const type *gain, const type *bias, u32 rows, u32 width, float eps,      \
            type *__restrict__ out),                                                                \
           (x, gain, bias, rows, width, eps, out))                                                  \
    KERNEL(type, softmax,                                                                           \
           (type *x, u32 rows, u32 keys, u32 queries, u32 first_query, u32 first_key, u32 window, u32 chunk, \
            float scale, const float *sinks, u32 first_head, u32 heads),                            \
           (x, rows, keys, queries, first_query, first_key, window, chunk, scale, sinks, first_head, heads)) \
    KERNEL(type, logit_parts,                                                                       \
           (const type *x, const u32 *targets, u32 first, u32 rows, u32 width, float *parts),       \
           (x, targets, first, rows, width, parts))                                                 \
    KERNEL(type, convolution,                                                                       \
           (const type *x, const float *taps, const float *bias, u32 rows, u32 positions, u32 heads, u32 width, \
            u32 kernel, u32 first_channel, float length, float *out),                               \
           (x, taps, bias, rows, positions, heads, width, kernel, first_channel, length, out))      \
    KERNEL(type, rope,                                                                              \
           (type *x, const float *table, u32 sines, u32 width, u32 positions, u32 head_dim, u32 first, u32 pairs, \
            u32 step, u32 distance),                                                                \
           (x, table, sines, width, positions, head_dim, first, pairs, step, distance))             \
    KERNEL(type, gate,                                                                              \
           (const type *gates, const type *up, u32 stride, u32 step, u32 width, u32 kind, float limit, float alpha, \
            type *out),                                                                             \
           (gates, up, stride, step, width, kind, limit, alpha, out))                               \
    KERNEL(type, activate, (type *x, u32 width, u32 kind), (x, width, kind))                        \
    KERNEL(type, sum, (type *x, const type *y, u32 width, u32 stride), (x, y, width, stride))
EACH_TYPE(f32)
EACH_TYPE(bf16)
EACH_TYPE(f16)
