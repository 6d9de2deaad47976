// Linears of many rows in float32, by products of half-precision numbers, as accurate as multiply-adds of float32.
//
//   out[n,w,k] = sum over paths p into the block of w, channels u:  c_p * x[n,u,k] * W_p[u,w]
//
// A number is two of half precision, x = high + low, 11 bits each, and three of the four products are summed, low ones
// first (halves.cuh). That is what tf32's pairs do in indexed_linear.cu, at half the price, and 16 channels at a time
// instead of 8, so that there is one large rounding where there were two. What half precision lacks is range, so numbers are
// multiplied by powers of two: a row's DEPTH numbers by one of their own, which multiplies their sum back; W by one for each
// column of the output, which multiplies the result back. A product is wrong by 2^-23 of itself, or 2^-39 of the product
// of the largest of the row's and of the column's.
//
// halve_weights comes before, once a call (halve_weights.cuh): W is cut in two, and laid out as the lanes of a warp take it. TRANSPOSED is
// the gradient of x: in and out exchanged, W read along w; the other kernel doesn't know. That one may begin before W is cut, and waits for it
// when it has asked for its first rows (overlapping.cuh).
//
// linear_in_halves: a block of 128 threads owns ROWS (node, component) pairs of whole nodes and COLUMNS of an output block, a
// warp a quarter of the rows and all columns, so that a number of x is cut once in a block. x comes to shared memory as in
// indexed_linear.cu (a row of the tile is a component, its numbers DIM apart, PITCH keeps banks apart), W's pairs beside
// it, 16 bytes for each lane. Scalars are written from registers, in full sectors; else results leave mul_ir
// through shared memory, of whole tiles on Hopper by the copy engine.
// Bytes, 4 to a number: 4 N (x + out), x again for further columns and W once a tile from the second-level cache, for the
// blocks of a tile of nodes are neighbours in the grid; 8 W for cutting it.
//
// SORTED: a matrix for each species, as in indexed_linear.cu, W_p[u,s,w], and rows multiplied by attrs[n,s]. halve_weights cuts
// them apart, a block a species: those that have rows, or all where a row isn't one-hot, for the last class is of any. A
// tile's rows are of one class (rows_of_a_species.cuh), found by `order` where they are copied and where results are
// written, so it reads one species' halves; the single non-zeros multiply results, from shared memory. A tile of the last class sums
// over the species that occur in it, one after the other, each row by its own scalar of each; powers of columns differ
// from one to the next, so they multiply short sums there, not the result. Of species that a row hasn't, it adds zeros: what
// comes of it doesn't depend on others. Bytes, besides those above: 8 W for cutting the species that have rows, once a tile W of
// its species from the second-level cache, 8 N for `order` and single non-zeros.
//
// WARPGROUPS (Hopper): the four warps' products are asked for together, of COLUMNS_AT_ONCE columns, and W's halves lie as tensor cores
// read them (warpgroups.cuh) and come by the copy engine (linear_in_halves_ring.cuh).
//
// plan.cuh: PATH, sorted by output block; ITEM = {first path, end, first column, first chunk}: chunks of 16 channels of an
// item, CHUNKS in all, lie one after another in `halves`, then a power of two for each column of each item, and so for
// each of SPECIES after the other. SCALARS: there is nothing else, and no species, as in weights of edges, which are more than
// the second-level cache holds. CUTTERS: threads of a block of halve_weights. Else as in indexed_linear.cu.

#include "plan.cuh"
#include "linear_in_halves.cuh"
#include "halve_weights.cuh"

#if SORTED
#define BLOCKS_OF(NODES) (rows / (NODES) + min(rows, SPECIES + 1ll))
#define SORTED_ROWS s, attrs, order, first,
template <int DIM>
__device__ __forceinline__ void tile_of(int number, int tile, const real* __restrict__ x, SortedTile& s, const real* __restrict__ attrs,
                                        const int* __restrict__ order, const int* __restrict__ first, const real* halves,
                                        long long rows, real* __restrict__ out, real* memory) {
    take_rows(s, attrs, order, first, tile, ROWS / DIM);
    if (s.kind < 0) return;
    const Rows own = {s.count, s, attrs};
    if (s.kind < SPECIES)
        tile_of<DIM, false>(number, own, x, halves + s.kind * OF_SPECIES, out, memory);
    else
        tile_of<DIM, true>(number, own, x, halves, out, memory);
}
#else
#define BLOCKS_OF(NODES) ((rows + (NODES) - 1) / (NODES))
#define SORTED_ROWS
template <int DIM>
__device__ __forceinline__ void tile_of(int number, int tile, const real* __restrict__ x, const real* halves,
                                        long long rows, real* __restrict__ out, real* memory) {
    constexpr int nodes = ROWS / DIM;
    const long long begin = (long long)tile * nodes;
    tile_of<DIM, false>(number, {(int)min((long long)nodes, rows - begin), begin}, x, halves, out, memory);
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
linear_in_halves(const real* __restrict__ x,
#if SORTED
                 const real* __restrict__ attrs, const int* __restrict__ order, const int* __restrict__ first,
#endif
                 const real* halves, long long rows, real* __restrict__ out) {
    extern __shared__ __align__(128) real memory[];  // see linear_in_halves_tile.cuh
#if SORTED
    __shared__ SortedTile s;
#endif
    long long block = blockIdx.x;
#define OF_DIM(DIM, FIRST, HERE)                                                                                                 \
    {                                                                                                                            \
        const long long blocks = HERE * BLOCKS_OF(ROWS / DIM);                                                                   \
        if (block < blocks)                                                                                                      \
            return tile_of<DIM>(FIRST + block % HERE, block / HERE, x, SORTED_ROWS halves, rows, out, memory);                   \
        block -= blocks;                                                                                                         \
    }
    DIMS(OF_DIM)
}
