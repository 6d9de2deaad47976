// Vectors and lengths of edges, and the gradient of positions: what lies between atoms and all that a model makes of edges.
//
//   v[e] = x[receiver e] - x[sender e] + shift[e],  l[e] = |v[e]|
//   g[e] = dv[e] + dl[e] (v[e] / l[e])    the last term 0 where l[e] is 0, as torch has it
//   dx[n] = sum over edges e that n receives: g[e], less the sum over those that n sends;  dshift[e] = g[e]
//
// edge_vectors: a thread owns an edge. An index counts from the end where it is negative, and what is no atom stops the
// program, as torch's own indexing does. Bytes, b to a number: 16 + 10 b an edge, of it 6 b gathered.
//
// edge_vectors_gradient: a warp owns an atom, its lanes every 32nd of the edges that it receives, then of those that it sends, and
// they add up by shuffles: the order of a sum is that of the edges, and nothing is atomic. An edge's g is found twice, at
// each of its ends, instead of being written and read; dshift, where it is wanted, is written at the receiver. Bytes: 16 b an edge gathered,
// whole sectors where edges lie in the order of their atoms, 8 of the orders, 3 b an atom.
//
// torch takes five kernels forward and ten back, and with few atoms each takes as long as one of these. Compiled without
// fused multiply-adds, and squares are added up in torch's order: everything is rounded as torch's operations and sum_groups.cu
// round it, to the bit, so that a replay has an eager call's numbers.

#include "plan.cuh"  // THREADS
#include "real.cuh"

struct Three {
    real x, y, z;
};

__device__ __forceinline__ int atom_of(long long index, int nodes) {
    if (index < 0) index += nodes;
    if (index < 0 || index >= nodes) __trap();
    return (int)index;
}

extern "C" __global__ void __launch_bounds__(THREADS)
edge_vectors(const real* __restrict__ positions, const long long* __restrict__ edge_index, const real* __restrict__ shifts, long long edges,
             int nodes, real* __restrict__ vectors, real* __restrict__ lengths) {
    const long long e = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (e >= edges) return;
    const real* from = positions + 3ll * atom_of(edge_index[e], nodes);
    const real* to = positions + 3ll * atom_of(edge_index[edges + e], nodes);
    real v[3];
#pragma unroll
    for (int c = 0; c < 3; c++) {
        v[c] = to[c] - from[c];
        if (shifts) v[c] += shifts[3 * e + c];
        vectors[3 * e + c] = v[c];
    }
    lengths[e] = sqrt((v[0] * v[0] + v[2] * v[2]) + v[1] * v[1]);  // as two of torch's threads add three squares up
}

// g of an edge; dv and dl may be missing, where nothing depends on vectors or on lengths.
__device__ __forceinline__ Three gradient_of(long long e, const real* __restrict__ dv, const real* __restrict__ dl,
                                             const real* __restrict__ vectors, const real* __restrict__ lengths) {
    Three g = {0, 0, 0};
    if (dv) g = {dv[3 * e], dv[3 * e + 1], dv[3 * e + 2]};
    if (dl) {
        const real length = lengths[e], along = length == 0 ? (real)0 : dl[e], by = length == 0 ? (real)1 : length;
        g.x += along * (vectors[3 * e] / by), g.y += along * (vectors[3 * e + 1] / by), g.z += along * (vectors[3 * e + 2] / by);
    }
    return g;
}

extern "C" __global__ void __launch_bounds__(THREADS)
edge_vectors_gradient(const real* __restrict__ dv, const real* __restrict__ dl, const real* __restrict__ vectors, const real* __restrict__ lengths,
                      const int* __restrict__ by_receiver, const int* __restrict__ first_of_receiver, const int* __restrict__ by_sender,
                      const int* __restrict__ first_of_sender, int nodes, real* __restrict__ dpositions, real* __restrict__ dshifts) {
    const int n = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (n >= nodes) return;
    real received[3] = {0, 0, 0}, sent[3] = {0, 0, 0};
    for (int t = first_of_receiver[n] + lane; t < first_of_receiver[n + 1]; t += 32) {
        const long long e = by_receiver[t];
        const Three g = gradient_of(e, dv, dl, vectors, lengths);
        received[0] += g.x, received[1] += g.y, received[2] += g.z;
        if (dshifts) dshifts[3 * e] = g.x, dshifts[3 * e + 1] = g.y, dshifts[3 * e + 2] = g.z;
    }
    for (int t = first_of_sender[n] + lane; t < first_of_sender[n + 1]; t += 32) {
        const Three g = gradient_of(by_sender[t], dv, dl, vectors, lengths);
        sent[0] += g.x, sent[1] += g.y, sent[2] += g.z;
    }
#pragma unroll
    for (int c = 0; c < 3; c++) {
#pragma unroll
        for (int apart = 16; apart > 0; apart /= 2) {
            received[c] += __shfl_xor_sync(0xffffffffu, received[c], apart);
            sent[c] += __shfl_xor_sync(0xffffffffu, sent[c], apart);
        }
        if (lane == 0) dpositions[3ll * n + c] = received[c] - sent[c];
    }
}
