// Routers: which experts each token goes to, the pairs of token and expert in the order of experts,
// what experts are sent, and the sums of what they make. CPU forms: `ffn` in the worker. An expert
// that takes part in no choice any more has the key 0.
#include "values.cuh"

// A warp chooses for a token.
constexpr u32 LANES = WARP;
// Tokens whose choices are counted together.
constexpr u32 TILE = 64;
// Windows of 32 exponents that an f32's are in, as `ExactSum` in the worker has them, from this
// one.
constexpr u32 WINDOWS = 9, FIRST_WINDOW = 27;
// Of an expert: tokens at position 0, then the sums of weights of all its tokens and of those at
// position 0, by windows, each in two halves.
constexpr u32 LOAD = 1 + 4 * WINDOWS;

// By the numbers of `Kind` in worker/cuda.
enum Kind { SOFTMAX_TOP_K, TOP_K_SOFTMAX, SIGMOID_GROUPS, SIGMOID_OF_INPUT, SOFTMAX_GROUPS, NORMED_SOFTMAX };

// As `exp` in the worker's `ffn`, operation by operation.
__device__ inline float exponential(float x) {
    const double shift = 6755399441055744.0;
    if (!(x <= 88.72283f)) return x > 88.72283f ? __uint_as_float(0x7f800000u) : x;
    if (x < -103.97208f) return 0.0f;
    const double z = double(x) * 46.16624130844683;
    const double shifted = z + shift;
    const int k = int(u32(__double_as_longlong(shifted)));
    const double r = z - (shifted - shift);
    double scale = k & 1 ? 1.0218971486541166 : 1.0;
    scale *= k & 2 ? 1.0442737824274138 : 1.0;
    scale *= k & 4 ? 1.0905077326652577 : 1.0;
    scale *= k & 8 ? 1.189207115002721 : 1.0;
    scale *= k & 16 ? 1.4142135623730951 : 1.0;
    scale *= __longlong_as_double((long long)((k >> 5) + 1023) << 52);
    const double high = 1.6938359250920212e-06 * r + 0.00023459809789509004;
    const double low = 0.021660849396613134 * r + 1.0;
    return float((high * (r * r) + low) * scale);
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// In the order of scores; what is no number comes before all numbers.
__device__ inline u32 key_of(float score) {
    const u32 bits = __float_as_uint(score);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The largest of all lanes' values; NaNs are passed over.
__device__ inline float largest(float value) {
    for (u32 distance = LANES / 2; distance > 0; distance /= 2) {
        value = fmaxf(value, __uint_as_float(other(__float_as_uint(value), distance)));
    }
    return value;
}

// The first of the largest of `count` keys, which becomes 0. For whole warps.
__device__ inline u32 take_best(u32 *keys, u32 count) {
    u32 best = 0, at = count;
    for (u32 i = threadIdx.x; i < count; i += LANES) {
        if (keys[i] > best) {
            best = keys[i];
            at = i;
        }
    }
    for (u32 distance = LANES / 2; distance > 0; distance /= 2) {
        const u32 theirs = other(best, distance), their_place = other(at, distance);
        if (theirs > best || (theirs == best && their_place < at)) {
            best = theirs;
            at = their_place;
        }
    }
    if (threadIdx.x == 0 && at < count) keys[at] = 0;
    __syncthreads();
    return at;
}

// The best score of a group, or the sum of its two best.
__device__ inline float judged(const float *scores, u32 size, bool by_two) {
    float first = __uint_as_float(0xff800000u), second = first;
    for (u32 i = 0; i < size; i++) {
        if (scores[i] > first) {
            second = first;
            first = scores[i];
        } else {
            second = fmaxf(second, scores[i]);
        }
    }
    return by_two && size > 1 ? first + second : first;
}

// The experts of each row of `logits` [rows, experts] in ascending order, and their weights. A
// block of LANES threads per row. `scores` has room for twice as many numbers as logits, `keys` for
// experts + groups + top_k per row. `per_expert`: [experts], or null.
extern "C" __global__ void choose_experts(const float *logits, const float *per_expert, u32 experts, u32 top_k,
                                          u32 kind, u32 groups, u32 top_groups, u32 normalise, float factor,
                                          float *scores, u32 *keys, u32 *chosen, float *weights) {
    const u32 lane = threadIdx.x;
    const u64 row = blockIdx.x;
    logits += row * experts;
    scores += 2 * row * experts;
    float *biased = scores + experts;
    keys += row * (experts + groups + top_k);
    u32 *of_groups = keys + experts, *picked = of_groups + groups;
    chosen += row * top_k;
    weights += row * top_k;

    const bool is_softmax = kind == SOFTMAX_TOP_K || kind == SOFTMAX_GROUPS || kind == NORMED_SOFTMAX;
    if (is_softmax) {
        float top = __uint_as_float(0xff800000u);
        for (u32 e = lane; e < experts; e += LANES) top = fmaxf(top, logits[e]);
        top = largest(top);
        for (u32 e = lane; e < experts; e += LANES) scores[e] = exponential(logits[e] - top);
        __syncthreads();
        float sum = 0;
        for (u32 e = 0; e < experts; e++) sum += scores[e];
        __syncthreads();
        for (u32 e = lane; e < experts; e += LANES) scores[e] /= sum;
    } else {
        for (u32 e = lane; e < experts; e += LANES) {
            scores[e] = kind == SIGMOID_GROUPS ? sigmoid(logits[e]) : logits[e];
        }
    }
    for (u32 e = lane; e < experts; e += LANES) {
        biased[e] = kind == SIGMOID_GROUPS ? scores[e] + (per_expert ? per_expert[e] : 0.0f) : scores[e];
        keys[e] = key_of(biased[e]);
    }
    __syncthreads();

    if (top_groups < groups) {
        const u32 size = experts / groups;
        for (u32 g = lane; g < groups; g += LANES) {
            of_groups[g] = key_of(judged(biased + g * size, size, kind == SIGMOID_GROUPS));
        }
        __syncthreads();
        // A group that is taken has the key 0 from then on.
        for (u32 i = 0; i < top_groups; i++) take_best(of_groups, groups);
        for (u32 e = lane; e < experts; e += LANES) {
            if (of_groups[e / size] != 0) keys[e] = key_of(__uint_as_float(0xff800000u));
        }
        __syncthreads();
    }

    for (u32 i = 0; i < top_k; i++) {
        const u32 best = take_best(keys, experts);
        if (lane == 0) picked[i] = best;
    }
    __syncthreads();
    for (u32 i = lane; i < top_k; i += LANES) {
        u32 before = 0;
        for (u32 j = 0; j < top_k; j++) before += picked[j] < picked[i];
        chosen[before] = picked[i];
    }
    __syncthreads();

    if (kind == TOP_K_SOFTMAX) {
        float top = __uint_as_float(0xff800000u);
        for (u32 i = 0; i < top_k; i++) top = fmaxf(top, scores[chosen[i]]);
        for (u32 i = lane; i < top_k; i += LANES) weights[i] = exponential(scores[chosen[i]] - top);
    } else {
        for (u32 i = lane; i < top_k; i += LANES) {
            const float score = scores[chosen[i]];
            weights[i] = kind == SIGMOID_OF_INPUT ? sigmoid(score) : score;
        }
    }
    __syncthreads();
    float sum = 0;
    for (u32 i = 0; i < top_k; i++) sum += weights[i];
    if (kind == SIGMOID_GROUPS) sum += 1e-20f;
    __syncthreads();
    for (u32 i = lane; i < top_k; i += LANES) {
        if (normalise) weights[i] /= sum;
        weights[i] *= factor;
        if (kind == NORMED_SOFTMAX) weights[i] *= per_expert[chosen[i]];
    }
}

// The choices of a tile of tokens are [first, end).
__device__ inline u32 tile_end(u32 rows, u32 top_k) {
    const u32 end = (blockIdx.x + 1) * TILE;
    return (end < rows ? end : rows) * top_k;
}

// How often each expert was chosen for the tokens of a tile: `counts` [tiles, experts]. A block per
// tile and THREADS experts.
extern "C" __global__ void count_choices(const u32 *chosen, u32 rows, u32 top_k, u32 experts, u32 *counts) {
    const u32 e = blockIdx.y * THREADS + threadIdx.x;
    if (e >= experts) return;
    const u32 end = tile_end(rows, top_k);
    u32 count = 0;
    for (u32 i = blockIdx.x * TILE * top_k; i < end; i++) count += chosen[i] == e;
    counts[u64(blockIdx.x) * experts + e] = count;
}

// Counts become where an expert's pairs of a tile begin among all of the expert's; `firsts`
// [experts + 1] says where each expert's begin, and where the last one's end. One block of THREADS.
extern "C" __global__ void find_firsts(u32 *counts, u32 tiles, u32 experts, u64 *firsts) {
    for (u32 e = threadIdx.x; e < experts; e += THREADS) {
        u32 before = 0, *count = counts + e;
        in_order<16>(counts + e, experts, tiles, [&](u32 own) {
            *count = before;
            before += own;
            count += experts;
        });
        firsts[e + 1] = before;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        u64 before = 0;
        *firsts++ = 0;
        in_order<16>(firsts, 1, experts, [&](u64 own) { *firsts++ = before += own; });
    }
}

// Tokens and weights of all pairs, by expert, ascending by token. Blocks as of `count_choices`.
extern "C" __global__ void sort_pairs(const u32 *chosen, const float *weights, u32 rows, u32 top_k, u32 experts,
                                      const u32 *counts, const u64 *firsts, u32 *tokens, float *sorted) {
    const u32 e = blockIdx.y * THREADS + threadIdx.x;
    if (e >= experts) return;
    const u32 end = tile_end(rows, top_k);
    u64 at = firsts[e] + counts[u64(blockIdx.x) * experts + e];
    for (u32 i = blockIdx.x * TILE * top_k; i < end; i++) {
        if (chosen[i] != e) continue;
        tokens[at] = i / top_k;
        sorted[at] = weights[i];
        at++;
    }
}

// A sum of weights of one window, from FIRST_WINDOW: a whole number of 2^(32 window - 1046), in two
// halves of its bits.
struct Part {
    u32 window;
    u64 low, high;
};

__device__ inline Part part_of(float weight) {
    const u32 bits = __float_as_uint(weight);
    u32 exponent = bits >> 23 & 0xff, whole = bits & 0x7fffff;
    // That of the same number in f64 is larger by 896, and never that of a subnormal one.
    int wide = int(exponent) + 896;
    if (exponent > 0) {
        whole |= 0x800000;
    } else {
        if (whole == 0) return {};
        const u32 up = __clz(whole) - 8;
        whole <<= up;
        wide = 897 - int(up);
    }
    const u64 shifted = u64(whole) << (wide % 32);
    u64 low = shifted & 0xffffffffull, high = shifted >> 32;
    if (bits >> 31) {
        low = 0 - low;
        high = 0 - high;
    }
    return {u32(wide) / 32 - FIRST_WINDOW, low, high};
}

// `sums` are of all windows, shared by the block.
__device__ inline void add_part(u64 *sums, const Part &part) {
    if (part.low == 0 && part.high == 0) return;
    atomicAdd(&sums[2 * part.window], part.low);
    atomicAdd(&sums[2 * part.window + 1], part.high);
}

// What each expert was sent: `loads` [experts, LOAD]. The first row is that token of sequences of
// so many. A block per expert. Almost all weights are of one window, whose sum all threads would
// wait for: each adds up its own, then each warp.
extern "C" __global__ void sum_loads(const u32 *tokens, const float *weights, const u64 *firsts, u32 first_token,
                                     u32 per_sequence, u64 *loads) {
    __shared__ u64 load[LOAD];
    for (u32 i = threadIdx.x; i < LOAD; i += THREADS) load[i] = 0;
    __syncthreads();
    const u64 end = firsts[blockIdx.x + 1];
    Part own = {};
    for (u64 i = firsts[blockIdx.x] + threadIdx.x; i < end; i += THREADS) {
        const Part part = part_of(weights[i]);
        if (part.window != own.window) {
            add_part(load + 1, own);
            own = {part.window, 0, 0};
        }
        own.low += part.low;
        own.high += part.high;
        if ((first_token + tokens[i]) % per_sequence == 0) {
            atomicAdd(&load[0], 1ull);
            add_part(load + 1 + 2 * WINDOWS, part);
        }
    }
    // Of two lanes with the same window one takes the sums of both.
    for (u32 distance = LANES / 2; distance > 0; distance /= 2) {
        const Part theirs = {other(own.window, distance), other(own.low, distance), other(own.high, distance)};
        if (theirs.window != own.window) continue;
        const bool takes = (threadIdx.x & distance) == 0;
        own.low = takes ? own.low + theirs.low : 0;
        own.high = takes ? own.high + theirs.high : 0;
    }
    add_part(load + 1, own);
    __syncthreads();
    for (u32 i = threadIdx.x; i < LOAD; i += THREADS) loads[u64(blockIdx.x) * LOAD + i] = load[i];
}

__device__ inline float rounded(float x, float) { return x; }
__device__ inline bf16 rounded(float x, bf16) {
    bf16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    return result;
}
__device__ inline f16 rounded(float x, f16) {
    f16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    return result;
}

// The expert that a pair belongs to, by where each one's pairs begin: `firsts` [experts + 1].
__device__ inline u32 expert_of(const u32 *firsts, u32 experts, u32 pair) {
    u32 low = 0, high = experts;
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (firsts[middle] <= pair) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// Columns of a thread, THREADS apart, and of a block. Where a row is found out takes longer than to
// copy some of its values.
constexpr u32 OWN_COLUMNS = 4, COLUMNS = OWN_COLUMNS * THREADS;

// How many columns a thread has from this one on.
__device__ inline u32 own_columns(u32 width, u32 first) { return min(share_of(width, first, THREADS), OWN_COLUMNS); }

// Copies the rows of `x` [tokens, width] that go to a group of experts to `out`, multiplied by
// their weights unless those are null. `places`: where each expert's pairs begin and the last one's
// end, [experts + 1], then the rows of `out` for each one's first, [experts]. A block per pair and
// COLUMNS columns.
template <typename T>
__device__ void gather_rows(const T *x, const u32 *tokens, const float *weights, const u32 *places, u32 experts,
                            u32 width, T *out) {
    const u32 first = blockIdx.y * COLUMNS + threadIdx.x, own = own_columns(width, first);
    const u32 pair = places[0] + blockIdx.x, expert = expert_of(places, experts, pair);
    const u64 row = pair - places[expert] + places[experts + 1 + expert];
    const float weight = weights ? value(rounded(weights[pair], T())) : 1.0f;
    out += row * width + first;
    in_order<OWN_COLUMNS>(x + u64(tokens[pair]) * width + first, THREADS, own, [&](T sent) {
        *out = weights ? rounded(value(sent) * weight, T()) : sent;
        out += THREADS;
    });
}

// Adds what an expert made of some tokens, [rows, width], to `out` [all tokens, width], multiplied
// by their weights unless those are null. `tokens` are distinct. A block per row and COLUMNS
// columns.
template <typename T>
__device__ void add_rows(const T *made, const u32 *tokens, const float *weights, u32 width, T *out) {
    const u32 first = blockIdx.y * COLUMNS + threadIdx.x, own = own_columns(width, first);
    const float weight = weights ? value(rounded(weights[blockIdx.x], T())) : 1.0f;
    made += u64(blockIdx.x) * width + first;
    out += u64(tokens[blockIdx.x]) * width + first;
    T added[OWN_COLUMNS], sums[OWN_COLUMNS];
#pragma unroll
    for (u32 i = 0; i < OWN_COLUMNS; i++) {
        if (i >= own) continue;
        added[i] = made[i * THREADS];
        sums[i] = out[i * THREADS];
    }
#pragma unroll
    for (u32 i = 0; i < OWN_COLUMNS; i++) {
        if (i >= own) continue;
        float x = value(added[i]);
        if (weights) x = value(rounded(x * weight, T()));
        out[i * THREADS] = rounded(value(sums[i]) + x, T());
    }
}

#define EACH_TYPE(type)                                                                       \
    KERNEL(type, gather_rows,                                                                 \
           (const type *x, const u32 *tokens, const float *weights, const u32 *places, u32 experts, u32 width, type *out), \
           (x, tokens, weights, places, experts, width, out))                                 \
    KERNEL(type, add_rows,                                                                    \
           (const type *made, const u32 *tokens, const float *weights, u32 width, type *out), \
           (made, tokens, weights, width, out))
EACH_TYPE(f32)
EACH_TYPE(bf16)
EACH_TYPE(f16)
