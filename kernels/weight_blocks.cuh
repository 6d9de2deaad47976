// Blocks that each have a tile of a linear's weights, CHANNELS u by COLUMNS w of a path, and a share of the rows; and how their sums are added up.
//
// Blocks of a number of components (DIM) have its tiles of the first rows, then those of the next. They go through rows in steps of NODES<DIM>,
// and have all about as much to do, `work`, of which a step is COST<DIM>.
// Every block writes its sums where nobody else does. Those of a tile are added up in a fixed order: the same bits each time.
#pragma once

#include "real.cuh"

#ifndef TRANSPOSED
#define TRANSPOSED 0
#endif
constexpr int OF_TILE = CHANNELS * COLUMNS, SUMMING = 256;  // numbers; threads that add them up

template <int DIM>
__device__ __forceinline__ long long rows_of_block(int work) {
    if constexpr (COST<DIM> == 1) return (long long)work * NODES<DIM>;
    return max(1, work / COST<DIM>) * NODES<DIM>;  // a step at least
}

template <int DIM>
__device__ __forceinline__ int slices_of(long long rows, int work) {
    const long long each = rows_of_block<DIM>(work);
    return (int)((rows + each - 1) / each);
}

// What a block sums: so many rows.
struct Share {
    const real *x, *grad;  // of the first
    int rows, left_bytes, right_bytes;  // of a node
};

template <int DIM>
__device__ __forceinline__ Share share_of(const Item& item, int slice, const real* x, const real* grad, long long rows, int work) {
    const Path path = PATH[item.path];
    const long long each = rows_of_block<DIM>(work), begin = slice * each;
    const int of_channel = DIM * sizeof(real);
    return {x + begin * IN_ROW + path.in + item.u * DIM, grad + begin * OUT_ROW + path.out + item.w * DIM, (int)min(rows - begin, each),
            min(CHANNELS, path.channels - item.u) * of_channel, min(COLUMNS, path.columns - item.w) * of_channel};
}

// A block adds up 16 bytes to a lane of a warp, those of every so manyth block in each warp, and then what its warps have.
struct alignas(16) Numbers {
    static constexpr int count = 16 / sizeof(real);
    real of[count];
    __device__ __forceinline__ void add(const Numbers& other) {
#pragma unroll
        for (int n = 0; n < count; n++) of[n] += other.of[n];
    }
};

extern "C" __global__ void __launch_bounds__(SUMMING)
sum_of_blocks(const real* __restrict__ sums_of_blocks, long long rows, int work, real* __restrict__ weights) {
    constexpr int warps = SUMMING / 32, of_warp = 32 * Numbers::count, parts = OF_TILE / of_warp;
    __shared__ Numbers of_warps[warps][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, number = blockIdx.x / parts;
    const int at = blockIdx.x % parts * of_warp + lane * Numbers::count;
    long long first = at, next = 0;
    int slices = 0;
#define FIND(DIM, FIRST, HERE)                                                 \
    if (number >= FIRST && number < FIRST + HERE) {                            \
        slices = slices_of<DIM>(rows, work), next = (long long)HERE * OF_TILE; \
        first += (long long)(number - FIRST) * OF_TILE;                        \
    } else if (number >= FIRST + HERE)                                         \
        first += (long long)HERE * slices_of<DIM>(rows, work) * OF_TILE;
    DIMS(FIND)
    Numbers sum = {};
#pragma unroll 4
    for (int slice = warp; slice < slices; slice += warps) sum.add(*reinterpret_cast<const Numbers*>(sums_of_blocks + first + slice * next));
    of_warps[warp][lane] = sum;
    __syncthreads();
    if (warp > 0) return;
    for (int other = 1; other < warps; other++) sum.add(of_warps[other][lane]);
    const Item item = ITEM[number];
    const Path path = PATH[item.path];
    const int u = item.u + at / COLUMNS, w = item.w + at % COLUMNS;
    if (u >= path.channels || w >= path.columns) return;
    const int of_next = TRANSPOSED ? path.channels : 1;
    real* to = weights + path.weight + (TRANSPOSED ? w * path.channels + u : u * path.columns + w);
#pragma unroll
    for (int n = 0; n < Numbers::count; n++) to[n * of_next] = path.scale * sum.of[n];
}
