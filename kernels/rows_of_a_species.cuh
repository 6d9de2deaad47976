// The rows of a block of linear_in_halves.cu, where they are sorted by species: of a class, and what multiplies them.
#pragma once

#include "async_copy.cuh"
#include "indexed_linear.cuh"

struct SortedTile : Tile {
    real factor[ROWS];  // of each row its single non-zero, but in the last class
};

// Finds a tile's rows. The factors are on their way then, and belong to the next group of copies.
__device__ __forceinline__ void take_rows(SortedTile& s, const real* __restrict__ attrs, const int* __restrict__ order,
                                          const int* __restrict__ first, int tile, int nodes) {
    const int t = threadIdx.x;
    if (t < 32) find_tile(s, first, tile, nodes, t);
    for (int n = t; n < MASKS; n += blockDim.x) s.occurs[n] = 0;
    __syncthreads();
    if (s.kind < 0) return;
    const bool mixed = s.kind == SPECIES;
    for (int n = t; n < s.count; n += blockDim.x) {
        const int row = s.row[n] = order[s.begin + n];
        if (!mixed) copy_async<1>(s.factor + n, attrs + (long long)row * SPECIES + s.kind, 1);
    }
    __syncthreads();
    if (!mixed) return;
    for (int n = t; n < s.count * SPECIES; n += blockDim.x) {
        const int species = n % SPECIES;
        if (attrs[(long long)s.row[n / SPECIES] * SPECIES + species] != 0) atomicOr(&s.occurs[species / 32], 1u << species % 32);
    }
    __syncthreads();
}
