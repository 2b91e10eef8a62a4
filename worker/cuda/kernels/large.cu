// Values of some rows that are not below a magnitude, with their places. `large` in worker/scan.
#include "values.cuh"

// `asked`: pairs of a row and the bits of a magnitude, a block each. `found`: triples of row,
// column and the value's bits, in no order, of which there is room for so many; `count` says how
// many there are.
template <typename T>
__device__ void large(const T *x, u32 width, const u32 *asked, u32 room, u32 *found, u32 *count) {
    const u32 row = asked[2 * blockIdx.x], floor = asked[2 * blockIdx.x + 1];
    x += u64(row) * width;
    for (u32 i = threadIdx.x; i < width; i += THREADS) {
        if (magnitude(x[i]) < floor) continue;
        const u32 at = atomicAdd(count, 1);
        if (at < room) {
            found[3 * u64(at)] = row;
            found[3 * u64(at) + 1] = i;
            found[3 * u64(at) + 2] = __float_as_uint(value(x[i]));
        }
    }
}

#define EACH_TYPE(type)                                                                              \
    KERNEL(type, large, (const type *x, u32 width, const u32 *asked, u32 room, u32 *found, u32 *count), \
           (x, width, asked, room, found, count))
EACH_TYPE(f32)
EACH_TYPE(bf16)
EACH_TYPE(f16)
