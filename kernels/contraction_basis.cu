// MACE's weights of a contraction in the reduced basis, all of them in one launch, and the transpose.
//
//   weights_to_basis     w[s,r,c] = sum_p T_b[p,r] * W_b[s,p,c]      r among the reduced paths of block b
//   weights_from_basis   W_b[s,p,c] = sum_r T_b[p,r] * w[s,r,c]
//
// A block b is one output and degree, a tensor W_b [species, paths, channels] of its own; w has the reduced
// paths of all blocks. A thread owns a species and channel and GROUP results of a block: so many multiply-adds
// for each number that it reads, and enough threads to fill a device though there are few weights. The
// coefficients of a group of results lie together, the same for all threads of a block.
//
// b (W + w), and W once more from the caches for each group after the first. A block whose W is absent is
// zero, or isn't wanted.

#include "plan.cuh"
#include "real.cuh"

struct alignas(GROUP * sizeof(real)) Coefficients {
    real of[GROUP];
};
// Results from `first` on, `count` of them; the sum over `terms` numbers from `from` on; `row` of coefficients.
struct Item {
    int block, first, count, from, terms, row;
};
__device__ constexpr Item TO[] = {TO_BASIS};
__device__ constexpr Item FROM[] = {FROM_BASIS};
__device__ constexpr int PATHS[] = {PATHS_OF_BLOCKS};

__device__ __forceinline__ void write(real* __restrict__ to, const real* __restrict__ from,
                                      const Coefficients* __restrict__ table, const Item& item) {
    real sums[GROUP] = {};
    if (from) {
        table += item.row;
#pragma unroll 4
        for (int n = 0; n < item.terms; n++) {
            const real v = __ldg(from + (long long)n * CHANNELS);
            const Coefficients c = table[n];
#pragma unroll
            for (int i = 0; i < GROUP; i++) sums[i] = multiply_add(c.of[i], v, sums[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < GROUP; i++)
        if (i < item.count) to[(long long)i * CHANNELS] = sums[i];
}

// Row `row` of species s in a tensor with so many rows, at channel c.
__device__ __forceinline__ long long place(int s, int rows, int row, int c) {
    return ((long long)s * rows + row) * CHANNELS + c;
}

extern "C" __global__ void __launch_bounds__(THREADS, 8)
weights_to_basis(ORIGINALS(const real* __restrict__), const Coefficients* __restrict__ table, int species,
                 real* __restrict__ reduced) {
    const int column = blockIdx.x * THREADS + threadIdx.x, s = column / CHANNELS, c = column % CHANNELS;
    if (s >= species) return;
    const Item item = TO[blockIdx.y];
    const real* from = ORIGINAL(item.block);
    if (from) from += place(s, PATHS[item.block], item.from, c);
    write(reduced + place(s, REDUCED, item.first, c), from, table, item);
}

extern "C" __global__ void __launch_bounds__(THREADS, 8)
weights_from_basis(const real* __restrict__ reduced, const Coefficients* __restrict__ table, int species,
                   ORIGINALS(real* __restrict__)) {
    const int column = blockIdx.x * THREADS + threadIdx.x, s = column / CHANNELS, c = column % CHANNELS;
    if (s >= species) return;
    const Item item = FROM[blockIdx.y];
    real* to = ORIGINAL(item.block);
    if (!to) return;
    write(to + place(s, PATHS[item.block], item.first, c), reduced + place(s, REDUCED, item.from, c), table, item);
}
