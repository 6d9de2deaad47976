// A block's tile of a linear by halves: how W's halves lie, which rows it has, and how results leave it. See linear_in_halves.cu.
#pragma once

#include "pipeline.cuh"
#include "real.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS, DOWN = ROWS / WARPS / 16, ACROSS = COLUMNS / 8;  // of tensor cores, in a warp's part of a tile
constexpr int CHUNK = 16, STEPS = DEPTH / CHUNK;
constexpr int SLICE = CHUNK * COLUMNS;  // numbers of a chunk: pairs of halves take as much as float32 did
constexpr int SLOT = LEFT_ROOM + STEPS * SLICE;
constexpr int TOGETHER = 4;  // numbers of a copy
template <int DIM>
constexpr int OUT_PITCH = COLUMNS * DIM + 4;

#ifndef WARPGROUPS
#define WARPGROUPS 0
#endif

#ifndef SORTED
#define SORTED 0
#endif
#if SORTED
#include "rows_of_a_species.cuh"
constexpr long long OF_SPECIES = (long long)CHUNKS * SLICE + ITEMS * COLUMNS;  // numbers of `halves`
#else
constexpr int SPECIES = 1;
#endif

// The rows of a tile.
struct Rows {
    int count;
#if SORTED
    const SortedTile& tile;
    const real* attrs;
    __device__ __forceinline__ long long operator[](int node) const { return tile.row[node]; }
#else
    long long begin;
    __device__ __forceinline__ long long operator[](int node) const { return begin + node; }
#endif
};

// Of a tile of columns, that which is number n of group `group` to tensor cores: so a lane's numbers of two groups lie together.
__device__ __forceinline__ int column_of(int group, int n) { return group / 2 * 16 + n / 2 * 4 + group % 2 * 2 + n % 2; }

__device__ __forceinline__ int chunks_of(const Path& path) { return (path.channels + DEPTH - 1) / DEPTH * STEPS; }

// Which of the tile's rows this thread has sums of: of its warp's, the one in the first or second 8 of the 16 that are number i.
__device__ __forceinline__ int own_row(int i, int half) {
    const int t = threadIdx.x, lane = t % 32;
    return t / 32 * (ROWS / WARPS) + i * 16 + half * 8 + lane / 4;
}

// Writes a tile's results, columns of the output block of path `to` from number `column` on.
template <int DIM>
__device__ __forceinline__ void write_results(const real (&sums)[DOWN][ACROSS][4], const Rows rows, const Path to, int column,
                                              real* __restrict__ out, real* memory) {
    constexpr int dim = DIM;
    const int t = threadIdx.x, lane = t % 32, count = rows.count;
    if constexpr (DIM == 1 && WHOLE_COLUMNS) {
#pragma unroll
        for (int i = 0; i < DOWN; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (own_row(i, half) >= count) continue;
                real* row = out + rows[own_row(i, half)] * OUT_ROW + to.out + column + lane % 4 * 4;
#pragma unroll
                for (int j = 0; j < ACROSS; j += 2) {
                    const real *one = sums[i][j] + 2 * half, *next = sums[i][j + 1] + 2 * half;
                    const float4 four = make_float4(one[0], one[1], next[0], next[1]);
                    float4* to_here = reinterpret_cast<float4*>(row + j * 8);
                    SCALARS ? __stcs(to_here, four) : void(*to_here = four);
                }
            }
        return;
    }
    // A node's columns with all components come to lie as they do in `out`.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int node = own_row(i, half) / dim;
            if (node >= count) continue;
            real* row = memory + node * OUT_PITCH<DIM> + lane % 4 * 4 * dim + own_row(i, half) % dim;
#pragma unroll
            for (int j = 0; j < ACROSS; j++)
#pragma unroll
                for (int n = 0; n < 2; n++) row[(j / 2 * 16 + j % 2 * 2 + n) * dim] = sums[i][j][2 * half + n];
        }
    if (WARPGROUPS) fence_for_engines();
    __syncthreads();
    if constexpr (WARPGROUPS && WHOLE_COLUMNS) {
        // By the copy engine, a node's at once: threads that read and write them take 2 of a tile's 17 us.
        if (t % 4 == 0 && t / 4 < count) {
            copy_out(out + rows[t / 4] * OUT_ROW + to.out + column * dim, memory + t / 4 * OUT_PITCH<DIM>, COLUMNS * dim * sizeof(real));
            close_group();
            wait_for_groups<0>();  // shared memory must outlive its copies
        }
        return;
    }
    const int wide = (WHOLE_COLUMNS ? COLUMNS : min(COLUMNS, to.columns - column)) * dim;
    for (int e = t * TOGETHER; e < count * COLUMNS * dim; e += THREADS * TOGETHER) {
        const int node = e / (COLUMNS * dim), at = e % (COLUMNS * dim);
        real *to_here = out + rows[node] * OUT_ROW + to.out + column * dim + at, *here = memory + node * OUT_PITCH<DIM> + at;
        if (at + TOGETHER <= wide)
            *reinterpret_cast<float4*>(to_here) = *reinterpret_cast<float4*>(here);
        else
            for (int n = 0; at + n < wide; n++) to_here[n] = here[n];
    }
}
