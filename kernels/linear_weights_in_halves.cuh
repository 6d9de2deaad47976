// What a thread does with a step of a gradient of weights by halves: how rows lie in a slot, how its parts of g and x are cut, and what it sums.
// See linear_weights_in_halves.cu.
#pragma once

#include "halves.cuh"
#include "warpgroups.cuh"

constexpr int THREADS = 256, STEPS = 2, CHUNK = 16;
constexpr int ACROSS = COLUMNS / 8, AT_ONCE = 8;  // groups of eight columns: of a tile, and whose products are asked for at once
static_assert(CHANNELS == 128 && (COLUMNS == 64 || COLUMNS == 128), "as tensor cores take them");

// A chunk's nodes in a slot, of each WIDE channels with all components. Eight numbers between nodes take those that a warp's lanes read to other
// banks, sixteen between chunks a column's second chunk.
template <int DIM, int WIDE, int BETWEEN, int AFTER>
struct Chunk {
    static constexpr int nodes = CHUNK / DIM, rows = nodes * DIM, pitch = WIDE * DIM + BETWEEN, size = nodes * pitch + AFTER;
};
template <int DIM>
using LeftChunk = Chunk<DIM, CHANNELS, 8, 0>;
template <int DIM>
using RightChunk = Chunk<DIM, COLUMNS, 0, 16>;

// From one power of two to a larger one, of what was multiplied by the first.
__device__ __forceinline__ real from_to(unsigned before, unsigned now) {
    const unsigned powers = now - before;
    return powers >= 127 * ONE_POWER ? 0 : __uint_as_float(127 * ONE_POWER - powers);
}

// What this thread has of g in a step: a column of a chunk.
struct Column {
    real numbers[CHUNK];
    int column, chunk;
    unsigned exponent;  // of its power of two

    __device__ __forceinline__ Column() : column(threadIdx.x / 32 * 16 + threadIdx.x % 16), chunk(threadIdx.x / 16 % 2), exponent(LEAST) {}

    template <int DIM>
    __device__ __forceinline__ void read(const real* right) {
        using C = RightChunk<DIM>;
        const real* from = right + chunk * C::size + column * DIM;
#pragma unroll
        for (int r = 0; r < CHUNK; r++) numbers[r] = r < C::rows ? from[r / DIM * C::pitch + r % DIM] : 0;
    }

    // Returns whether its power of two is another now.
    __device__ __forceinline__ bool cut(unsigned* halves, real* factor) {
        real most[4] = {};
#pragma unroll
        for (int r = 0; r < CHUNK; r++) most[r % 4] = fmaxf(most[r % 4], fabsf(numbers[r]));
        unsigned now = max(exponent_of(fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]))), exponent);
        now = max(now, __shfl_xor_sync(0xffffffffu, now, 16));
        const bool other = now != exponent;
        if (chunk == 0) factor[column] = from_to(exponent, now);
        exponent = now;
        const real up = power_up(now);
#pragma unroll
        for (int part = 0; part < 2; part++) {
            unsigned high[4], low[4];
#pragma unroll
            for (int n = 0; n < 4; n++) halve(up * numbers[part * 8 + n], up * numbers[part * 8 + n + 4], high[n], low[n]);
            unsigned* to = halves + chunk * WORDS_OF_A_STEP<ACROSS> + word_of<ACROSS>(part, column / 8, column % 8 * 4);
            *reinterpret_cast<uint4*>(to) = make_uint4(high[0], high[1], high[2], high[3]);
            *reinterpret_cast<uint4*>(to + 2 * ACROSS * 32) = make_uint4(low[0], low[1], low[2], low[3]);
        }
        return other;
    }
};

// What a thread has of its warpgroup's sums, of u and u + 8.
struct Sums {
    real of[ACROSS][4] = {};
    unsigned exponents[2] = {LEAST, LEAST}, any_low[2] = {};

    __device__ __forceinline__ void multiply_row(int half, real by) {
#pragma unroll
        for (int j = 0; j < ACROSS; j++) of[j][2 * half] *= by, of[j][2 * half + 1] *= by;
    }
    __device__ __forceinline__ void multiply_columns(const real* factor) {
#pragma unroll
        for (int j = 0; j < ACROSS; j++) {
            const float2 by = *reinterpret_cast<const float2*>(factor + j * 8 + threadIdx.x % 4 * 2);
#pragma unroll
            for (int n = 0; n < 4; n++) of[j][n] *= n % 2 ? by.y : by.x;
        }
    }
    __device__ __forceinline__ void add(const real (&chains)[AT_ONCE][4], int first) {
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
            for (int n = 0; n < 4; n++) of[first + j][n] += chains[j][n];
    }
};

// Cuts what this thread has of x.
__device__ __forceinline__ void cut_rows(const real (&numbers)[2][STEPS][4], Sums& sums, unsigned (&high)[STEPS][4], unsigned (&low)[STEPS][4]) {
    unsigned now[2];
    exponents_of_rows(numbers, now);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (now[half] > sums.exponents[half]) {
            sums.multiply_row(half, from_to(sums.exponents[half], now[half]));
            sums.exponents[half] = now[half];
        }
#pragma unroll
        for (int step = 0; step < STEPS; step++) halve_row(numbers[half][step], power_up(sums.exponents[half]), high[step], low[step], half);
    }
    gather_low(low, sums.any_low);
}

// Writes a block's tile, all of it, with what rounding towards zero lost made up for.
__device__ __forceinline__ void write_tile(const Sums& sums, int own_row, const real* power, real* __restrict__ to) {
    const Lost lost = lost_bits(sums.any_low, true);
#pragma unroll
    for (int j = 0; j < ACROSS; j++) {
        const int column = j * 8 + threadIdx.x % 4 * 2;
        const float2 of_columns = *reinterpret_cast<const float2*>(power + column);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            real values[2];
#pragma unroll
            for (int n = 0; n < 2; n++) {
                // the smaller one first: so nothing overflows that fits when both have been taken
                const real of_row = power_down(sums.exponents[half]), of_column = n ? of_columns.y : of_columns.x;
                values[n] = made_up(sums.of[j][2 * half + n], lost, j, 2 * half + n) * fminf(of_row, of_column) * fmaxf(of_row, of_column);
            }
            *reinterpret_cast<float2*>(to + (own_row + half * 8) * COLUMNS + column) = make_float2(values[0], values[1]);
        }
    }
}
