// A product of two tiles in shared memory: sums[i][j] += sum over d of a[d][row i] * b[d][column j].
//
// 128 threads own 64 rows and 64 columns, a thread 8 rows and 4 columns in registers: 32 multiply-adds for
// 12 numbers read from shared memory. Both tiles have the summed index first and a stride of 68, so that
// fragments are whole vectors, and a warp that writes along the summed index meets few bank conflicts.
// There are two pairs of tiles: one is multiplied while the next is on its way in registers.
#pragma once

#include "real.cuh"

constexpr int TILE = 64, DEPTH = 16, THREADS = 128, STRIDE = TILE + 4;
constexpr int EACH = TILE * DEPTH / THREADS;  // numbers of a tile that a thread brings
constexpr int OWN_ROWS = 8, OWN_COLUMNS = 4;
constexpr int BLOCKS = sizeof(real) == 4 ? 3 : 2;  // of a multiprocessor: what registers are bounded by

struct alignas(4 * sizeof(real)) Four {
    real of[4];
};
typedef real Sums[OWN_ROWS][OWN_COLUMNS];

constexpr int TILE_FOURS = DEPTH * STRIDE / 4;  // of one tile
constexpr int ALL_FOURS = 4 * TILE_FOURS;

__device__ __forceinline__ Four four_at(const real* address) { return *reinterpret_cast<const Four*>(address); }
__device__ __forceinline__ int own_row() { return threadIdx.x / 16 * OWN_ROWS; }
__device__ __forceinline__ int own_column() { return threadIdx.x % 16 * OWN_COLUMNS; }

__device__ __forceinline__ void multiply(const real* a, const real* b, Sums& sums) {
    a += own_row(), b += own_column();
#pragma unroll 4
    for (int d = 0; d < DEPTH; d++) {
        const Four upper = four_at(a + d * STRIDE), lower = four_at(a + d * STRIDE + 4), right = four_at(b + d * STRIDE);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < OWN_COLUMNS; j++) {
                sums[i][j] = multiply_add(upper.of[i], right.of[j], sums[i][j]);
                sums[i + 4][j] = multiply_add(lower.of[i], right.of[j], sums[i + 4][j]);
            }
    }
}
