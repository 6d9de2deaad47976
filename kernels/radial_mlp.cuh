// Pieces of the radial MLP: activations, matrices in shared memory, and products of them; see radial_mlp.cu.
//
// A matrix lies row by row, PITCH (a multiple of 32) apart, columns exchanged by the row's number, so that the lanes of a
// warp meet in no bank whether they read along rows or along columns: one layout serves W and its transpose,
// activations as left operand and, for the gradient of weights, turned.
#pragma once

#include "matrix_tile.cuh"

__device__ __forceinline__ real exponential(real x) { return sizeof(real) == 4 ? (real)expf((float)x) : (real)exp((double)x); }
__device__ __forceinline__ real hyperbolic_tangent(real x) { return sizeof(real) == 4 ? (real)tanhf((float)x) : (real)tanh((double)x); }

// Value and derivative; the compiler drops what isn't used.
template <int KIND>
__device__ __forceinline__ void activate(real z, real& value, real& slope) {
    if constexpr (KIND == SILU) {
        const real sigmoid = 1 / (1 + exponential(-z));
        value = z * sigmoid, slope = sigmoid * (1 + z * (1 - sigmoid));
    } else if constexpr (KIND == TANH) {
        value = hyperbolic_tangent(z), slope = 1 - value * value;
    } else if constexpr (KIND == RELU) {
        value = z > 0 ? z : z != z ? z : (real)0, slope = z > 0 ? 1 : 0;
    } else if constexpr (KIND == SIGMOID) {
        value = 1 / (1 + exponential(-z)), slope = value * (1 - value);
    } else {
        value = z, slope = 1;
    }
}

// That of the slope; the same is made of `sigmoid` and so on by the compiler.
template <int KIND>
__device__ __forceinline__ real curvature(real z, real value, real slope) {
    if constexpr (KIND == SILU) {
        const real sigmoid = 1 / (1 + exponential(-z));
        return sigmoid * (1 - sigmoid) * (2 + z * (1 - 2 * sigmoid));
    } else if constexpr (KIND == TANH) {
        return -2 * value * slope;
    } else if constexpr (KIND == SIGMOID) {
        return slope * (1 - 2 * value);
    } else {
        return 0;
    }
}

constexpr int up_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Where number (row, column) of a matrix lies.
template <int PITCH>
__device__ __forceinline__ int place(int row, int column) {
    static_assert(PITCH % 32 == 0, "columns are exchanged within 32");
    const int exchanged = sizeof(real) == 4 ? (row & 3) << 3 | (row & 4) : (row & 3) << 2;
    return row * PITCH + (column ^ exchanged);
}

// sums = scale * sum over d < LENGTH of left(row, d) right(d, column), of a tile of ROWS rows and TILE columns; LENGTH in whole steps of DEPTH.
template <int LENGTH, class Left, class Right>
__device__ __forceinline__ void product(Sums& sums, real scale, const Left& left, const Right& right) {
    static_assert(LENGTH % DEPTH == 0, "operands are filled up with zeros");
    real each[DOWN][2];
#pragma unroll
    for (int i = 0; i < DOWN; i++) {
        each[i][0] = each[i][1] = scale;
#pragma unroll
        for (int j = 0; j < ACROSS; j++)
#pragma unroll
            for (int n = 0; n < 4; n++) sums[i][j][n] = 0;
    }
#pragma unroll 1
    for (int begin = 0; begin < LENGTH; begin += DEPTH)
        multiply(
            sums, [&](int i, int half, int step, int n) { return left(own_row(i, half), begin + own_depth(step, n)); },
            [&](int j, int step, int n) { return right(begin + own_depth(step, n), right_column(j)); }, each);
}

// Calls do_with(row, column, sum) for each result of this thread.
template <class Action>
__device__ __forceinline__ void each_own(const Action& action) {
#pragma unroll
    for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int j = 0; j < ACROSS; j++)
#pragma unroll
            for (int n = 0; n < 4; n++) action(i, j, n, own_row(i, n / 2), own_column(j) + n % 2);
}
