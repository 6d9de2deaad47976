// A matrix for each species: MACE's skip connection, o3.FullyConnectedTensorProduct with one-hot scalars.
//
//   out[n,w,k] = sum over paths p into the block of w, species s, channels u:
//                c_p * attrs[n,s] * x[n,u,k] * W_p[u,s,w]
//
// Rows come sorted by class (`order`, `first`, made on the device): class s < SPECIES has the rows whose
// single non-zero is attrs[n,s], class SPECIES all others, rows without any among them. A block owns
// ROWS / dim nodes of one class, all their components, and TILE columns of an output block; it sums over
// all paths into it, and over one species, or in the last class over those that occur in the tile. So
// the same sum is exact whatever attrs are, and fast where they are one-hot. The grid has so many blocks for each number of
// components, one number after the other, as tiles of that have something to do: those of one component are larger and fewer, and
// a block that returns at once still takes its turn. How many tiles a class has is known to the device alone, so it is an upper
// bound: blocks find their class by a prefix sum over `first` (a few reads of a warp), those left over return. Nothing waits for
// the device, and a launch can be captured in a CUDA graph.
//
// A node's DEPTH channels with their components lie together in memory and come to shared memory as they are;
// a row of the tile is a component, its numbers DIM apart (PITCH keeps banks apart). W comes from where e3nn
// keeps it. Constants and attrs multiply sums; in float64, whose products go straight to the result's sums, they multiply x as it is
// read, or, where all is multiplied by the same (ONE_SCALE, and a row of one class), the result. Rows of the tile are there one component of
// all nodes after the other, which keeps lanes out of each other's banks. The result leaves mul_ir through shared memory. TRANSPOSED is
// the gradient of x: in and out exchanged, W read along w.
// Bytes, b to a number: b N (x + out), x for further columns from the second-level cache, for the blocks of a
// tile of nodes are neighbours in the grid; W of the species that occur once a tile of nodes, from that cache, too.
//
// Without SORTED all rows have one matrix, SPECIES is 1 and there are no attrs: o3.Linear.
//
// SLICED is for long sums of few rows, of which there are fewer tiles than a device has room for. A block walks along its sum DEPTH
// channels at a time, and each step waits for the one before, so a long sum takes its time however little there is to do. It is
// cut: gridDim.y blocks have a slice each of a tile's steps (u of all paths, one path after the other), the same of every
// species, and write what they have of the result to a place of their own, [slice, row, out]; one without a step writes
// zeros. sum_shares.cu adds them up, first slice first: the order of a sum is that of the shapes, and nothing is
// atomic. Bytes: b N out (2 slices + 1) more, in the second-level cache. A single slice is the result.
//
// plan.cuh: PATH, sorted by output block, ITEM = {first path, end, first column}, and how many steps there are where SLICED, those of
// fewer components first; DIMS, for each number of components that there is, that as a constant, its first item and how many it has;
// X_COPY, W_COPY and OUT_COPY, how many numbers lie together wherever a copy begins; WHOLE_CHANNELS, WHOLE_COLUMNS: all of them fill
// tiles; LEFT_ROOM, what the nodes of a tile take in shared memory. Of float64: STAGES, in dynamic shared memory; ONE_SCALE, whether
// all paths into an output block have one constant; COLUMNS and how warps share a tile.

#include "plan.cuh"
#include "right_tile.cuh"
#include "indexed_linear.cuh"

#ifndef STAGES
constexpr int STAGES = ROWS > TILE ? 3 : 4;  // within 48 KB
#endif
#ifndef ONE_SCALE
#define ONE_SCALE 0
#endif
constexpr bool STRAIGHT = sizeof(real) == 8;  // products go to sums without chains
constexpr bool COUNTED = STRAIGHT && ONE_SCALE && !SORTED;  // a step needs to know no more than that its numbers are there
constexpr int SLOT = LEFT_ROOM + RIGHT_ROOM;
constexpr int LEFT_COPIES = ROWS * DEPTH / X_COPY / THREADS, RIGHT_COPIES = TILE * DEPTH / W_COPY / THREADS;
// A copy of W is so many rows of W after the one before: float64, which needs registers for its sums, counts from the first one.
constexpr int RIGHT_LINES = THREADS * W_COPY / (TRANSPOSED ? DEPTH : TILE), RIGHT_POINTERS = STRAIGHT ? 1 : RIGHT_COPIES;
static_assert(THREADS * W_COPY % (TRANSPOSED ? DEPTH : TILE) == 0, "whole rows");
// Which node and component a row of the tile is; of those that are left over the node, or the component, is none.
template <int DIM>
__device__ __forceinline__ int node_of_row(int row) { return STRAIGHT ? row % (ROWS / DIM) : row / DIM; }
template <int DIM>
__device__ __forceinline__ int component_of_row(int row) { return STRAIGHT ? row / (ROWS / DIM) : row % DIM; }
// Of a node's results in shared memory.
template <int DIM>
constexpr int OUT_PITCH = TILE * DIM + 4;
constexpr int RESULTS = ROWS * (TILE + 4), MEMORY = STAGES * SLOT > RESULTS ? STAGES * SLOT : RESULTS;

// A block's work: tile `number` of nodes, for an item whose channels have DIM components.
template <int DIM>
__device__ __forceinline__ void tile_of(const Item& item, int number, const real* __restrict__ x, const real* __restrict__ attrs,
                                        const int* __restrict__ order, const int* __restrict__ first,
                                        const real* __restrict__ weights, long long rows, real* __restrict__ out, real* memory, Tile& s) {
    constexpr int dim = DIM, nodes = ROWS / dim, pitch = PITCH<DIM>;
    const int t = threadIdx.x;
    const Path to = PATH[item.first];
#if SLICED
    const int slice = blockIdx.y, slices = gridDim.y;
    const Place from = place_of(item, slice * item.steps / slices), until = place_of(item, (slice + 1) * item.steps / slices);
    const bool empty = slice * item.steps / slices == (slice + 1) * item.steps / slices;
    out += slice * rows * OUT_ROW;
    // Whether a slice's steps begin, or are over, within a path.
    auto begins_at = [&](const Step& step) { return step.path == from.path && step.channel == from.channel; };
    auto over = [&](const Step& step) { return step.path == until.path && step.channel == until.channel; };
#endif
#if SORTED
    if (t < 32) find_tile(s, first, number, nodes, t);
    for (int n = t; n < MASKS; n += THREADS) s.occurs[n] = 0;
    __syncthreads();
    if (s.kind < 0) return;
    const int count = s.count;
    const bool mixed = s.kind == SPECIES;
    for (int n = t; n < count; n += THREADS) s.row[n] = order[s.begin + n];
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
    const long long begin = (long long)number * nodes;
    if (begin >= rows) return;
    const int count = min((long long)nodes, rows - begin);
    constexpr bool mixed = false;
    if (t == 0) s.kind = 0;
    for (int n = t; n < count; n += THREADS) s.row[n] = begin + n;
    __syncthreads();
#endif

    // What this thread copies, step by step along a path's channels: from where, and where to in a slot. A tile
    // that no node fills has copies of its last one, in rows that nobody reads.
    const real *left_from[LEFT_COPIES], *right_from[RIGHT_POINTERS];
    int left_to[LEFT_COPIES];
    Path path;
    auto start = [&](const Step& step) {
        path = PATH[step.path];
        const int skipped = SLICED ? step.channel : 0;  // by a slice that begins within the path
#pragma unroll
        for (int i = 0; i < LEFT_COPIES; i++) {
            const int e = (t + i * THREADS) * X_COPY, node = e / (DEPTH * dim), at = e % (DEPTH * dim);
            left_from[i] = x + (long long)s.row[min(node, count - 1)] * IN_ROW + path.in + skipped * dim + at;
            left_to[i] = node < nodes ? node * pitch + at : -1;
        }
#pragma unroll
        for (int i = 0; i < RIGHT_POINTERS; i++) {
            const int e = (t + i * THREADS) * W_COPY;
#if TRANSPOSED
            right_from[i] = weights + path.weight + ((item.column + e / DEPTH) * SPECIES + step.species) * (long long)path.channels + skipped + e % DEPTH;
#else
            right_from[i] = weights + path.weight + ((skipped + e / TILE) * SPECIES + step.species) * (long long)path.columns + item.column + e % TILE;
#endif
        }
    };
    auto fetch = [&](const Step& step, real* left) {
#if SLICED
        if (step.channel == 0 || begins_at(step)) start(step);
#else
        if (step.channel == 0) start(step);
#endif
        real* right = left + LEFT_ROOM;
#pragma unroll
        for (int i = 0; i < LEFT_COPIES; i++) {
            int valid = X_COPY;
            if (!WHOLE_CHANNELS) {
                const int at = (t + i * THREADS) * X_COPY % (DEPTH * dim);
                valid = min(max((path.channels - step.channel) * dim - at, 0), X_COPY);
            }
            if (left_to[i] >= 0) copy_async<X_COPY>(left + left_to[i], valid ? left_from[i] : x, valid);
            left_from[i] += DEPTH * dim;
        }
#pragma unroll
        for (int i = 0; i < RIGHT_COPIES; i++) {
            const int e = (t + i * THREADS) * W_COPY;
            int valid = W_COPY;
#if TRANSPOSED
            const int channel = step.channel + e % DEPTH, column = item.column + e / DEPTH, place = e / DEPTH * RIGHT_PITCH + e % DEPTH;
            if (!WHOLE_CHANNELS) valid = min(max(path.channels - channel, 0), W_COPY);
            if (!WHOLE_COLUMNS && column >= path.columns) valid = 0;
#else
            const int channel = step.channel + e / TILE, column = item.column + e % TILE, place = e / TILE * RIGHT_PITCH + e % TILE;
            if (!WHOLE_COLUMNS) valid = min(max(path.columns - column, 0), W_COPY);
            if (!WHOLE_CHANNELS && channel >= path.channels) valid = 0;
#endif
            const real* from = right_from[i % RIGHT_POINTERS];
            if (STRAIGHT) from += i * RIGHT_LINES * SPECIES * (long long)(TRANSPOSED ? path.channels : path.columns);
            copy_async<W_COPY>(right + place, valid ? from : weights, valid);
            if (!STRAIGHT || i == RIGHT_COPIES - 1)
                right_from[i % RIGHT_POINTERS] += TRANSPOSED ? DEPTH : DEPTH * SPECIES * (long long)path.columns;
        }
    };

    auto advance = [&](Step& step) {
        step.channel += DEPTH;
#if SLICED
        if (step.channel < PATH[step.path].channels && !over(step)) return;
        if (!over(step)) {
            step.channel = 0;
            if (++step.path < item.end && !over(step)) return;
        }
        step.path = from.path, step.channel = from.channel;
#else
        if (step.channel < PATH[step.path].channels) return;
        step.channel = 0;
        if (++step.path < item.end) return;
        step.path = item.first;
#endif
        step.species = next_species(s, step.species + 1, mixed ? SPECIES : s.kind + 1);
    };

    Sums sums = {};
    const int end = mixed ? SPECIES : s.kind + 1;
#if SLICED
    Step step = {empty ? end : next_species(s, mixed ? 0 : s.kind, end), from.path, from.channel}, ahead = step;
#else
    Step step = {next_species(s, mixed ? 0 : s.kind, end), item.first, 0}, ahead = step;
#endif
    int slot = 0, slot_ahead = (STAGES - 1) * SLOT, arriving = 0;
#pragma unroll
    for (int n = 0; n < STAGES - 1; n++) {
        if (ahead.species < end) {
            fetch(ahead, memory + n * SLOT);
            advance(ahead);
            if (COUNTED) arriving++;
        }
        close_copies();
    }

    // Where this thread's rows begin in the left tile, and what multiplies them, read while copies are on their way: the single
    // non-zero. Rows without a node are not used.
    int begins[DOWN][2], node_of[DOWN][2];
    real own_scale[DOWN][2];
#pragma unroll
    for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int node = min(node_of_row<DIM>(own_row(i, half)), count - 1);
            const int component = STRAIGHT ? min(component_of_row<DIM>(own_row(i, half)), dim - 1) : component_of_row<DIM>(own_row(i, half));
            begins[i][half] = node * pitch + component + own_depth(0, 0) * dim;
            node_of[i][half] = node, own_scale[i][half] = 1;
#if SORTED
            if (!mixed) own_scale[i][half] = attrs[(long long)s.row[node] * SPECIES + s.kind];
#endif
        }
    while (COUNTED ? arriving > 0 : step.species < end) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        if (ahead.species < end) {
            fetch(ahead, memory + slot_ahead);
            advance(ahead);
            if (COUNTED) arriving++;
        }
        close_copies();
        const real *left = memory + slot, *right = left + LEFT_ROOM, constant = COUNTED ? (real)1 : PATH[step.path].scale;
        real scale[DOWN][2];
#pragma unroll
        for (int i = 0; i < DOWN; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const real a = mixed ? attrs[(long long)s.row[node_of[i][half]] * SPECIES + step.species] : own_scale[i][half];
                scale[i][half] = constant * a;
            }
        auto of_left = [&](int i, int half, int at, int n) { return left[begins[i][half] + (own_depth(at, n) - own_depth(0, 0)) * dim]; };
        auto of_right = [&](int j, int at, int n) { return number_of_right(right, own_depth(at, n), right_column(j)); };
        if constexpr (!STRAIGHT)
            multiply(sums, of_left, of_right, scale);
        else if (ONE_SCALE && !mixed)
            add_products(sums, of_left, of_right);
        else
            add_products(sums, [&](int i, int half, int at, int n) { return scale[i][half] * of_left(i, half, at, n); }, of_right);
        slot_ahead = slot, slot = slot == (STAGES - 1) * SLOT ? 0 : slot + SLOT;
        if (COUNTED)
            arriving--;
        else
            advance(step);
    }
#if SLICED
    wait_for_copies<0>();  // none is left but of a slice without a step, which has waited for nothing
#endif
    __syncthreads();

    // Through shared memory, where a node's TILE columns with all components come to lie as they do in `out`.
#pragma unroll
    for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int node = node_of_row<DIM>(own_row(i, half)), component = component_of_row<DIM>(own_row(i, half));
            if (node >= count || STRAIGHT && component >= dim) continue;
            real* row = memory + node * OUT_PITCH<DIM> + component;
            real factor = 1;
            if (STRAIGHT && ONE_SCALE && !mixed) factor = PATH[item.first].scale * own_scale[i][half];
#pragma unroll
            for (int j = 0; j < ACROSS; j++)
#pragma unroll
                for (int n = 0; n < 2; n++) row[(own_column(j) + n) * dim] = STRAIGHT ? factor * sums[i][j][2 * half + n] : sums[i][j][2 * half + n];
        }
    __syncthreads();
    struct alignas(OUT_COPY * sizeof(real)) Together {
        real of[OUT_COPY];
    };
    const int wide = (WHOLE_COLUMNS ? TILE : min(TILE, to.columns - item.column)) * dim;
    for (int e = t * OUT_COPY; e < count * TILE * dim; e += THREADS * OUT_COPY) {
        const int node = e / (TILE * dim), at = e % (TILE * dim);
        real *to_here = out + (long long)s.row[node] * OUT_ROW + to.out + item.column * dim + at, *here = memory + node * OUT_PITCH<DIM> + at;
        if (at + OUT_COPY <= wide)
            *reinterpret_cast<Together*>(to_here) = *reinterpret_cast<Together*>(here);
        else
            for (int n = 0; at + n < wide; n++) to_here[n] = here[n];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
indexed_linear(const real* __restrict__ x, const real* __restrict__ attrs, const int* __restrict__ order,
               const int* __restrict__ first, const real* __restrict__ weights, long long rows, real* __restrict__ out) {
#ifdef STAGES
    extern __shared__ __align__(16) real memory[];
#else
    __shared__ __align__(16) real memory[MEMORY];
#endif
    __shared__ Tile s;
    long long block = blockIdx.x;
#define OF_DIM(DIM, FIRST, HERE)                                                                                                    \
    {                                                                                                                               \
        const long long blocks = HERE * (rows / (ROWS / DIM) + min(rows, SORTED ? SPECIES + 1ll : 1ll));                              \
        if (block < blocks)                                                                                                         \
            return tile_of<DIM>(ITEM[FIRST + block % HERE], block / HERE, x, attrs, order, first, weights, rows, out, memory, s);   \
        block -= blocks;                                                                                                            \
    }
    DIMS(OF_DIM)
}
