// out[n,c] = sum over t in [first[n], first[n+1]) of rows[order[t], c]: rows of few numbers, summed by what they belong to.
//
// Gradients of edge vectors by the positions of their ends. A warp owns a row of the result: each lane takes every
// 32nd of its terms and all their COLUMNS, then lanes add up by shuffles, so that the order of a sum is that of the groups.
// Bytes, b to a number: b COLUMNS (rows + groups), read in whole sectors only where `order` runs along memory, and 4 for
// each entry of order. torch's way is a copy of the rows in order, and a thread for each column that sums one by one.

#include "plan.cuh"
#include "real.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
sum_groups(const real* __restrict__ rows, const int* __restrict__ order, const int* __restrict__ first, long long groups,
           real* __restrict__ out) {
    const long long n = (long long)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (n >= groups) return;
    const int end = first[n + 1];
    real sums[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) sums[c] = 0;
#pragma unroll 2
    for (int t = first[n] + lane; t < end; t += 32) {
        const real* row = rows + (long long)order[t] * COLUMNS;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) sums[c] += row[c];
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
#pragma unroll
        for (int apart = 16; apart > 0; apart /= 2) sums[c] += __shfl_xor_sync(0xffffffffu, sums[c], apart);
        if (lane == 0) out[n * COLUMNS + c] = sums[c];
    }
}
