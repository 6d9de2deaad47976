// Which rows, species and channels a block of indexed_linear.cu has: its tile of a class, and its steps along the sum.
#pragma once

#ifndef SLICED
#define SLICED 0
#endif
constexpr int MASKS = (SPECIES + 31) / 32;

struct Tile {
    int kind, begin, count;      // class, first sorted row, rows; kind < 0: nothing to do
    int row[ROWS];               // of x and out
    unsigned occurs[MASKS];      // species in a tile of the last class
};

struct Step {
    int species, path, channel;
};

#if SLICED
// A step of an item, whatever the species, or the end of them.
struct Place {
    int path, channel;
};

__device__ __forceinline__ Place place_of(const Item& item, int number) {
    int path = item.first;
    for (; path < item.end; path++) {
        const int steps = (PATH[path].channels + DEPTH - 1) / DEPTH;
        if (number < steps) break;
        number -= steps;
    }
    return {path, number * DEPTH};
}
#endif

#if SORTED
// Finds tile number `tile` of `nodes` rows among the classes, by one warp.
__device__ __forceinline__ void find_tile(Tile& s, const int* __restrict__ first, int tile, int nodes, int lane) {
    int before = 0;
    bool found = false;
    for (int base = 0; base <= SPECIES && !found; base += 32) {
        const int kind = base + lane;
        const int begin = first[min(kind, SPECIES + 1)], end = first[min(kind + 1, SPECIES + 1)];
        const int tiles = (end - begin + nodes - 1) / nodes;
        int through = tiles;  // this class's and those of all lanes before
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, through, step);
            if (lane >= step) through += other;
        }
        const int within = tile - (before + through - tiles);
        const bool mine = within >= 0 && within < tiles;
        if (mine) s.kind = kind, s.begin = begin + within * nodes, s.count = min(nodes, end - s.begin);
        found = __any_sync(0xffffffffu, mine);
        before += __shfl_sync(0xffffffffu, through, 31);
    }
    if (!found && lane == 0) s.kind = -1;
}

__device__ __forceinline__ int next_species(const Tile& s, int species, int end) {
    if (s.kind < SPECIES) return species;
    while (species < end && !(s.occurs[species / 32] >> species % 32 & 1)) species++;
    return species;
}
#else
__device__ __forceinline__ int next_species(const Tile&, int species, int) { return species; }
#endif
