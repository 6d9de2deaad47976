// A tile of a linear by halves: how W's halves lie, which rows it has, how these are cut, and how results leave it. See linear_in_halves.cu.
#pragma once

#include "halves.cuh"
#include "pipeline.cuh"
#include "real.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS, DOWN = ROWS / WARPS / 16, ACROSS = COLUMNS / 8;  // of tensor cores, in a warp's part of a tile
constexpr int CHUNK = 16, STEPS = DEPTH / CHUNK;
constexpr int SLICE = CHUNK * COLUMNS;  // numbers of a chunk: pairs of halves take as much as float32 did
constexpr int SLOT = LEFT_ROOM + STEPS * SLICE;
#ifndef WARPGROUPS
#define WARPGROUPS 0
#endif
// Where tensor cores read W themselves, 128 bytes at a time, these begin at multiples of 128: else they take two turns for each. After the
// convolution 16 bytes more in front of a block's memory made 0.079 ms of 0.062 on an H200.
static_assert(!WARPGROUPS || LEFT_ROOM % 32 == 0, "slots begin at multiples of 128 bytes, and so does W in them");
constexpr int TOGETHER = 4;  // numbers of a copy
template <int DIM>
constexpr int OUT_PITCH = COLUMNS * DIM + 4;

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
    const int t = threadIdx.x % THREADS, lane = t % 32;
    return t / 32 * (ROWS / WARPS) + i * 16 + half * 8 + lane / 4;
}

// Where this thread's rows begin in the left tile. Those without a node are the last one's, and not used.
template <int DIM>
__device__ __forceinline__ void own_begins(int count, int (&begins)[DOWN][2]) {
#pragma unroll
    for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            begins[i][half] = min(own_row(i, half) / DIM, count - 1) * PITCH<DIM> + own_row(i, half) % DIM + threadIdx.x % 4 * DIM;
}

struct HalvedRows {
    unsigned high[STEPS][4], low[STEPS][4];
    real scale[2];  // of the sums of products
};

// Cuts a step's numbers of this lane's two rows, which begin there; `exponents` are of their powers of two, the scales are the caller's.
template <int DIM>
__device__ __forceinline__ void halve_rows(const real* left, const int (&begins)[2], HalvedRows& to, unsigned (&exponents)[2]) {
    real of_rows[2][STEPS][4];
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int n = 0; n < 4; n++) of_rows[half][step][n] = left[begins[half] + (step * CHUNK + n * 4) * DIM];
    exponents_of_rows(of_rows, exponents);
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int step = 0; step < STEPS; step++)
            halve_row(of_rows[half][step], power_up(exponents[half]), to.high[step], to.low[step], half);
}

// For what rounding towards zero lost, when all short sums have been added (halves.cuh).
__device__ __forceinline__ void make_up(real (&sums)[DOWN][ACROSS][4], const unsigned (&any_low)[DOWN][2], bool two_products) {
#pragma unroll
    for (int i = 0; i < DOWN; i++) {
        const Lost lost = lost_bits(any_low[i], STEPS == 2 && two_products);
#pragma unroll
        for (int j = 0; j < ACROSS; j++)
#pragma unroll
            for (int n = 0; n < 4; n++) sums[i][j][n] = made_up(sums[i][j][n], lost, j, n);
    }
}

// Where this lane's columns' powers of two lie. Columns of two groups lie together, as `column_of` has it.
__device__ __forceinline__ const real* powers_in(const real* halves, int number) {
    return halves + (long long)CHUNKS * SLICE + number * COLUMNS + threadIdx.x % 4 * 4;
}

__device__ __forceinline__ void multiply_by_powers(real (&sums)[DOWN][ACROSS][4], const real* powers) {
#pragma unroll
    for (int j = 0; j < ACROSS; j += 2) {
        const float4 power = *reinterpret_cast<const float4*>(powers + j * 8);
#pragma unroll
        for (int i = 0; i < DOWN; i++)
#pragma unroll
            for (int n = 0; n < 4; n++) sums[i][j][n] *= n % 2 ? power.y : power.x, sums[i][j + 1][n] *= n % 2 ? power.w : power.z;
    }
}

// Writes a tile's scalars from registers, in full sectors: columns of the output block of path `to` from number `column` on.
__device__ __forceinline__ void write_scalars(const real (&sums)[DOWN][ACROSS][4], const Rows rows, const Path to, int column,
                                              real* __restrict__ out) {
#pragma unroll
    for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (own_row(i, half) >= rows.count) continue;
            real* row = out + rows[own_row(i, half)] * OUT_ROW + to.out + column + threadIdx.x % 4 * 4;
#pragma unroll
            for (int j = 0; j < ACROSS; j += 2) {
                const real *one = sums[i][j] + 2 * half, *next = sums[i][j + 1] + 2 * half;
                const float4 four = make_float4(one[0], one[1], next[0], next[1]);
                float4* to_here = reinterpret_cast<float4*>(row + j * 8);
                SCALARS ? __stcs(to_here, four) : void(*to_here = four);
            }
        }
}

// Writes a tile's results, columns of the output block of path `to` from number `column` on.
template <int DIM>
__device__ __forceinline__ void write_results(const real (&sums)[DOWN][ACROSS][4], const Rows rows, const Path to, int column,
                                              real* __restrict__ out, real* memory) {
    constexpr int dim = DIM;
    const int t = threadIdx.x, lane = t % 32, count = rows.count;
    if constexpr (DIM == 1 && WHOLE_COLUMNS) return write_scalars(sums, rows, to, column, out);
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
