// A product of two tiles in shared memory: sums += scale of the row * sum over d of left[row][d] * right[d][column].
//
// 128 threads own ROWS (32, 64 or 128) rows and 64 columns, a warp half of each, by its tensor cores (tensor_cores.cuh); or as
// plan.cuh has it, COLUMNS columns, a warp one of WARPS_DOWN by WARPS_ACROSS parts. Tiles lie
// as rows of memory do, in a ring of STAGES slots: one is multiplied while the next are on their way.
#pragma once

#include "async_copy.cuh"
#include "tensor_cores.cuh"

#ifndef COLUMNS
#define COLUMNS 64
#define WARPS_DOWN 2
#define WARPS_ACROSS 2
#endif
constexpr int TILE = COLUMNS, DEPTH = 16, THREADS = 32 * WARPS_DOWN * WARPS_ACROSS;
// Of tensor cores, in a warp's part of a tile.
constexpr int STEPS = DEPTH / 8, ACROSS = TILE / 8 / WARPS_ACROSS, DOWN = ROWS / 16 / WARPS_DOWN;

#ifndef CORES  // plan.cuh: how numbers are multiplied, a struct of tensor_cores.cuh
#define CORES TensorCores<real>
#endif
typedef CORES Cores;
typedef real Sums[DOWN][ACROSS][4];

// Of this thread, in the tile: row `half` of fragment i; column of the right tile; its first two results' column.
__device__ __forceinline__ int own_row(int i, int half) {
    return threadIdx.x / (32 * WARPS_ACROSS) * (ROWS / WARPS_DOWN) + i * 16 + half * 8 + threadIdx.x % 32 / 4;
}
__device__ __forceinline__ int first_column() { return threadIdx.x / 32 % WARPS_ACROSS * (TILE / WARPS_ACROSS); }
__device__ __forceinline__ int right_column(int j) { return first_column() + j * 8 + threadIdx.x % 32 / 4; }
__device__ __forceinline__ int own_column(int j) { return first_column() + j * 8 + threadIdx.x % 4 * 2; }
// Which of the DEPTH numbers that are summed over it has as number n of a step.
__device__ __forceinline__ int own_depth(int step, int n) { return step * 8 + n * 4 + threadIdx.x % 4; }

// left(i, half, step, n) and right(j, step, n) are the numbers of this thread's rows, columns and depths.
template <class Left, class Right>
__device__ __forceinline__ void multiply(Sums& sums, const Left& left, const Right& right, const real (&scale)[DOWN][2]) {
    Cores::Kept b[STEPS][ACROSS];
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int j = 0; j < ACROSS; j++) Cores::keep(right(j, step, 0), right(j, step, 1), b[step][j]);
#pragma unroll
    for (int i = 0; i < DOWN; i++) {
        real chain[ACROSS][4] = {}, a[STEPS][4];
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int n = 0; n < 4; n++) a[step][n] = left(i, n % 2, step, n / 2);
        Cores::multiply(chain, a, b);
#pragma unroll
        for (int j = 0; j < ACROSS; j++)
#pragma unroll
            for (int n = 0; n < 4; n++) sums[i][j][n] = multiply_add(scale[i][n / 2], chain[j][n], sums[i][j][n]);
    }
}

// sums += sum over d of left[row][d] * right[d][column], without a chain of their own: float64's sums are rounded as multiply-adds are, so
// nothing is gained by adding them up apart. Of the right tile one column of fragments is held at a time, of the left all: registers.
template <class Left, class Right, class With = Cores>
__device__ __forceinline__ void add_products(Sums& sums, const Left& left, const Right& right) {
    real a[DOWN][STEPS][4];
#pragma unroll
    for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int n = 0; n < 4; n++) a[i][step][n] = left(i, n % 2, step, n / 2);
#pragma unroll
    for (int j = 0; j < ACROSS; j++) {
        typename With::Kept b[STEPS];
#pragma unroll
        for (int step = 0; step < STEPS; step++) With::keep(right(j, step, 0), right(j, step, 1), b[step]);
#pragma unroll
        for (int i = 0; i < DOWN; i++) With::add(sums[i][j], a[i], b);
    }
}
