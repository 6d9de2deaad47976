// The edges of a small graph in the order of their receivers, and of their senders, by counting alone.
//
//   key[e] = edge_index[end,e], counted from the end of `nodes` where it is negative; nodes where there is no such node
//   order[end, rank(e)] = e    with rank(e) = number of edges with a lower key, or the same and a lower number
//   first[end, n] = number of edges with a key below n, for n up to nodes
//   out = senders [edges], order [2, edges], first [2, nodes + 1]
//
// A warp counts for EACH of these at a time, edges and starts alike, its lanes going through all keys, which every
// block has in shared memory. That is (edges + nodes) edges comparisons for each end, instead of a dozen launches of torch,
// two sorts and two searches among them; so for few edges only (`edges.py`). Reads 16
// edges bytes a block, writes 12 edges + 8 nodes. No atomics, stable.

#include "plan.cuh"  // THREADS, EACH

constexpr int WARPS = THREADS / 32;

__device__ __forceinline__ long long counted(long long key, int nodes) { return key < 0 ? key + nodes : key; }

extern "C" __global__ void __launch_bounds__(THREADS)
edges_in_order(const long long* __restrict__ edge_index, int edges, int nodes, int* __restrict__ out) {
    int *const senders = out, *const order = senders + edges, *const first = order + 2 * edges;
    extern __shared__ int keys[];  // [edges]
    const int end = blockIdx.y, lane = threadIdx.x % 32, items = edges + nodes + 1;
    const bool writes_senders = end == 0 && blockIdx.x == 0;
    for (int e = threadIdx.x; e < edges; e += THREADS) {
        const long long key = counted(edge_index[(long long)end * edges + e], nodes);
        keys[e] = (int)min(max(key, -1LL), (long long)nodes);
        if (writes_senders) senders[e] = (int)key;
    }
    __syncthreads();

    const int begin = (blockIdx.x * WARPS + threadIdx.x / 32) * EACH;
    int key[EACH], before[EACH], count[EACH];  // counted: lower keys, and equal ones of edges before
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int item = begin + i;
        key[i] = item < edges ? keys[item] : item - edges, before[i] = item < edges ? item : 0, count[i] = 0;
    }
    for (int e = lane; e < edges; e += 32) {
        const int other = keys[e];
#pragma unroll
        for (int i = 0; i < EACH; i++) count[i] += other < key[i] || (other == key[i] && e < before[i]);
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        for (int step = 16; step > 0; step /= 2) count[i] += __shfl_xor_sync(0xffffffffu, count[i], step);
        const int item = begin + i;
        if (lane || item >= items) continue;
        if (item < edges)
            order[(long long)end * edges + count[i]] = item;
        else
            first[(long long)end * (nodes + 1) + item - edges] = count[i];
    }
}
