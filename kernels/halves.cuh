// Products of 16 x 16 by 16 x 8 numbers by a warp's tensor cores, of float32's accuracy, each number two of half precision.
//
// x = high + low, high the nearest number of half precision and low what is left, rounded: 22 bits, after numbers were
// multiplied by a power of two that takes the largest of them to between 2^14 and 2^15. Those below 2^-16 of it have
// fewer: low ends at 2^-24. What is left out, low times low, is some 2^-23 of a product, of either sign. Tensor cores round
// sums towards zero, which has the sum's sign and adds up; so, as in tensor_cores.cuh, sums are short, are added up by the
// caller, and have a bit set, here when all have been added (Lost).
//
// Lane l has, with g = l / 4 and t = l % 4, of the left tile rows g and g + 8 (n % 2), columns t and t + 4 (n / 2 = 0) or
// t + 8 and t + 12 as number n; of the right tile the same rows of column g; of the result rows g and g + 8 (n / 2) and columns
// 2 t and 2 t + 1 (n % 2). Which of 16 columns are whose is all the same, if it is so on both sides.
#pragma once

#include "real.cuh"
#include "row_votes.cuh"

struct alignas(16) Pairs {
    unsigned high[2], low[2];  // two numbers of half precision each
};

#ifndef E3NN_ACCEL_HOST  // where kernels are tested without a GPU, lanes hand one another their numbers

__device__ __forceinline__ void multiply_halves(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The nearest numbers of half precision, the first in the lower bits.
__device__ __forceinline__ unsigned nearest_halves(float first, float second) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

__device__ __forceinline__ float2 of_halves(unsigned pair) {
    float2 numbers;
    asm("{\n.reg .b16 lower, upper;\nmov.b32 {lower, upper}, %2;\ncvt.f32.f16 %0, lower;\ncvt.f32.f16 %1, upper;\n}"
        : "=f"(numbers.x), "=f"(numbers.y) : "r"(pair));
    return numbers;
}

#endif

__device__ __forceinline__ void halve(float first, float second, unsigned& high, unsigned& low) {
    high = nearest_halves(first, second);
    const float2 there = of_halves(high);
    low = nearest_halves(first - there.x, second - there.y);
}

constexpr unsigned ONE_POWER = 1u << 23;
constexpr unsigned LEAST = 29 * ONE_POWER;  // 2^-98: 28 powers lower there still is a float32

// The exponent of a number that isn't negative, as float32 has it: a power of two.
__device__ __forceinline__ unsigned exponent_of(float largest) { return max(__float_as_uint(largest), LEAST) & 255 * ONE_POWER; }

// What takes numbers up to that to 2^14 and more.
__device__ __forceinline__ float power_up(unsigned exponent) { return __uint_as_float(268 * ONE_POWER - exponent); }

// What products of numbers that were taken up are multiplied by: of these, and of others to the same height.
__device__ __forceinline__ float power_down(unsigned exponent) { return __uint_as_float(exponent - 28 * ONE_POWER); }

// Of the largest of each of this lane's two rows' numbers, of which it has four of each 16.
template <int STEPS>
__device__ __forceinline__ void exponents_of_rows(const float (&x)[2][STEPS][4], unsigned (&exponents)[2]) {
    unsigned both = 0;  // side by side
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float most = 0;
#pragma unroll
        for (int step = 0; step < STEPS; step++)
            most = fmaxf(most, fmaxf(fmaxf(fabsf(x[row][step][0]), fabsf(x[row][step][1])), fmaxf(fabsf(x[row][step][2]), fabsf(x[row][step][3]))));
        both |= __float_as_uint(most) / ONE_POWER << 16 * row;
    }
    both = __vmaxu2(both, __shfl_xor_sync(0xffffffffu, both, 1));
    both = __vmaxu2(both, __shfl_xor_sync(0xffffffffu, both, 2));
#pragma unroll
    for (int row = 0; row < 2; row++) exponents[row] = max((both >> 16 * row & 255) * ONE_POWER, LEAST);
}

// Cuts this lane's four of 16 numbers of its first or second row.
__device__ __forceinline__ void halve_row(const float (&x)[4], float up, unsigned (&high)[4], unsigned (&low)[4], int row) {
    halve(up * x[0], up * x[1], high[row], low[row]);
    halve(up * x[2], up * x[3], high[row + 2], low[row + 2]);
}

// Adds the products of STEPS tiles. What is small comes first: while sums are small, little is lost when they are rounded.
template <int STEPS>
__device__ __forceinline__ void add_products(float (&sum)[4], const unsigned (&high)[STEPS][4], const unsigned (&low)[STEPS][4],
                                             const Pairs (&b)[STEPS]) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        multiply_halves(sum, low[step], b[step].high);
        multiply_halves(sum, high[step], b[step].low);
    }
#pragma unroll
    for (int step = 0; step < STEPS; step++) multiply_halves(sum, high[step], b[step].high);
}

// What rounding towards zero lost of short sums is made up for once, at the end of the sum of them all, which is smaller by as large a
// part. Its last bit, which a random sum has in one of two cases, makes it larger by half of that on average, if it is set: as much as one
// large product lost. Two lost 3/4, for the first had a smaller sum; so where short sums had two, one of four columns has the bit before
// set, which makes it larger by one, and not the last.
struct Lost {
    unsigned last[2], before[2];  // bits, of each of the lane's rows
};

// What of these low parts isn't zero, in `any`, for each of the lane's rows.
template <int STEPS>
__device__ __forceinline__ void gather_low(const unsigned (&low)[STEPS][4], unsigned (&any)[2]) {
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int n = 0; n < 4; n++) any[n % 2] |= low[step][n];
}

// Where one of a row's low parts isn't zero. Sums of others, as of one-hot scalars, fit, and are left alone; each row for itself, so that
// what comes of it is the same whichever rows lie beside it.
__device__ __forceinline__ Lost lost_bits(const unsigned (&any)[2], bool two_products) {
    Lost bits;
    vote_by_row(any[0] & 0x7fff7fffu, any[1] & 0x7fff7fffu, bits.last);
#pragma unroll
    for (int row = 0; row < 2; row++) bits.before[row] = bits.last[row] << two_products;
    return bits;
}

// Number n of a lane's in column group j.
__device__ __forceinline__ float made_up(float sum, const Lost& bits, int j, int n) {
    return __uint_as_float(__float_as_uint(sum) | (n % 2 && j % 2 == 0 ? bits.before : bits.last)[n / 2]);
}
