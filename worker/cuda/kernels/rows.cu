// Rows of activations: the largest |x|, the lower median of |x|, moments. `Scan` in worker/scan.
#include "values.cuh"

// The largest |x| of each row, then the median of each. One block per row, of a power of two of
// threads up to THREADS.
template <typename T>
__device__ void order(const T *x, u32 width, u32 *found) {
    __shared__ u32 counts[DIGITS], sums[THREADS / WARP], digit, rank, largest;
    const u32 t = threadIdx.x, own = share_of(width, t, blockDim.x);
    x += u64(blockIdx.x) * width;
    if (t == 0) {
        rank = (width - 1) / 2;
        largest = 0;
    }
    u32 prefix = 0, most = 0;
    for (int shift = 24; shift >= LAST_SHIFT<T>; shift -= 8) {
        for (u32 i = t; i < DIGITS; i += blockDim.x) counts[i] = 0;
        __syncthreads();
        in_order<8>(x + t, blockDim.x, own, [&](T x) {
            const u32 k = key(x);
            most = k > most ? k : most;
            if (is_within(k, shift, prefix)) atomicAdd(&counts[digit_at(k, shift)], 1);
        });
        __syncthreads();
        pick(counts, sums, &digit, &rank);
        prefix = prefix << 8 | digit;
    }
    atomicMax(&largest, most);
    __syncthreads();
    if (t == 0) {
        found[blockIdx.x] = largest >> 1;
        found[gridDim.x + blockIdx.x] = prefix << LAST_SHIFT<T> >> 1;
    }
}

// Eight threads per row, as the CPU form has eight lanes.
constexpr u32 LANES = 8;

// The sums of a row's lanes, in their order.
__device__ inline double joined(const double *lanes) {
    double sum = 0;
    for (u32 lane = 0; lane < LANES; lane++) sum += lanes[lane];
    return sum;
}

// The sum of x^2 of each row, then the kurtosis of each: NaN where all its values are equal.
template <typename T>
__device__ void moments(const T *x, u32 rows, u32 width, double *found) {
    __shared__ double seconds[THREADS], fourths[THREADS];
    const u32 t = threadIdx.x, lane = t % LANES, row = blockIdx.x * (THREADS / LANES) + t / LANES;
    // Threads without a row have a row without values.
    const u32 own = share_of(row < rows ? width : 0, lane, LANES);
    x += u64(row) * width + lane;
    double sum = 0;
    in_order<8>(x, LANES, own, [&](T x) { sum += double(value(x)); });
    seconds[t] = sum;
    __syncthreads();
    const double mean = joined(seconds + (t - lane)) / double(width);
    __syncthreads();
    double second = 0, fourth = 0;
    in_order<8>(x, LANES, own, [&](T x) {
        const double difference = double(value(x)) - mean, square = difference * difference;
        second += square;
        fourth += square * square;
    });
    seconds[t] = second;
    fourths[t] = fourth;
    __syncthreads();
    if (lane == 0 && row < rows) {
        const double n = double(width);
        second = joined(seconds + t);
        fourth = joined(fourths + t);
        found[row] = second + n * mean * mean;
        found[rows + row] = second > 0 ? n * fourth / (second * second) : __longlong_as_double(0x7ff8000000000000ll);
    }
}

#define EACH_TYPE(type)                                                                           \
    KERNEL(type, order, (const type *x, u32 width, u32 *found), (x, width, found))                \
    KERNEL(type, moments, (const type *x, u32 rows, u32 width, double *found), (x, rows, width, found))
EACH_TYPE(f32)
EACH_TYPE(bf16)
EACH_TYPE(f16)
