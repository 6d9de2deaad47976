// out[n] = sum over t in [first[n], first[n+1]) of rows[order[t]]: gradients of edges, summed by sender.
//
// A thread owns VECTOR columns (16 bytes) of one output row, so sums have a fixed order and rows are
// read in full lines, each once: b E ROW + b N ROW bytes. Rows of several edges are on their way at
// once, which a loop of known depth lets the compiler arrange.

#include "plan.cuh"
#include "real.cuh"

struct alignas(16) Vector {
    real of[VECTOR];
};

extern "C" __global__ void __launch_bounds__(THREADS)
sum_rows(const real* __restrict__ rows, const int* __restrict__ order, const int* __restrict__ first, real* __restrict__ out) {
    const long long node = blockIdx.x;
    const int column = (blockIdx.y * THREADS + threadIdx.x) * VECTOR;
    if (column >= ROW) return;
    const int end = first[node + 1];
    Vector sums = {};
#pragma unroll 4
    for (int t = first[node]; t < end; t++) {
        const Vector row = *reinterpret_cast<const Vector*>(rows + (long long)order[t] * ROW + column);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) sums.of[i] += row.of[i];
    }
    *reinterpret_cast<Vector*>(out + node * ROW + column) = sums;
}
