// Products of 16 x 8 by 8 x 8 numbers by a warp's tensor cores, as accurate as multiply-adds of the working type, or, where
// the user asks for it, of numbers rounded to tf32 or bf16.
//
// float32: every number is cut in two of tf32's 11 bits, x = high + low, and three of the four products are
// summed, low ones first: what is left out is some 2^-23 of a product, of either sign. Tensor cores round their sums towards zero.
// What that loses, 5e-8 of a sum on average, has the sum's sign and doesn't cancel between edges as rounding does: a stress, in
// which large contributions cancel, was wrong by three times what float32 explains, gradients of weights by ten times.
// So chains are short and are added up by the caller, and after a large product the last bit of the sum is set (von Neumann's
// rounding): cut off was between nothing and one of it, set it is wrong by up to one either way and by none on average,
// whatever the numbers are. An H100 cuts off a little less: 5.3e-8 of sums of random numbers, where these bits are 6.5e-8
// (`shrinkage` in tests/linear_parity.py), and as much less in trained models. Hence in every second column the last step's alone
// is set, which leaves 2e-9.
// Rows of the left tile without any low part, as of one-hot scalars, have sums that fit and are left alone: each row for itself,
// so that what comes of it is the same whichever rows lie beside it.
// float64 needs neither. RoundedToTf32 and RoundedToBf16 take one product of numbers of 11 and of 8 bits, the nearest ones;
// their sums are float32's.
//
// Lane l has, with g = l / 4 and t = l % 4, of the left tile rows g and g + 8 (n % 2) and columns t and t + 4
// (n / 2) as number n, of the right tile rows t and t + 4 of column g, of the result rows g and g + 8 (n / 2)
// and columns 2 t and 2 t + 1 (n % 2).
#pragma once

#include "real.cuh"
#include "row_votes.cuh"

#ifndef E3NN_ACCEL_HOST  // where kernels are tested without a GPU, lanes hand one another their numbers

// Bits after tf32's are ignored.
__device__ __forceinline__ void multiply_tiles(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 x 16 by 16 x 8, two numbers of bf16 in a register, the lower half first.
__device__ __forceinline__ void multiply_pairs(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ unsigned nearest_pair(float lower, float upper) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
    return pair;
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void multiply_tiles(double (&sum)[4], const double (&a)[4], const double (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+d"(sum[0]), "+d"(sum[1]), "+d"(sum[2]), "+d"(sum[3])
        : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
}

// Half a step: four columns, or rows.
__device__ __forceinline__ void multiply_four(double (&sum)[4], const double (&a)[2], double b) {
    asm("mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+d"(sum[0]), "+d"(sum[1]), "+d"(sum[2]), "+d"(sum[3])
        : "d"(a[0]), "d"(a[1]), "d"(b));
}

// Two steps at once: what a lane has of the second is 8 columns, or rows, further.
__device__ __forceinline__ void multiply_two(double (&sum)[4], const double (&a)[2][4], const double (&b)[2][2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7, %8, %9, %10, %11}, "
        "{%12, %13, %14, %15}, {%0, %1, %2, %3};"
        : "+d"(sum[0]), "+d"(sum[1]), "+d"(sum[2]), "+d"(sum[3])
        : "d"(a[0][0]), "d"(a[0][1]), "d"(a[0][2]), "d"(a[0][3]), "d"(a[1][0]), "d"(a[1][1]), "d"(a[1][2]), "d"(a[1][3]),
          "d"(b[0][0]), "d"(b[0][1]), "d"(b[1][0]), "d"(b[1][1]));
}
#else
__device__ __forceinline__ void multiply_quarter(double& left, double& right, double a, double b) {
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+d"(left), "+d"(right) : "d"(a), "d"(b));
}

__device__ __forceinline__ void multiply_tiles(double (&sum)[4], const double (&a)[4], const double (&b)[2]) {
#pragma unroll
    for (int n = 0; n < 4; n++) multiply_quarter(sum[n % 2 * 2], sum[n % 2 * 2 + 1], a[n], b[n / 2]);
}

__device__ __forceinline__ void multiply_two(double (&sum)[4], const double (&a)[2][4], const double (&b)[2][2]) {
    multiply_tiles(sum, a[0], b[0]);
    multiply_tiles(sum, a[1], b[1]);
}
#endif
#endif

// Numbers of the right tile come two by two, as a lane has them of a step, and are kept as they are multiplied.
template <class T>
struct TensorCores;

template <>
struct TensorCores<float> {
    typedef unsigned Kept[2][2];  // high and low
    // The nearest number of 11 bits, so that what is left has either sign: cut towards zero, what products lose
    // would have the sign of the product, and add up. (cvt.rna.tf32 is five instructions.)
    static __device__ __forceinline__ void cut(float x, unsigned& high, unsigned& low) {
        high = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
        low = __float_as_uint(x - __uint_as_float(high));
    }

    // Sums over STEPS tiles; one after the other for each column of tiles, so that none waits for the one before.
    // What is small comes first: while sums are small, little is lost when they are rounded.
    template <int STEPS, int N>
    static __device__ __forceinline__ void multiply(float (&sums)[N][4], const float (&a)[STEPS][4], const Kept (&b)[STEPS][N]) {
        unsigned high[STEPS][4], low[STEPS][4];
        // Whether there are low parts: a row's first eight columns stand for all of them.
        unsigned last_bit[2];
        vote_by_row((__float_as_uint(a[0][0]) | __float_as_uint(a[0][2])) & 0x1fffu,
                    (__float_as_uint(a[0][1]) | __float_as_uint(a[0][3])) & 0x1fffu, last_bit);
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int n = 0; n < 4; n++) cut(a[step][n], high[step][n], low[step][n]);
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
#pragma unroll
            for (int j = 0; j < N; j++) multiply_tiles(sums[j], low[step], b[step][j][0]);
#pragma unroll
            for (int j = 0; j < N; j++) multiply_tiles(sums[j], high[step], b[step][j][1]);
        }
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int j = 0; j < N; j++) {
                multiply_tiles(sums[j], high[step], b[step][j][0]);
#pragma unroll
                for (int n = 0; n < 4; n++)
                    if (n % 2 || step == STEPS - 1) sums[j][n] = __uint_as_float(__float_as_uint(sums[j][n]) | last_bit[n / 2]);
            }
    }

    static __device__ __forceinline__ void keep(float first, float second, Kept& b) {
        const float numbers[2] = {first, second};
#pragma unroll
        for (int n = 0; n < 2; n++) cut(numbers[n], b[0][n], b[1][n]);
    }
};

struct RoundedToTf32 {
    typedef unsigned Kept[2];

    // What the addition carries over is in tf32's bits; a NaN, whose bits may all be set, stays as it is.
    static __device__ __forceinline__ unsigned nearest(float x) { return __float_as_uint(x) + (x == x ? 0x1000u : 0u); }

    template <int STEPS, int N>
    static __device__ __forceinline__ void multiply(float (&sums)[N][4], const float (&a)[STEPS][4], const Kept (&b)[STEPS][N]) {
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const unsigned left[4] = {nearest(a[step][0]), nearest(a[step][1]), nearest(a[step][2]), nearest(a[step][3])};
#pragma unroll
            for (int j = 0; j < N; j++) multiply_tiles(sums[j], left, b[step][j]);
        }
    }

    static __device__ __forceinline__ void keep(float first, float second, Kept& b) { b[0] = nearest(first), b[1] = nearest(second); }
};

// Two steps are one product: which of 16 columns a lane's four numbers are is all the same, if it is so on both sides.
struct RoundedToBf16 {
    typedef unsigned Kept;

    template <int STEPS, int N>
    static __device__ __forceinline__ void multiply(float (&sums)[N][4], const float (&a)[STEPS][4], const Kept (&b)[STEPS][N]) {
        static_assert(STEPS % 2 == 0, "an instruction takes two");
#pragma unroll
        for (int step = 0; step < STEPS; step += 2) {
            const float(&low)[4] = a[step], (&high)[4] = a[step + 1];
            const unsigned left[4] = {nearest_pair(low[0], low[2]), nearest_pair(low[1], low[3]),
                                      nearest_pair(high[0], high[2]), nearest_pair(high[1], high[3])};
#pragma unroll
            for (int j = 0; j < N; j++) {
                const unsigned right[2] = {b[step][j], b[step + 1][j]};
                multiply_pairs(sums[j], left, right);
            }
        }
    }

    static __device__ __forceinline__ void keep(float first, float second, Kept& b) { b = nearest_pair(first, second); }
};

template <>
struct TensorCores<double> {
    typedef double Kept[2];

    template <int STEPS, int N>
    static __device__ __forceinline__ void multiply(double (&sums)[N][4], const double (&a)[STEPS][4], const Kept (&b)[STEPS][N]) {
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int j = 0; j < N; j++) multiply_tiles(sums[j], a[step], b[step][j]);
    }

    // Of one column of tiles.
    static __device__ __forceinline__ void add(double (&sum)[4], const double (&a)[2][4], const Kept (&b)[2]) { multiply_two(sum, a, b); }

    static __device__ __forceinline__ void keep(double first, double second, Kept& b) { b[0] = first, b[1] = second; }
};
