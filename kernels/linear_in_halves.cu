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
// halve_weights comes before, once a call: W is cut in two, and laid out as the lanes of a warp take it. A block owns 8
// columns of an output block, seeks the largest number of each, and writes all their channels. TRANSPOSED is the gradient of x:
// in and out exchanged, W read along w; the other kernel doesn't know.
//
// linear_in_halves: a block of 128 threads owns ROWS (node, component) pairs of whole nodes and COLUMNS of an output block, a
// warp a quarter of the rows and all columns, so that a number of x is cut once in a block. x comes to shared memory as in
// indexed_linear.cu (a row of the tile is a component, its numbers DIM apart, PITCH keeps banks apart), W's pairs beside
// it, 16 bytes for each lane. Scalars are written from registers, in full sectors; else results leave mul_ir
// through shared memory.
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
// plan.cuh: PATH, sorted by output block; ITEM = {first path, end, first column, first chunk}: chunks of 16 channels of an
// item, CHUNKS in all, lie one after another in `halves`, then a power of two for each column of each item, and so for
// each of SPECIES after the other. SCALARS: there is nothing else, as in weights of edges, which are more than the
// second-level cache holds. Else as in indexed_linear.cu.

#include "plan.cuh"
#include "async_copy.cuh"
#include "halves.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS, DOWN = ROWS / WARPS / 16, ACROSS = COLUMNS / 8;  // of tensor cores, in a warp's part of a tile
constexpr int CUTTERS = 256;
constexpr int CHUNK = 16, STEPS = DEPTH / CHUNK;
constexpr int SLICE = CHUNK * COLUMNS;  // numbers of a chunk: pairs of halves take as much as float32 did
constexpr int SLOT = LEFT_ROOM + STEPS * SLICE;
constexpr int TOGETHER = 4;  // numbers of a copy
constexpr int RIGHT_COPIES = STEPS * SLICE / TOGETHER / THREADS;
template <int DIM>
constexpr int OUT_PITCH = COLUMNS * DIM + 4;

#ifndef TRANSPOSED
#define TRANSPOSED 0
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
            reinterpret_cast<Pairs*>(halves)[((long long)(before + chunk) * ACROSS + group) * 32 + lane] = pairs;
        }
        before += chunks_of(path);
    }
    if (t < 32 && lane % 4 == 0) halves[(long long)CHUNKS * SLICE + number * COLUMNS + column] = __uint_as_float(exponent);
}

// A block's work on these rows for item `number`. MIXED: they may have any of the tile's species, each with a scalar of its own.
template <int DIM, bool MIXED>
__device__ __forceinline__ void tile_of(int number, const Rows rows, const real* __restrict__ x, const real* __restrict__ halves,
                                        real* __restrict__ out, real* memory) {
    constexpr int dim = DIM, nodes = ROWS / dim, pitch = PITCH<DIM>;
    const int t = threadIdx.x, lane = t % 32, count = rows.count;
    const Item item = ITEM[number];
    const Path to = PATH[item.first];

    // What this thread copies of x, step by step along a path's channels: the same part of some nodes' channels, so that
    // all but one address are constants away.
    constexpr int PARTS = DEPTH * dim / TOGETHER, AT_ONCE = THREADS / PARTS, LEFT_COPIES = (nodes + AT_ONCE - 1) / AT_ONCE;
    const int first_node = t / PARTS, at = t % PARTS * TOGETHER;
#if SORTED
    int left_from;  // in a row
#else
    const real* left_from;
#endif
    const real* right_from = halves + (long long)item.chunk * SLICE + t * TOGETHER;
    struct Place {
        int path, channel, channels;
    } step = {item.first, 0, to.channels}, ahead = step;
    auto advance = [&](Place& step) {
        step.channel += DEPTH;
        if (step.channel < step.channels) return;
        step.channel = 0;
        if (++step.path < item.end) step.channels = PATH[step.path].channels;
    };
    auto fetch = [&](real* left) {
        if (ahead.path >= item.end) return;
#if SORTED
        if (ahead.channel == 0) left_from = PATH[ahead.path].in + at;
        auto from = [&](int i) { return x + rows[first_node + i * AT_ONCE] * IN_ROW + left_from; };
#else
        if (ahead.channel == 0) left_from = x + rows[first_node] * IN_ROW + PATH[ahead.path].in + at;
        auto from = [&](int i) { return left_from + i * AT_ONCE * IN_ROW; };
#endif
        const int valid = WHOLE_CHANNELS ? TOGETHER : min(max((ahead.channels - ahead.channel) * dim - at, 0), TOGETHER);
#pragma unroll
        for (int i = 0; i < LEFT_COPIES; i++) {
            const int node = first_node + i * AT_ONCE;
            if (first_node < AT_ONCE && node < count)
                copy_async<TOGETHER>(left + node * pitch + at, valid ? from(i) : x, valid);
        }
        left_from += DEPTH * dim;
#pragma unroll
        for (int i = 0; i < RIGHT_COPIES; i++) {
            const int e = i * THREADS * TOGETHER;
            copy_async<TOGETHER>(left + LEFT_ROOM + t * TOGETHER + e, right_from + e, TOGETHER);
        }
        right_from += STEPS * SLICE;
        advance(ahead);
    };

    // Where this thread's rows begin in the left tile. Those without a node are the last one's, and not used.
    auto own_row = [&](int i, int half) { return t / 32 * (ROWS / WARPS) + i * 16 + half * 8 + lane / 4; };
    int begins[DOWN][2];
#pragma unroll
    for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            begins[i][half] = min(own_row(i, half) / dim, count - 1) * pitch + own_row(i, half) % dim + lane % 4 * dim;

    real sums[DOWN][ACROSS][4] = {};
    // Columns of two groups lie together, as `column_of` has it.
    auto powers_in = [&](const real* halves) { return halves + (long long)CHUNKS * SLICE + number * COLUMNS + lane % 4 * 4; };
    // Where MIXED: of the species that is summed over, the rows' scalars and the columns' powers.
    real factor[DOWN][2];
    const real* own_powers;
    auto multiply = [&](const real* left, const Pairs* right, real constant) {
        unsigned high[DOWN][STEPS][4], low[DOWN][STEPS][4], last_bit[DOWN][2];
        real scale[DOWN][2];
#pragma unroll
        for (int i = 0; i < DOWN; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                real of_row[STEPS][4];
#pragma unroll
                for (int step = 0; step < STEPS; step++)
#pragma unroll
                    for (int n = 0; n < 4; n++) of_row[step][n] = left[begins[i][half] + (step * CHUNK + n * 4) * dim];
                const unsigned exponent = exponent_of_row(of_row);
                if constexpr (MIXED)
                    scale[i][half] = constant * factor[i][half] * __uint_as_float(exponent);
                else
                    scale[i][half] = constant * power_down(exponent);
#pragma unroll
                for (int step = 0; step < STEPS; step++)
                    halve_row(of_row[step], power_up(exponent), high[i][step], low[i][step], half);
            }
            last_bits(low[i], last_bit[i]);
        }
#pragma unroll
        for (int j = 0; j < ACROSS; j++) {
            Pairs b[STEPS];
#pragma unroll
            for (int step = 0; step < STEPS; step++) b[step] = right[(step * ACROSS + j) * 32];
#pragma unroll
            for (int i = 0; i < DOWN; i++) {
                real chain[4] = {};
                add_products(chain, high[i], low[i], b, last_bit[i]);
                if constexpr (MIXED) {
                    const float2 power = *reinterpret_cast<const float2*>(own_powers + j / 2 * 16 + j % 2 * 2);
#pragma unroll
                    for (int n = 0; n < 4; n++) chain[n] *= power_down(__float_as_uint(n % 2 ? power.y : power.x));
                }
#pragma unroll
                for (int n = 0; n < 4; n++) sums[i][j][n] = multiply_add(scale[i][n / 2], chain[n], sums[i][j][n]);
            }
        }
    };

    auto sum_over_channels = [&] {
        int slot = 0, slot_ahead = (STAGES - 1) * SLOT;
        real constant = to.scale;
#pragma unroll
        for (int n = 0; n < STAGES - 1; n++) {
            fetch(memory + n * SLOT);
            close_copies();
        }
        while (step.path < item.end) {
            wait_for_copies<STAGES - 2>();
            __syncthreads();
            fetch(memory + slot_ahead);
            close_copies();
            const real* left = memory + slot;
            multiply(left, reinterpret_cast<const Pairs*>(left + LEFT_ROOM) + lane, constant);
            slot_ahead = slot, slot = slot == (STAGES - 1) * SLOT ? 0 : slot + SLOT;
            advance(step);
            if (step.channel == 0 && step.path < item.end) constant = PATH[step.path].scale;
        }
    };
#if SORTED
    if constexpr (MIXED) {
        for (int species = 0; (species = next_species(rows.tile, species, SPECIES)) < SPECIES; species++) {
#pragma unroll
            for (int i = 0; i < DOWN; i++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    factor[i][half] = rows.attrs[rows[min(own_row(i, half) / dim, count - 1)] * SPECIES + species];
            own_powers = powers_in(halves + species * OF_SPECIES);
            right_from = halves + species * OF_SPECIES + (long long)item.chunk * SLICE + t * TOGETHER;
            step = ahead = {item.first, 0, to.channels};
            sum_over_channels();
            __syncthreads();
        }
    } else {
        sum_over_channels();
#pragma unroll
        for (int i = 0; i < DOWN; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const real factor = rows.tile.factor[min(own_row(i, half) / dim, count - 1)];
#pragma unroll
                for (int j = 0; j < ACROSS; j++) sums[i][j][2 * half] *= factor, sums[i][j][2 * half + 1] *= factor;
            }
    }
#else
    sum_over_channels();
#endif
    const real* powers = powers_in(halves);
#pragma unroll
    for (int j = 0; !MIXED && j < ACROSS; j += 2) {
        const float4 power = *reinterpret_cast<const float4*>(powers + j * 8);
#pragma unroll
        for (int i = 0; i < DOWN; i++)
#pragma unroll
            for (int n = 0; n < 4; n++) sums[i][j][n] *= n % 2 ? power.y : power.x, sums[i][j + 1][n] *= n % 2 ? power.w : power.z;
    }
    if constexpr (DIM == 1 && WHOLE_COLUMNS) {
#pragma unroll
        for (int i = 0; i < DOWN; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (own_row(i, half) >= count) continue;
                real* row = out + rows[own_row(i, half)] * OUT_ROW + to.out + item.column + lane % 4 * 4;
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
    __syncthreads();
    const int wide = (WHOLE_COLUMNS ? COLUMNS : min(COLUMNS, to.columns - item.column)) * dim;
    for (int e = t * TOGETHER; e < count * COLUMNS * dim; e += THREADS * TOGETHER) {
        const int node = e / (COLUMNS * dim), at = e % (COLUMNS * dim);
        real *to_here = out + rows[node] * OUT_ROW + to.out + item.column * dim + at, *here = memory + node * OUT_PITCH<DIM> + at;
        if (at + TOGETHER <= wide)
            *reinterpret_cast<float4*>(to_here) = *reinterpret_cast<float4*>(here);
        else
            for (int n = 0; at + n < wide; n++) to_here[n] = here[n];
    }
}

#if SORTED
#define BLOCKS_OF(NODES) (rows / (NODES) + min(rows, SPECIES + 1ll))
#define SORTED_ROWS s, attrs, order, first,
template <int DIM>
__device__ __forceinline__ void tile_of(int number, int tile, const real* __restrict__ x, SortedTile& s, const real* __restrict__ attrs,
                                        const int* __restrict__ order, const int* __restrict__ first, const real* __restrict__ halves,
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
__device__ __forceinline__ void tile_of(int number, int tile, const real* __restrict__ x, const real* __restrict__ halves,
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
                 const real* __restrict__ halves, long long rows, real* __restrict__ out) {
    extern __shared__ __align__(16) real memory[];
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
