// Cuts W in two of half precision, and lays it out as the kernels by halves read it: see linear_in_halves.cu.
//
// A block owns 8 columns of an output block. A warp takes 16 channels of these at a time, every so manyth of all paths' after one another, and
// keeps the first KEPT of them in registers until the largest number of each column is known; then they are written, multiplied by the
// power of two that takes that number up, and what there is beyond them is read again. What takes numbers down again lies behind all channels,
// one number for each column. Bytes: 8 W, and 4 again of what isn't kept, from the cache.
//
// Of W turned round with species a column's numbers lie together, far from those of the next. There half as many threads seek the largest first,
// neighbouring ones among neighbouring numbers, and read everything again, of each path its chunks: 4.6 us for 5.8 of 20 species of
// 128x0e+128x1o, 14.6 for 18.1 of 89 (an H200; as many threads as else, 6.6 and 19.9).
#pragma once

#include "linear_in_halves_tile.cuh"
#include "overlapping.cuh"
#include "warpgroups.cuh"

#ifndef TRANSPOSED
#define TRANSPOSED 0
#endif
constexpr bool READ_TWICE = SORTED && TRANSPOSED;
constexpr int CUTTING_WARPS = CUTTERS / 32, KEPT = 4;

__device__ __forceinline__ real weight_at(const real* __restrict__ weights, const Path& path, int species, int channel, int column) {
    if (channel >= path.channels || column >= path.columns) return 0;
    const long long at = TRANSPOSED ? ((long long)column * SPECIES + species) * path.channels + channel
                                    : ((long long)channel * SPECIES + species) * path.columns + column;
    return weights[path.weight + at];
}

// 8 columns of an output block, those of group `group`, of one species.
struct EightColumns {
    const real* __restrict__ weights;
    real* halves;
    const Item& item;
    int species, group;

    __device__ __forceinline__ int own() const { return column_of(group, threadIdx.x % 32 / 4); }
    __device__ __forceinline__ void load(const Path& path, int chunk, real (&w)[4]) const {
#pragma unroll
        for (int n = 0; n < 4; n++)
            w[n] = weight_at(weights, path, species, chunk * CHUNK + n * 4 + threadIdx.x % 4, item.column + own());
    }
    // Chunk number `chunk` of the item.
    __device__ __forceinline__ void load(int chunk, real (&w)[4]) const {
        int p = item.first;
        for (int here; chunk >= (here = chunks_of(PATH[p])); p++) chunk -= here;
        const Path path = PATH[p];
        load(path, chunk, w);
    }
    __device__ __forceinline__ void write(int chunk, real up, const real (&w)[4]) const {
        const int lane = threadIdx.x % 32;
        Pairs pairs;
        halve(up * w[0], up * w[1], pairs.high[0], pairs.low[0]);
        halve(up * w[2], up * w[3], pairs.high[1], pairs.low[1]);
        const long long here = (long long)(item.chunk + chunk) * SLICE;
#if WARPGROUPS
        unsigned* words = reinterpret_cast<unsigned*>(halves) + here;
        const unsigned parts[] = {pairs.high[0], pairs.high[1], pairs.low[0], pairs.low[1]};
#pragma unroll
        for (int part = 0; part < 4; part++) words[word_of<ACROSS>(part, group, lane)] = parts[part];
#else
        reinterpret_cast<Pairs*>(halves + here)[group * 32 + lane] = pairs;
#endif
    }
};

// Each returns the exponent of the power of two of this lane's column. `largest` is zero when they begin.
__device__ __forceinline__ unsigned cut_read_once(const EightColumns& columns, int chunks, unsigned (&largest)[8]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    real kept[KEPT][4] = {}, most = 0;
    auto look_at = [&](const real (&w)[4]) { most = fmaxf(most, fmaxf(fmaxf(fabsf(w[0]), fabsf(w[1])), fmaxf(fabsf(w[2]), fabsf(w[3])))); };
#pragma unroll
    for (int i = 0; i < KEPT; i++)
        if (warp + i * CUTTING_WARPS < chunks) columns.load(warp + i * CUTTING_WARPS, kept[i]);
#pragma unroll
    for (int i = 0; i < KEPT; i++) look_at(kept[i]);  // when all have been asked for
    for (int chunk = warp + KEPT * CUTTING_WARPS; chunk < chunks; chunk += CUTTING_WARPS) {
        real w[4];
        columns.load(chunk, w), look_at(w);
    }
    atomicMax(&largest[lane / 4], __float_as_uint(most));
    __syncthreads();
    const unsigned exponent = exponent_of(__uint_as_float(largest[lane / 4]));
    const real up = power_up(exponent);
#pragma unroll
    for (int i = 0; i < KEPT; i++)
        if (warp + i * CUTTING_WARPS < chunks) columns.write(warp + i * CUTTING_WARPS, up, kept[i]);
    for (int chunk = warp + KEPT * CUTTING_WARPS; chunk < chunks; chunk += CUTTING_WARPS) {
        real w[4];
        columns.load(chunk, w), columns.write(chunk, up, w);
    }
    return exponent;
}

__device__ __forceinline__ unsigned cut_read_twice(const EightColumns& columns, unsigned (&largest)[8]) {
    const int t = threadIdx.x, lane = t % 32, column = t / (CUTTERS / 8), start = t % (CUTTERS / 8);
    const Item& item = columns.item;
    real most = 0;
    for (int p = item.first; p < item.end; p++) {
        const Path path = PATH[p];
#pragma unroll 8
        for (int channel = start; channel < path.channels; channel += CUTTERS / 8)
            most = fmaxf(most, fabsf(weight_at(columns.weights, path, columns.species, channel, item.column + column_of(columns.group, column))));
    }
    atomicMax(&largest[column], __float_as_uint(most));
    __syncthreads();
    const unsigned exponent = exponent_of(__uint_as_float(largest[lane / 4]));
    const real up = power_up(exponent);
    int before = 0;
    for (int p = item.first; p < item.end; p++) {
        const Path path = PATH[p];
#pragma unroll 4
        for (int chunk = t / 32; chunk < chunks_of(path); chunk += CUTTING_WARPS) {
            real w[4];
            columns.load(path, chunk, w), columns.write(before + chunk, up, w);
        }
        before += chunks_of(path);
    }
    return exponent;
}

extern "C" __global__ void __launch_bounds__(CUTTERS)
halve_weights(const real* __restrict__ weights,
#if SORTED
              const int* __restrict__ first,
#endif
              real* __restrict__ halves) {
    __shared__ unsigned largest[8];
    let_next_begin();
#if SORTED
    const int species = blockIdx.y;
    // Its matrix is read for its own rows, and for those of the last class, which may be of any species.
    if (first[species] == first[species + 1] && first[SPECIES] == first[SPECIES + 1]) return;
    halves += species * OF_SPECIES;
#else
    constexpr int species = 0;
#endif
    const int number = blockIdx.x / ACROSS, t = threadIdx.x;
    const Item item = ITEM[number];
    const EightColumns columns = {weights, halves, item, species, (int)(blockIdx.x % ACROSS)};
    int chunks = 0;
    for (int p = item.first; p < item.end; p++) chunks += chunks_of(PATH[p]);
    if (t < 8) largest[t] = 0;
    __syncthreads();
    const unsigned exponent = READ_TWICE ? cut_read_twice(columns, largest) : cut_read_once(columns, chunks, largest);
    if (t < 32 && t % 4 == 0) halves[(long long)CHUNKS * SLICE + number * COLUMNS + columns.own()] = __uint_as_float(exponent);
}
