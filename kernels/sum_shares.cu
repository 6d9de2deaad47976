// out[i] = sum over s < count of shares[s][i], in the order of s: what several blocks made of one receiver's edges, or of the
// channels that a linear sums over.
//
// A thread owns VECTOR numbers (16 bytes where rows are whole pieces of that), so full lines are read and written:
// b (count + 1) numbers bytes, of so few rows that the shares are still in the second-level cache.

#include "plan.cuh"
#include "real.cuh"

struct alignas(VECTOR * sizeof(real)) Vector {
    real of[VECTOR];
};

extern "C" __global__ void __launch_bounds__(THREADS)
sum_shares(const real* __restrict__ shares, int count, long long numbers, real* __restrict__ out) {
    const long long at = ((long long)blockIdx.x * THREADS + threadIdx.x) * VECTOR;
    if (at >= numbers) return;
    Vector sums = *reinterpret_cast<const Vector*>(shares + at);
#pragma unroll 4
    for (int s = 1; s < count; s++) {
        const Vector share = *reinterpret_cast<const Vector*>(shares + s * numbers + at);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) sums.of[i] += share.of[i];
    }
    *reinterpret_cast<Vector*>(out + at) = sums;
}
