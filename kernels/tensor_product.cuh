// What a team of threads that owns a row has in common, whatever it computes. After plan.cuh, real.cuh.
#pragma once

#define UNROLL _Pragma("unroll")

__device__ __forceinline__ void meet() {
#if TEAM == 32
    __syncwarp();
#else
    __syncthreads();
#endif
}

__device__ __forceinline__ void fetch_row(real* to, const real* from, int n, int t) {
    for (int at = t; at < n; at += TEAM) to[at] = __ldg(from + at);
}

// The sum over groups of lanes, a power of two that is known when compiled.
__device__ __forceinline__ real over_lanes(real sum, int lanes) {
    UNROLL for (int step = 16; step > 0; step /= 2)
        if (step < lanes) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
}

// Rounded up so that whole warps run through a loop and can shuffle in it.
__device__ constexpr int whole_warps(int n) { return (n + 31) / 32 * 32; }

// A result is a list of matrices, one after the other, each [rows, size].
__device__ __forceinline__ long long place(int segment, long long row, long long rows) {
    return SEGMENT[segment].base * rows + row * SEGMENT[segment].size;
}
