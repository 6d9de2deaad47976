// The gradient of the weights of a species-indexed linear, see indexed_linear.cu:
//
//   dW_p[u,s,w] = c_p * sum over nodes n, components k:  attrs[n,s] * x[n,u,k] * g[n,w,k]
//
// A block owns 64 u and 64 w of one path and species, and a slice of the species's rows (and of those of
// the last class, which may have any species); it takes DEPTH / dim nodes at a time, in the order
// in which they are sorted: their 64 u, and w, with all components lie together in memory and come to shared
// memory as they are. All blocks write, zero where a species doesn't occur. Slices are as many as the
// shapes say, are kept apart and added up in a fixed order: bit-reproducible, no atomics.
// Bytes, b to a number: b N (x ceil(w / 64) + g ceil(u / 64)) and slices times dW.
//
// Without SORTED all rows have one matrix, SPECIES is 1 and there are no attrs.
//
// plan.cuh: PATH, ITEM = {path, first u, first w}, those with most components first, for they take longest; DIMS,
// for each number of components that there is, as a constant;
// X_COPY and OUT_COPY, how many numbers lie together wherever a copy begins; WHOLE_CHANNELS, WHOLE_COLUMNS: all of
// them fill tiles; NODE_ROOM, what a tile takes in shared memory.

#include "plan.cuh"
#include "matrix_tile.cuh"

static_assert(ROWS == TILE, "u and w are cut alike");
#ifndef STAGES  // of float64 plan.cuh's, in dynamic shared memory
constexpr int STAGES = 4;
#endif
constexpr int SLOT = 2 * NODE_ROOM;
constexpr int X_COPIES = TILE * DEPTH / X_COPY / THREADS, G_COPIES = TILE * DEPTH / OUT_COPY / THREADS;

// Of the nodes of a slot, by the threads that look them up while others are multiplied.
struct Nodes {
    int row[STAGES][DEPTH];  // of x and grad; -1: none
    real scale[STAGES][DEPTH];
};

// The nodes of a block, one after the other: those of its share of the species, then of the last class.
struct Share {
    int begin[2], end[2];
    __device__ __forceinline__ int count() const { return end[0] - begin[0] + end[1] - begin[1]; }
    __device__ __forceinline__ int at(int n) const {
        return n < end[0] - begin[0] ? begin[0] + n : begin[1] + n - (end[0] - begin[0]);
    }
};

// A block's work: a tile of weights of a species, over a slice of its rows, of a path whose channels have DIM components.
template <int DIM>
__device__ __forceinline__ void tile_of(const Item& item, int slice, int slices, const real* __restrict__ x,
                                        const real* __restrict__ grad, const real* __restrict__ attrs,
                                        const int* __restrict__ order, const int* __restrict__ first, long long rows,
                                        real* __restrict__ sums_of_slices, real* memory, Nodes& s) {
    constexpr int dim = DIM, nodes = DEPTH / dim, pitch = PITCH<DIM>;
    const int t = threadIdx.x, species = blockIdx.y;
    const Path path = PATH[item.path];
    const real *x_begin = x + path.in + item.u * dim, *g_begin = grad + path.out + item.w * dim;

    Share share;
#pragma unroll
    for (int part = 0; part < 2; part++) {
#if SORTED
        const long long from = first[part ? SPECIES : species], length = first[(part ? SPECIES : species) + 1] - from;
#else
        const long long from = 0, length = part ? 0 : rows;
#endif
        share.begin[part] = from + length * slice / slices, share.end[part] = from + length * (slice + 1) / slices;
    }
    const int count = share.count();

    auto row_of = [&](int n) {
        if (t >= nodes || n + t >= count) return -1;
#if SORTED
        return order[share.at(n + t)];
#else
        return share.at(n + t);
#endif
    };
    auto scale_of = [&](int row) { return SORTED && row >= 0 ? attrs[(long long)row * SPECIES + species] : (real)1; };

    // What this thread copies of x and of grad: node and number of its TILE channels, or -1.
    int x_copied[X_COPIES], g_copied[G_COPIES];
    auto nth = [&](int e) { return e / (TILE * dim) < nodes ? e / (TILE * dim) << 16 | e % (TILE * dim) : -1; };
#pragma unroll
    for (int i = 0; i < X_COPIES; i++) x_copied[i] = nth((t + i * THREADS) * X_COPY);
#pragma unroll
    for (int i = 0; i < G_COPIES; i++) g_copied[i] = nth((t + i * THREADS) * OUT_COPY);
    auto fetch = [&](int slot) {
        real *left = memory + slot * SLOT, *right = left + NODE_ROOM;
#pragma unroll
        for (int i = 0; i < X_COPIES; i++) {
            if (x_copied[i] < 0) continue;
            const int node = x_copied[i] >> 16, at = x_copied[i] & 0xffff, row = s.row[slot][node];
            int valid = row < 0 ? 0 : X_COPY;
            if (!WHOLE_CHANNELS) valid = min(valid, max((path.channels - item.u) * dim - at, 0));
            copy_async<X_COPY>(left + node * pitch + at, valid ? x_begin + (long long)row * IN_ROW + at : x, valid);
        }
#pragma unroll
        for (int i = 0; i < G_COPIES; i++) {
            if (g_copied[i] < 0) continue;
            const int node = g_copied[i] >> 16, at = g_copied[i] & 0xffff, row = s.row[slot][node];
            int valid = row < 0 ? 0 : OUT_COPY;
            if (!WHOLE_COLUMNS) valid = min(valid, max((path.columns - item.w) * dim - at, 0));
            copy_async<OUT_COPY>(right + node * pitch + at, valid ? g_begin + (long long)row * OUT_ROW + at : grad, valid);
        }
    };

    // Where the nodes and components lie over which this thread sums; -1 for what the nodes leave free of DEPTH.
    int place[STEPS][2], node_of[STEPS][2];
#pragma unroll
    for (int at = 0; at < STEPS; at++)
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int node = own_depth(at, n) / dim;
            place[at][n] = node < nodes ? node * pitch + own_depth(at, n) % dim : -1, node_of[at][n] = min(node, nodes - 1);
        }

    if (t < DEPTH)
        for (int n = 0; n < STAGES; n++) {
            const int row = row_of(n * nodes);
            s.row[n][t] = row, s.scale[n][t] = scale_of(row);
        }
    __syncthreads();

    Sums sums = {};
    real scale_ahead = 0;
    int slot = 0;
#pragma unroll
    for (int n = 0; n < STAGES - 1; n++) {
        if (n * nodes < count) fetch(n);
        close_copies();
    }
    for (int done = 0; done < count; done += nodes) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        if (done + (STAGES - 1) * nodes < count) fetch((slot + STAGES - 1) % STAGES);
        close_copies();
        // Rows are read from the barrier on that comes next, scales from the one after, as others may still
        // multiply by those that were here.
        if (t < DEPTH && done) s.scale[(slot + STAGES - 1) % STAGES][t] = scale_ahead;
        const int row_ahead = row_of(done + STAGES * nodes);
        scale_ahead = scale_of(row_ahead);
        const real *left = memory + slot * SLOT, *right = left + NODE_ROOM;
        real ones[DOWN][2];
#pragma unroll
        for (int i = 0; i < DOWN; i++) ones[i][0] = ones[i][1] = 1;
        auto of_left = [&](int i, int half, int at, int n) {
            if (place[at][n] < 0) return (real)0;
            const real value = left[place[at][n] + own_row(i, half) * dim];
            return SORTED ? s.scale[slot][node_of[at][n]] * value : value;
        };
        auto of_right = [&](int j, int at, int n) { return place[at][n] < 0 ? (real)0 : right[place[at][n] + right_column(j) * dim]; };
        if constexpr (sizeof(real) == 8)
            add_products(sums, of_left, of_right);
        else
            multiply(sums, of_left, of_right, ones);
        if (t < DEPTH) s.row[slot][t] = row_ahead;
        slot = (slot + 1) % STAGES;
    }

    real* to = sums_of_slices + (long long)slice * WEIGHTS + path.weight;
#pragma unroll
    for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int j = 0; j < ACROSS; j++)
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const int u = item.u + own_row(i, n / 2), w = item.w + own_column(j) + n % 2;
                if (u < path.channels && w < path.columns)
                    to[((long long)u * SPECIES + species) * path.columns + w] = path.scale * sums[i][j][n];
            }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
indexed_linear_weights(const real* __restrict__ x, const real* __restrict__ grad, const real* __restrict__ attrs,
                       const int* __restrict__ order, const int* __restrict__ first, long long rows,
                       real* __restrict__ sums_of_slices) {
#ifdef STAGES
    extern __shared__ __align__(16) real memory[];
#else
    __shared__ __align__(16) real memory[STAGES * SLOT];
#endif
    __shared__ Nodes s;
    const int slices = gridDim.x / ITEMS;
    const Item item = ITEM[blockIdx.x / slices];
    switch (PATH[item.path].dim) {
#define OF_DIM(DIM) \
    case DIM: tile_of<DIM>(item, blockIdx.x % slices, slices, x, grad, attrs, order, first, rows, sums_of_slices, memory, s); break;
        DIMS(OF_DIM)
    }
}
