// A matrix for each species: MACE's skip connection, o3.FullyConnectedTensorProduct with one-hot scalars.
//
//   out[n,w,k] = sum over paths p into the block of w, species s, channels u:
//                c_p * attrs[n,s] * x[n,u,k] * W_p[u,s,w]
//
// Rows come sorted by class (`order`, `first`, made on the device): class s < SPECIES has the rows whose
// single non-zero is attrs[n,s], class SPECIES all others, rows without any among them. A block owns
// TILE / dim nodes of one class, all their components, and 64 columns of an output block; it sums over
// all paths into it, and over one species, or in the last class over those that occur in the tile. So
// the same sum is exact whatever attrs are, and fast where they are one-hot. How many tiles a class has
// is known to the device alone: the grid is an upper bound, blocks find their class by a prefix sum over
// `first` (a few reads of a warp), those left over return. Nothing waits for the device, and a launch can
// be captured in a CUDA graph.
//
// x is read mul_ir, W where e3nn keeps it (a row of w lies together), the result leaves mul_ir through
// shared memory. TRANSPOSED is the gradient of x: in and out exchanged, W read along w.
// Bytes, b to a number: b N (x + out) for each 64 columns of out, x from second-level cache after the first; W of the
// species that occur once a tile of nodes, from that cache too.
//
// Without SORTED all rows have one matrix, SPECIES is 1 and there are no attrs: o3.Linear.
//
// plan.cuh: PATH, sorted by output block, ITEM = {first path, end, first column}.

#include "plan.cuh"
#include "matrix_tile.cuh"

constexpr int WARPS = THREADS / 32, MASKS = (SPECIES + 31) / 32, PITCH = TILE + 1;
static_assert(TILE * PITCH <= 4 * ALL_FOURS, "the result passes through the memory of the tiles");

struct Tile {
    int kind, begin, count;      // class, first sorted row, rows; kind < 0: nothing to do
    int row[TILE];               // of x and out
    real scale[TILE];            // the single non-zero
    unsigned occurs[MASKS];      // species in a tile of the last class
};

struct Step {
    int species, path, channel;
};

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

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
indexed_linear(const real* __restrict__ x, const real* __restrict__ attrs, const int* __restrict__ order,
               const int* __restrict__ first, const real* __restrict__ weights, long long rows, real* __restrict__ out) {
    __shared__ Four memory[ALL_FOURS];
    __shared__ Tile s;
    const int t = threadIdx.x;
    const Item item = ITEM[blockIdx.y];
    const Path to = PATH[item.first];
    const int dim = to.dim, nodes = TILE / dim;
#if SORTED
    if (blockIdx.x >= rows / nodes + min(rows, (long long)SPECIES + 1)) return;
    if (t < 32) find_tile(s, first, blockIdx.x, nodes, t);
    for (int n = t; n < MASKS; n += THREADS) s.occurs[n] = 0;
    __syncthreads();
    if (s.kind < 0) return;
    const int count = s.count;
    const bool mixed = s.kind == SPECIES;
    for (int n = t; n < count; n += THREADS) {
        s.row[n] = order[s.begin + n];
        s.scale[n] = mixed ? (real)0 : attrs[(long long)s.row[n] * SPECIES + s.kind];
    }
    __syncthreads();
    if (mixed) {
        for (int n = t; n < count * SPECIES; n += THREADS) {
            const int species = n % SPECIES;
            if (attrs[(long long)s.row[n / SPECIES] * SPECIES + species] != 0)
                atomicOr(&s.occurs[species / 32], 1u << species % 32);
        }
        __syncthreads();
    }
#else
    const long long begin = (long long)blockIdx.x * nodes;
    if (begin >= rows) return;
    const int count = min((long long)nodes, rows - begin);
    constexpr bool mixed = false;
    if (t == 0) s.kind = 0;
    for (int n = t; n < count; n += THREADS) s.row[n] = begin + n, s.scale[n] = 1;
    __syncthreads();
#endif

    // Numbers of x that this thread brings, in the order of memory: node, row of the tile, channel.
    int place[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int e = t + i * THREADS, node = e / (DEPTH * dim), at = e % (DEPTH * dim);
        place[i] = node | (node * dim + at % dim) << 8 | at / dim << 16;
    }
    real* const tiles = memory[0].of;
    real left[EACH], right[EACH];

    auto fetch = [&](const Step& step) {
        const Path path = PATH[step.path];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int node = place[i] & 255, channel = step.channel + (place[i] >> 16);
            const int component = (place[i] >> 8 & 255) - node * dim;
            left[i] = node < count && channel < path.channels
                          ? x[(long long)s.row[node] * IN_ROW + path.in + channel * dim + component]
                          : (real)0;
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int e = t + i * THREADS;
#if TRANSPOSED
            const int channel = step.channel + e % DEPTH, column = item.column + e / DEPTH;
            const int at = path.weight + (column * SPECIES + step.species) * path.channels + channel;
#else
            const int channel = step.channel + e / TILE, column = item.column + e % TILE;
            const int at = path.weight + (channel * SPECIES + step.species) * path.columns + column;
#endif
            right[i] = channel < path.channels && column < path.columns ? __ldg(weights + at) : (real)0;
        }
    };
    auto put = [&](const Step& step, real* a) {
        real* b = a + 4 * TILE_FOURS;
        const real constant = PATH[step.path].scale;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int node = place[i] & 255;
            if (node >= nodes) continue;
            real scale = 0;
            if (node < count)
                scale = mixed ? attrs[(long long)s.row[node] * SPECIES + step.species] : s.scale[node];
            a[(place[i] >> 16) * STRIDE + (place[i] >> 8 & 255)] = scale * left[i];
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int e = t + i * THREADS;
#if TRANSPOSED
            b[e % DEPTH * STRIDE + e / DEPTH] = constant * right[i];
#else
            b[e / TILE * STRIDE + e % TILE] = constant * right[i];
#endif
        }
    };

    Sums sums = {};
    const int end = mixed ? SPECIES : s.kind + 1;
    Step step = {next_species(s, mixed ? 0 : s.kind, end), item.first, 0};
    if (step.species < end) {
        int buffer = 0;
        fetch(step);
        put(step, tiles);
        __syncthreads();
        while (true) {
            step.channel += DEPTH;
            if (step.channel >= PATH[step.path].channels) {
                step.channel = 0;
                if (++step.path == item.end) {
                    step.path = item.first;
                    step.species = next_species(s, step.species + 1, end);
                }
            }
            const bool more = step.species < end;
            if (more) fetch(step);
            const real* a = tiles + buffer * 8 * TILE_FOURS;
            multiply(a, a + 4 * TILE_FOURS, sums);
            if (!more) break;
            buffer ^= 1;
            put(step, tiles + buffer * 8 * TILE_FOURS);
            __syncthreads();
        }
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < OWN_ROWS; i++)
#pragma unroll
        for (int j = 0; j < OWN_COLUMNS; j++) tiles[(own_row() + i) * PITCH + own_column() + j] = sums[i][j];
    __syncthreads();
    const int lane = t % 32, wide = min(TILE, to.columns - item.column) * dim;
    for (int node = t / 32; node < count; node += WARPS) {
        real* row = out + (long long)s.row[node] * OUT_ROW + to.out + item.column * dim;
        int column = lane / dim, component = lane % dim;
        for (int at = lane; at < wide; at += 32) {
            store_once(row + at, tiles[(node * dim + component) * PITCH + column]);
            column += 32 / dim, component += 32 % dim;
            if (component >= dim) component -= dim, column++;
        }
    }
}
