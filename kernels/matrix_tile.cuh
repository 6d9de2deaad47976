// A product of two tiles in shared memory: sums += scale of the row * sum over d of left[row][d] * right[d][column].
//
// 128 threads own ROWS (32, 64 or 128) rows and 64 columns, a warp half of each, by its tensor cores (tensor_cores.cuh). Tiles lie
// as rows of memory do, in a ring of STAGES slots: one is multiplied while the next are on their way.
#pragma once

#include "async_copy.cuh"
#include "tensor_cores.cuh"

constexpr int TILE = 64, DEPTH = 16, THREADS = 128;
constexpr int STEPS = DEPTH / 8, ACROSS = 4, DOWN = ROWS / 32;  // of tensor cores, in a warp's part of a tile

#ifndef CORES  // plan.cuh: how numbers are multiplied, a struct of tensor_cores.cuh
#define CORES TensorCores<real>
#endif
typedef CORES Cores;
typedef real Sums[DOWN][ACROSS][4];

// Of this thread, in the tile: row `half` of fragment i; column of the right tile; its first two results' column.
__device__ __forceinline__ int own_row(int i, int half) { return threadIdx.x / 64 * (ROWS / 2) + i * 16 + half * 8 + threadIdx.x % 32 / 4; }
__device__ __forceinline__ int right_column(int j) { return threadIdx.x / 32 % 2 * 32 + j * 8 + threadIdx.x % 32 / 4; }
__device__ __forceinline__ int own_column(int j) { return threadIdx.x / 32 % 2 * 32 + j * 8 + threadIdx.x % 4 * 2; }
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
