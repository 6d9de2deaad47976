// The gradient of the weights of a species-indexed linear, see indexed_linear.cu:
//
//   dW_p[u,s,w] = c_p * sum over nodes n, components k:  attrs[n,s] * x[n,u,k] * g[n,w,k]
//
// A block owns 64 u and 64 w of one path and species, and a slice of the species's rows (and of those of
// the last class, which may have any species); it takes DEPTH / dim nodes at a time, in the order
// in which they are sorted. All blocks write, zero where a species doesn't occur. Slices are as many as the
// shapes say, are kept apart and added up in a fixed order: bit-reproducible, no atomics.
// Bytes, b to a number: b N (x ceil(w / 64) + g ceil(u / 64)) and slices times dW.
//
// Without SORTED all rows have one matrix, SPECIES is 1 and there are no attrs.
//
// plan.cuh: PATH, ITEM = {path, first u, first w}.

#include "plan.cuh"
#include "matrix_tile.cuh"

constexpr int CHUNK = 256;  // nodes whose numbers are fetched at once

struct Rows {
    int row[CHUNK];
    real scale[CHUNK];
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
indexed_linear_weights(const real* __restrict__ x, const real* __restrict__ grad, const real* __restrict__ attrs,
                       const int* __restrict__ order, const int* __restrict__ first, long long rows,
                       real* __restrict__ sums_of_slices) {
    __shared__ Four memory[ALL_FOURS];
    __shared__ Rows s;
    const int t = threadIdx.x, species = blockIdx.y;
    const Item item = ITEM[blockIdx.x];
    const Path path = PATH[item.path];
    const int dim = path.dim, nodes = DEPTH / dim;
    real* const tiles = memory[0].of;
    // rows of the tiles that no node fills stay zero
    for (int n = t; n < 4 * ALL_FOURS; n += THREADS) tiles[n] = 0;

    // Numbers that this thread brings of x and of grad, in the order of memory: node, component, channel.
    int place[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int e = t + i * THREADS, node = e / (TILE * dim), at = e % (TILE * dim);
        place[i] = node | at % dim << 8 | at / dim << 16;
    }
    real left[EACH], right[EACH];

    auto fetch = [&](int begin, int count) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int node = begin + (place[i] & 255), component = place[i] >> 8 & 255, channel = place[i] >> 16;
            left[i] = right[i] = 0;
            if ((place[i] & 255) >= nodes || node >= count) continue;
            const long long row = s.row[node];
            const int u = item.u + channel, w = item.w + channel;
            if (u < path.channels) left[i] = x[row * IN_ROW + path.in + u * dim + component];
            if (w < path.columns) right[i] = grad[row * OUT_ROW + path.out + w * dim + component];
        }
    };
    auto put = [&](int begin, int count, real* a) {
        real* b = a + 4 * TILE_FOURS;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int node = place[i] & 255;
            if (node >= nodes) continue;
            const int at = (node * dim + (place[i] >> 8 & 255)) * STRIDE + (place[i] >> 16);
            a[at] = begin + node < count ? s.scale[begin + node] * left[i] : (real)0;
            b[at] = right[i];
        }
    };

    Sums sums = {};
    for (int part = 0; part <= SORTED; part++) {
#if SORTED
        const int kind = part ? SPECIES : species;
        const long long from = first[kind], length = first[kind + 1] - from;
#else
        const long long from = 0, length = rows;
#endif
        const int begin = from + length * blockIdx.z / gridDim.z, end = from + length * (blockIdx.z + 1) / gridDim.z;
        for (int chunk = begin; chunk < end; chunk += CHUNK) {
            const int count = min(CHUNK, end - chunk);
            for (int n = t; n < count; n += THREADS) {
#if SORTED
                s.row[n] = order[chunk + n];
                s.scale[n] = attrs[(long long)s.row[n] * SPECIES + species];
#else
                s.row[n] = chunk + n;
                s.scale[n] = 1;
#endif
            }
            __syncthreads();
            fetch(0, count);
            put(0, count, tiles);
            __syncthreads();
            int buffer = 0;
            for (int node = 0; node < count; node += nodes) {
                const bool more = node + nodes < count;
                if (more) fetch(node + nodes, count);
                const real* a = tiles + buffer * 8 * TILE_FOURS;
                multiply(a, a + 4 * TILE_FOURS, sums);
                buffer ^= 1;
                if (more) put(node + nodes, count, tiles + buffer * 8 * TILE_FOURS);
                __syncthreads();
            }
        }
    }

    real* to = sums_of_slices + (long long)blockIdx.z * WEIGHTS + path.weight;
#pragma unroll
    for (int i = 0; i < OWN_ROWS; i++) {
        const int u = item.u + own_row() + i;
#pragma unroll
        for (int j = 0; j < OWN_COLUMNS; j++) {
            const int w = item.w + own_column() + j;
            if (u < path.channels && w < path.columns)
                to[((long long)u * SPECIES + species) * path.columns + w] = path.scale * sums[i][j];
        }
    }
}
