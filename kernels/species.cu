// Rows of node_attrs grouped by their single non-zero: a stable counting sort that never leaves the device.
//
//   species[n] = the column of row n's only non-zero; kinds where it has none, or several
//   order      = rows by species, stable;    first[c] = rows of a species below c, for c up to kinds + 1
//
// A block owns a tile of rows that follow one another, the same in both kernels; there are at most a few
// hundred tiles. `species_of_rows` reads the tile in the order of memory, whatever the number of columns, ROWS
// rows at a time, copies it (the grouping outlives its operand), and counts the rows of each class.
// `order_of_rows` adds up the counts of all tiles, again in every block, which costs less than a third
// launch: tiles * kinds numbers from the second-level cache. Then its warps take turns to place 32 rows.
//
// b rows kinds bytes in and out, 8 rows for the results. Atomics are on integers in shared memory, where the
// sum is the same in any order.

#include "plan.cuh"
#include "real.cuh"

#define BATCH 8  // loads of a thread that are on their way at once

extern "C" __global__ void __launch_bounds__(THREADS)
species_of_rows(const real* __restrict__ attrs, long long rows, int kinds, int tile, real* __restrict__ copy,
                int* __restrict__ species, int* __restrict__ counts) {
    extern __shared__ int found[];  // [kinds + 1]
    __shared__ int nonzeros[ROWS], column[ROWS];
    const int t = threadIdx.x;
    for (int c = t; c <= kinds; c += THREADS) found[c] = 0;
    if (t < ROWS) nonzeros[t] = 0;
    const long long begin = (long long)blockIdx.x * tile, end = min(begin + tile, rows);
    for (long long first = begin; first < end; first += ROWS) {
        const int here = (int)min((long long)ROWS, end - first), all = here * kinds;
        const real* from = attrs + first * kinds;
        real* to = copy + first * kinds;
        __syncthreads();
        for (int n = t; n < all; n += BATCH * THREADS) {
            real a[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++) a[i] = n + i * THREADS < all ? __ldg(from + n + i * THREADS) : (real)0;
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                const int at = n + i * THREADS;
                if (at < all) to[at] = a[i];
                if (a[i] != 0) {  // a NaN, too
                    atomicAdd(nonzeros + at / kinds, 1);
                    atomicExch(column + at / kinds, at % kinds);
                }
            }
        }
        __syncthreads();
        if (t < here) {
            const int kind = nonzeros[t] == 1 ? column[t] : kinds;
            nonzeros[t] = 0;
            species[first + t] = kind;
            atomicAdd(found + kind, 1);
        }
    }
    __syncthreads();
    for (int c = t; c <= kinds; c += THREADS) counts[(long long)blockIdx.x * (kinds + 1) + c] = found[c];
}

extern "C" __global__ void __launch_bounds__(THREADS)
order_of_rows(const int* __restrict__ species, const int* __restrict__ counts, long long rows, int kinds, int tile,
              int tiles, int* __restrict__ order, int* __restrict__ first) {
    extern __shared__ int sums[];
    int* const total = sums;             // [kinds + 1], rows of each class
    int* const next = sums + kinds + 1;  // [kinds + 1], where this tile's next row of each class goes
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int c = threadIdx.x; c < 2 * (kinds + 1); c += THREADS) sums[c] = 0;
    __syncthreads();
    for (int n = threadIdx.x; n < tiles * (kinds + 1); n += THREADS) {
        const int count = __ldg(counts + n);
        if (!count) continue;
        const int of = n / (kinds + 1), c = n % (kinds + 1);
        atomicAdd(total + c, count);
        if (of < (int)blockIdx.x) atomicAdd(next + c, count);
    }
    __syncthreads();
    if (warp == 0) {
        int before = 0;
        for (int c = lane; c - lane <= kinds; c += 32) {
            const int own = c <= kinds ? total[c] : 0;
            int sum = own;
            for (int step = 1; step < 32; step *= 2) {
                const int lower = __shfl_up_sync(0xffffffffu, sum, step);
                if (lane >= step) sum += lower;
            }
            if (c <= kinds) {
                next[c] += before + sum - own;
                if (blockIdx.x == 0) first[c] = before + sum - own;
            }
            before += __shfl_sync(0xffffffffu, sum, 31);
        }
        if (blockIdx.x == 0 && lane == 0) first[kinds + 1] = before;
        __syncwarp();  // the first turn is this warp's, and the others' are after its barrier
    }
    const long long begin = (long long)blockIdx.x * tile, end = min(begin + tile, rows);
    for (long long base = begin; base < end; base += THREADS) {
        const long long row = base + threadIdx.x;
        const int kind = row < end ? __ldg(species + row) : -1;
        const unsigned same = __match_any_sync(0xffffffffu, kind);
        const int rank = __popc(same & ((1u << lane) - 1));
        const int turns = ((int)min((long long)THREADS, end - base) + 31) / 32;
        for (int turn = 0; turn < turns; turn++) {
            if (warp == turn) {
                if (kind >= 0) order[next[kind] + rank] = (int)row;
                __syncwarp();
                if (kind >= 0 && rank == 0) next[kind] += __popc(same);
            }
            __syncthreads();
        }
    }
}
