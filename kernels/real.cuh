// The working type, and loads that pass by the first-level cache for what is read once.
#pragma once

#ifndef REAL
#define REAL float
#endif
typedef REAL real;

__device__ __forceinline__ real multiply_add(real a, real b, real c) {
    return sizeof(real) == 4 ? (real)fmaf((float)a, (float)b, (float)c) : (real)fma((double)a, (double)b, (double)c);
}

__device__ __forceinline__ real load_once(const real* address) { return __ldcs(address); }
__device__ __forceinline__ void store_once(real* address, real value) { __stcs(address, value); }

// Sums N values (a power of two up to 32) over the lanes of a warp. Returns in lane l the sum of
// value `owner(l)`; every value has 32 / N lanes that hold it. N - 1 + log2(32 / N) shuffles where N
// separate butterflies would take 5 N.
template <int N, int STEP = 16>
__device__ __forceinline__ real reduce_scatter(const real (&v)[N], int lane) {
    if constexpr (N == 1) {
        real sum = v[0];
#pragma unroll
        for (int step = STEP; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        return sum;
    } else {
        const bool upper = lane & STEP;
        real half[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            half[i] = (upper ? v[i + N / 2] : v[i]) + __shfl_xor_sync(0xffffffffu, upper ? v[i] : v[i + N / 2], STEP);
        return reduce_scatter<N / 2, STEP / 2>(half, lane);
    }
}

template <int N>
__device__ __forceinline__ int owner(int lane) {
    int index = 0, step = 16;
#pragma unroll
    for (int n = N; n > 1; n /= 2, step /= 2) index += (lane & step) ? n / 2 : 0;
    return index;
}
