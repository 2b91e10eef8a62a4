// Magnitudes of whole sequences: their histogram, and their exact median. `Scan` in worker/scan.
#include "values.cuh"

// Bins of a histogram.
constexpr u32 BINS = 2048;

// As `Histogram::bin` in worker/scan: 32 bins an octave from 2^-32 to 2^32.
__device__ inline u32 bin(u32 bits) {
    constexpr u32 FIRST = (127 - 32) << 5;
    const u32 number = bits >> 18;
    const u32 above = number > FIRST ? number - FIRST : 0;
    return above < BINS ? above : BINS - 1;
}

// Counts the keys of a strip that `is_counted`, by `bin_of`, in the N bins of its sequence. One
// block per strip.
template <u32 N, typename T, typename Counted, typename Bin>
__device__ void count(const T *x, u32 width, u32 tokens, u64 *counts, Counted is_counted, Bin bin_of) {
    __shared__ u32 bins[N];
    const u32 strips = (tokens + STRIP - 1) / STRIP;
    const u32 sequence = blockIdx.x / strips, first = blockIdx.x % strips * STRIP;
    const u32 rows = tokens - first < STRIP ? tokens - first : STRIP;
    x += (u64(sequence) * tokens + first) * width;
    for (u32 i = threadIdx.x; i < N; i += THREADS) bins[i] = 0;
    __syncthreads();
    in_order<8>(x + threadIdx.x, THREADS, share_of(rows * width, threadIdx.x, THREADS), [&](T x) {
        const u32 k = key(x);
        if (is_counted(k)) atomicAdd(&bins[bin_of(k)], 1);
    });
    __syncthreads();
    for (u32 i = threadIdx.x; i < N; i += THREADS) {
        if (bins[i] > 0) atomicAdd(&counts[u64(sequence) * N + i], u64(bins[i]));
    }
}

template <typename T>
__device__ void magnitudes(const T *x, u32 width, u32 tokens, u64 *counts) {
    count<BINS>(x, width, tokens, counts, [](u32) { return true; }, [](u32 k) { return bin(k >> 1); });
}

// Counts the digits at a shift of those values that have their sequence's prefix above.
template <typename T>
__device__ void digits(const T *x, u32 width, u32 tokens, int shift, const u32 *prefixes, u64 *counts) {
    const u32 prefix = prefixes[blockIdx.x / ((tokens + STRIP - 1) / STRIP)];
    count<DIGITS>(
        x, width, tokens, counts, [=](u32 k) { return is_within(k, shift, prefix); },
        [=](u32 k) { return digit_at(k, shift); });
}

// Adds the digit of the value of rank `ranks` to the prefix of each sequence, and clears the
// counts. One block per sequence, of a power of two of threads up to THREADS.
extern "C" __global__ void choose(u64 *counts, u32 *prefixes, u64 *ranks) {
    __shared__ u64 sums[THREADS / WARP], rank;
    __shared__ u32 digit;
    counts += u64(blockIdx.x) * DIGITS;
    if (threadIdx.x == 0) rank = ranks[blockIdx.x];
    __syncthreads();
    pick((const u64 *)counts, sums, &digit, &rank);
    if (threadIdx.x == 0) {
        prefixes[blockIdx.x] = prefixes[blockIdx.x] << 8 | digit;
        ranks[blockIdx.x] = rank;
    }
    for (u32 i = threadIdx.x; i < DIGITS; i += blockDim.x) counts[i] = 0;
}

#define EACH_TYPE(type)                                                                           \
    KERNEL(type, magnitudes, (const type *x, u32 width, u32 tokens, u64 *counts), (x, width, tokens, counts)) \
    KERNEL(type, digits,                                                                          \
           (const type *x, u32 width, u32 tokens, int shift, const u32 *prefixes, u64 *counts),   \
           (x, width, tokens, shift, prefixes, counts))
EACH_TYPE(f32)
EACH_TYPE(bf16)
EACH_TYPE(f16)
