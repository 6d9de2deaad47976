// Cuts W in two of half precision, and lays it out as the kernels by halves read it: see linear_in_halves.cu.
//
// A block owns 8 columns of an output block, seeks the largest number of each, and writes all their channels, multiplied by the power of
// two that takes that number up; what takes it down again lies behind all channels, one number for each column. A warp reads W where
// neighbouring lanes find what lies together, and writes 16 channels of 8 columns at a time. Bytes: 8 W, and 4 W again from the cache.
#pragma once

#include "linear_in_halves_tile.cuh"
#include "overlapping.cuh"
#include "warpgroups.cuh"

constexpr int CUTTERS = 256;
#ifndef TRANSPOSED
#define TRANSPOSED 0
#endif

__device__ __forceinline__ real weight_at(const real* __restrict__ weights, const Path& path, int species, int channel, int column) {
    if (channel >= path.channels || column >= path.columns) return 0;
    const long long at = TRANSPOSED ? ((long long)column * SPECIES + species) * path.channels + channel
                                    : ((long long)channel * SPECIES + species) * path.columns + column;
    return weights[path.weight + at];
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
    const int number = blockIdx.x / ACROSS, group = blockIdx.x % ACROSS, t = threadIdx.x;
    const Item item = ITEM[number];
    if (t < 8) largest[t] = 0;
    __syncthreads();
    // Neighbouring threads read what lies together.
    const int own = TRANSPOSED ? t / (CUTTERS / 8) : t % 8, start = TRANSPOSED ? t % (CUTTERS / 8) : t / 8;
    real most = 0;
    for (int p = item.first; p < item.end; p++) {
        const Path path = PATH[p];
#pragma unroll 8
        for (int channel = start; channel < path.channels; channel += CUTTERS / 8)
            most = fmaxf(most, fabsf(weight_at(weights, path, species, channel, item.column + column_of(group, own))));
    }
    atomicMax(&largest[own], __float_as_uint(most));
    __syncthreads();
    const int lane = t % 32, column = column_of(group, lane / 4);
    const unsigned exponent = exponent_of(__uint_as_float(largest[lane / 4]));
    const real up = power_up(exponent);
    int before = item.chunk;
    for (int p = item.first; p < item.end; p++) {
        const Path path = PATH[p];
#pragma unroll 4
        for (int chunk = t / 32; chunk < chunks_of(path); chunk += CUTTERS / 32) {
            real w[4];
#pragma unroll
            for (int n = 0; n < 4; n++) w[n] = up * weight_at(weights, path, species, chunk * CHUNK + n * 4 + lane % 4, item.column + column);
            Pairs pairs;
            halve(w[0], w[1], pairs.high[0], pairs.low[0]);
            halve(w[2], w[3], pairs.high[1], pairs.low[1]);
            const long long here = (long long)(before + chunk) * SLICE;
#if WARPGROUPS
            unsigned* words = reinterpret_cast<unsigned*>(halves) + here;
            const unsigned parts[] = {pairs.high[0], pairs.high[1], pairs.low[0], pairs.low[1]};
#pragma unroll
            for (int part = 0; part < 4; part++) words[word_of<ACROSS>(part, group, lane)] = parts[part];
#else
            reinterpret_cast<Pairs*>(halves + here)[group * 32 + lane] = pairs;
#endif
        }
        before += chunks_of(path);
    }
    if (t < 32 && lane % 4 == 0) halves[(long long)CHUNKS * SLICE + number * COLUMNS + column] = __uint_as_float(exponent);
}
