// MACE's reshape_irreps, between the linear after a convolution and the contraction: what mul_ir has irrep by irrep,
// with all components of a channel side by side.
//
//   out[n, u, FIRST_l + m] = x[n, MUL FIRST_l + u DIM_l + m]        FIRST_l = sum of DIM before l
//
// A block owns CHANNELS channels of a node. They go through shared memory, where they lie as in x: read in a run of
// CHANNELS DIM_l numbers for each irrep and written in one run, or the other way round for the gradient, so that global
// memory sees full lines both ways. Every number is read once and written once. torch's cat does no more forward;
// backward it pads each irrep's gradient with zeros to a whole row and adds the rows, seven times as much.

#include "plan.cuh"  // MUL, COLUMNS, IRREPS, DIM[IRREPS], FIRST[IRREPS], CHANNELS, THREADS
#include "real.cuh"

constexpr int CHUNKS = (MUL + CHANNELS - 1) / CHANNELS;

// What a block has: its first channel, how many there are, and where its node's row begins.
struct Work {
    int channel, count;
    long long row;

    __device__ __forceinline__ Work()
        : channel(blockIdx.x % CHUNKS * CHANNELS), count(min(CHANNELS, MUL - channel)), row((long long)(blockIdx.x / CHUNKS) * MUL * COLUMNS) {}
};

// Where number n of the block's channels, all components together, lies in shared memory.
__device__ __forceinline__ int place(int n) {
    const int u = n / COLUMNS, column = n % COLUMNS;
    int found = 0;
#pragma unroll
    for (int l = 0; l < IRREPS; l++)
        if (column >= FIRST[l]) found = CHANNELS * FIRST[l] + u * DIM[l] + column - FIRST[l];
    return found;
}

// Calls do_with(number in shared memory, number of the node's row in mul_ir) for what this thread copies.
template <class Action>
__device__ __forceinline__ void irrep_by_irrep(const Work& work, const Action& action) {
#pragma unroll
    for (int l = 0; l < IRREPS; l++)
        for (int n = threadIdx.x; n < work.count * DIM[l]; n += THREADS) action(CHANNELS * FIRST[l] + n, MUL * FIRST[l] + work.channel * DIM[l] + n);
}

extern "C" __global__ void __launch_bounds__(THREADS) reshape_irreps(const real* __restrict__ x, real* __restrict__ out) {
    __shared__ real shared[CHANNELS * COLUMNS];
    const Work work;
    irrep_by_irrep(work, [&](int here, int there) { shared[here] = x[work.row + there]; });
    __syncthreads();
    for (int n = threadIdx.x; n < work.count * COLUMNS; n += THREADS) out[work.row + work.channel * COLUMNS + n] = shared[place(n)];
}

extern "C" __global__ void __launch_bounds__(THREADS) reshape_irreps_back(const real* __restrict__ g, real* __restrict__ out) {
    __shared__ real shared[CHANNELS * COLUMNS];
    const Work work;
    for (int n = threadIdx.x; n < work.count * COLUMNS; n += THREADS) shared[place(n)] = g[work.row + work.channel * COLUMNS + n];
    __syncthreads();
    irrep_by_irrep(work, [&](int here, int there) { out[work.row + there] = shared[here]; });
}
