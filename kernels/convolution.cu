// Gather, uvu tensor product and sum at the receiver, in one kernel, with first and second derivatives.
//
//   out[n,u,k] = sum over edges e into n, terms p:  w[e,p,u] * sum_i x[sender(e),u,i] * M_p[e,i,k]
//   M_p[e,i,k] = sum_j C_p[i,j,k] * y[e,j]                       (depends on the edge alone)
//
// A block owns one receiver and THREADS channels, a thread one channel u: outputs stay in registers
// over all edges of the node and are written once, so sums have a fixed order and isolated nodes
// need no zero-filling. Edges come in batches of EDGES: the block builds their M in shared memory,
// then each thread runs through them with the weights and features of the next edge already on
// their way (registers), since the weights, read once, are nearly all of the traffic. Where there are few
// receivers, several blocks share the edges of one: backward's results are an edge's each, forward's are
// [shares, nodes], which sum_shares.cu adds up.
//
// Bytes, b to a number: b E (weights + y) + b N (x + out) forward; backward reads and writes the
// weights once more each. The features gathered come from the second-level cache.
//
// Each kernel is compiled by itself (FORWARD, BACKWARD with WANT_X, WANT_Y, WANT_W, DOUBLE, GATHER).

#include "convolution.cuh"

struct Batch {
    real y[EDGES][Y_COMPONENTS];
#if DOUBLE
    real hy[EDGES][Y_COMPONENTS];
    real h[EDGES][M_PADDED];
#endif
    real m[EDGES][M_PADDED];
    int edge[EDGES];
    int sender[EDGES];
};

__device__ __forceinline__ void couple(real (*m)[M_PADDED], const real (*y)[Y_COMPONENTS], int edges) {
    for (int t = threadIdx.x; t < edges * M_ENTRIES; t += THREADS) {
        const int e = t / M_ENTRIES, q = t % M_ENTRIES;
        real sum = 0;
        UNROLL for (int s = 0; s < M_TERMS; s++) sum = multiply_add(M_VALUE[q][s], y[e][M_Y[q][s]], sum);
        m[e][q] = sum;
    }
}

__device__ __forceinline__ void fetch_batch(Batch& b, const int* order, const int* senders, const real* y,
                                            const real* hy, int first, int edges) {
    __syncthreads();  // the batch before is done with
    for (int t = threadIdx.x; t < edges; t += THREADS) {
        const int e = order[first + t];
        b.edge[t] = e;
        b.sender[t] = senders[e];
    }
    __syncthreads();
    for (int t = threadIdx.x; t < edges * Y_COMPONENTS; t += THREADS) {
        const int e = t / Y_COMPONENTS, j = t % Y_COMPONENTS;
        const long long at = (long long)b.edge[e] * Y_ROW + Y_AT[j];
        b.y[e][j] = y[at];
#if DOUBLE
        b.hy[e][j] = hy[at];
#endif
    }
    __syncthreads();
    couple(b.m, b.y, edges);
#if DOUBLE
    couple(b.h, b.hy, edges);
#endif
    __syncthreads();
}

__device__ __forceinline__ void fetch_weights(real (&w)[TERMS], const real* weights, long long edge, int u) {
    UNROLL for (int p = 0; p < TERMS; p++)
        w[p] = TERM[p].weight < 0 ? (real)1
               : ACTIVE(TERM[p].mul)  ? load_once(weights + edge * WEIGHT_ROW + TERM[p].weight + u * TERM[p].stride)
                                  : (real)0;
}

__device__ __forceinline__ void fetch_features(real (&x)[X_COMPONENTS], const real* features, long long node, int u) {
    UNROLL for (int i = 0; i < X_COMPONENTS; i++)
        x[i] = ACTIVE(IN_ROW[i].mul) ? __ldg(features + node * X_ROW + IN_ROW[i].offset + u * IN_ROW[i].stride) : (real)0;
}

#if FORWARD
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
convolution_forward(const real* __restrict__ x, const real* __restrict__ y, const real* __restrict__ weights,
                    const int* __restrict__ order, const int* __restrict__ senders, const int* __restrict__ first,
                    real* __restrict__ out) {
    __shared__ Batch b;
    const int node = blockIdx.x, u = blockIdx.y * THREADS + threadIdx.x;
    const auto [begin, end] = share_of(first, node);
    real sums[OUT_COMPONENTS];
    UNROLL for (int k = 0; k < OUT_COMPONENTS; k++) sums[k] = 0;
    for (int base = begin; base < end; base += EDGES) {
        const int edges = min(EDGES, end - base);
        fetch_batch(b, order, senders, y, y, base, edges);
        real w_next[TERMS], x_next[X_COMPONENTS];
        fetch_weights(w_next, weights, b.edge[0], u);
        fetch_features(x_next, x, b.sender[0], u);
        for (int e = 0; e < edges; e++) {
            real w[TERMS], xs[X_COMPONENTS];
            UNROLL for (int p = 0; p < TERMS; p++) w[p] = w_next[p];
            UNROLL for (int i = 0; i < X_COMPONENTS; i++) xs[i] = x_next[i];
            if (e + 1 < edges) {
                fetch_weights(w_next, weights, b.edge[e + 1], u);
                fetch_features(x_next, x, b.sender[e + 1], u);
            }
            UNROLL for (int p = 0; p < TERMS; p++) {
                real t[MAX_D1];
                UNROLL for (int i = 0; i < TERM[p].d1; i++) t[i] = w[p] * xs[TERM[p].x + i];
                accumulate(p, t, b.m[e], sums);
            }
        }
    }
    store_outputs(out, sums, row_of_share(node), u);
}
#endif

#if BACKWARD || DOUBLE
// dy is [chunks of channels, all edges, Y_COMPONENTS]: blocks that share a node add up later.
__device__ __forceinline__ void store_sums(const Reduction& r, const Batch& b, real* dy, long long all, int edges) {
    __syncthreads();
    for (int t = threadIdx.x; t < edges * Y_COMPONENTS; t += THREADS) {
        const int e = t / Y_COMPONENTS, j = t % Y_COMPONENTS;
        real sum = 0;
        UNROLL for (int warp = 0; warp < WARPS; warp++) sum += r.partial[e][warp][j];
        dy[(blockIdx.y * all + b.edge[e]) * Y_COMPONENTS + j] = sum;
    }
}
#endif

#if BACKWARD
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
convolution_backward(const real* __restrict__ x, const real* __restrict__ y, const real* __restrict__ weights,
                     const real* __restrict__ grad, const int* __restrict__ order, const int* __restrict__ senders,
                     const int* __restrict__ first, long long all, real* __restrict__ dx_edge,
                     real* __restrict__ dy, real* __restrict__ dw) {
    __shared__ Batch b;
#if WANT_Y
    __shared__ Reduction r;
#endif
    const int node = blockIdx.x, u = blockIdx.y * THREADS + threadIdx.x;
    const auto [begin, end] = share_of(first, node);
    if (begin == end) return;
    real g[OUT_COMPONENTS];
    fetch_outputs(g, grad, node, u);
    for (int base = begin; base < end; base += EDGES) {
        const int edges = min(EDGES, end - base);
        fetch_batch(b, order, senders, y, y, base, edges);
        real w_next[TERMS], x_next[X_COMPONENTS];
        fetch_weights(w_next, weights, b.edge[0], u);
        fetch_features(x_next, x, b.sender[0], u);
        for (int e = 0; e < edges; e++) {
            const long long edge = b.edge[e];
            real w[TERMS], xs[X_COMPONENTS];
            UNROLL for (int p = 0; p < TERMS; p++) w[p] = w_next[p];
            UNROLL for (int i = 0; i < X_COMPONENTS; i++) xs[i] = x_next[i];
            if (e + 1 < edges) {
                fetch_weights(w_next, weights, b.edge[e + 1], u);
                fetch_features(x_next, x, b.sender[e + 1], u);
            }
#if WANT_X
            real dx[X_COMPONENTS];
            UNROLL for (int i = 0; i < X_COMPONENTS; i++) dx[i] = 0;
#endif
#if WANT_Y
            real dys[Y_PADDED];
            UNROLL for (int j = 0; j < Y_PADDED; j++) dys[j] = 0;
#endif
            UNROLL for (int p = 0; p < TERMS; p++) {
                real s[MAX_D1];
#if WANT_X || WANT_W
                transpose_accumulate(p, s, b.m[e], g);
#endif
#if WANT_X
                UNROLL for (int i = 0; i < TERM[p].d1; i++) dx[TERM[p].x + i] = multiply_add(w[p], s[i], dx[TERM[p].x + i]);
#endif
#if WANT_W
                if (TERM[p].weight >= 0 && ACTIVE(TERM[p].mul)) {
                    real sum = 0;
                    UNROLL for (int i = 0; i < TERM[p].d1; i++) sum = multiply_add(xs[TERM[p].x + i], s[i], sum);
                    store_once(dw + edge * WEIGHT_ROW + TERM[p].weight + u * TERM[p].stride, sum);
                }
#endif
#if WANT_Y
                UNROLL for (int i = 0; i < TERM[p].d1; i++) s[i] = w[p] * xs[TERM[p].x + i];
                to_second_input(p, s, g, dys);
#endif
            }
#if WANT_X
            UNROLL for (int i = 0; i < X_COMPONENTS; i++)
                if (ACTIVE(IN_ROW[i].mul)) dx_edge[edge * DX_ROW + DX_OFFSET[i] + u] = dx[i];
#endif
#if WANT_Y
            keep_partial(r, e, dys);
#endif
        }
#if WANT_Y
        store_sums(r, b, dy, all, edges);
#endif
    }
}
#endif

#if DOUBLE
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
convolution_double(const real* __restrict__ x, const real* __restrict__ y, const real* __restrict__ weights,
                   const real* __restrict__ grad, const real* __restrict__ hx, const real* __restrict__ hy,
                   const real* __restrict__ hw, const int* __restrict__ order, const int* __restrict__ senders,
                   const int* __restrict__ first, long long all, real* __restrict__ out,
                   real* __restrict__ dx_edge, real* __restrict__ dy, real* __restrict__ dw) {
    __shared__ Batch b;
    __shared__ Reduction r;
    const int node = blockIdx.x, u = blockIdx.y * THREADS + threadIdx.x;
    const int begin = first[node], end = first[node + 1];
    real g[OUT_COMPONENTS], sums[OUT_COMPONENTS];
    UNROLL for (int k = 0; k < OUT_COMPONENTS; k++) sums[k] = 0;
    fetch_outputs(g, grad, node, u);
    for (int base = begin; base < end; base += EDGES) {
        const int edges = min(EDGES, end - base);
        fetch_batch(b, order, senders, y, hy, base, edges);
        for (int e = 0; e < edges; e++) {
            const long long edge = b.edge[e];
            real w[TERMS], v[TERMS], xs[X_COMPONENTS], hs[X_COMPONENTS];
            fetch_weights(w, weights, edge, u);
            fetch_weights(v, hw, edge, u);
            fetch_features(xs, x, b.sender[e], u);
            fetch_features(hs, hx, b.sender[e], u);
            real dx[X_COMPONENTS], dys[Y_PADDED];
            UNROLL for (int i = 0; i < X_COMPONENTS; i++) dx[i] = 0;
            UNROLL for (int j = 0; j < Y_PADDED; j++) dys[j] = 0;
            UNROLL for (int p = 0; p < TERMS; p++) {
                if (TERM[p].weight < 0) v[p] = 0;  // a path without weights has no tangent of them
                real s[MAX_D1], q[MAX_D1], a[MAX_D1], c[MAX_D1];
                transpose_accumulate(p, s, b.m[e], g);
                transpose_accumulate(p, q, b.h[e], g);
                real sum = 0;
                UNROLL for (int i = 0; i < TERM[p].d1; i++) {
                    const int at = TERM[p].x + i;
                    sum = multiply_add(hs[at], s[i], multiply_add(xs[at], q[i], sum));
                    dx[at] = multiply_add(w[p], q[i], multiply_add(v[p], s[i], dx[at]));
                    a[i] = multiply_add(w[p], hs[at], v[p] * xs[at]);
                    c[i] = w[p] * xs[at];
                }
                if (TERM[p].weight >= 0 && ACTIVE(TERM[p].mul))
                    store_once(dw + edge * WEIGHT_ROW + TERM[p].weight + u * TERM[p].stride, sum);
                accumulate(p, a, b.m[e], sums);
                accumulate(p, c, b.h[e], sums);
                to_second_input(p, a, g, dys);
            }
            UNROLL for (int i = 0; i < X_COMPONENTS; i++)
                if (ACTIVE(IN_ROW[i].mul)) dx_edge[edge * DX_ROW + DX_OFFSET[i] + u] = dx[i];
            keep_partial(r, e, dys);
        }
        store_sums(r, b, dy, all, edges);
    }
    store_outputs(out, sums, node, u);
}
#endif

// dx[n] = sum over the edges from n of dx_edge[e]: ir_mul rows in, a mul_ir row out.
#if GATHER
extern "C" __global__ void __launch_bounds__(THREADS)
sum_by_sender(const real* __restrict__ dx_edge, const int* __restrict__ order, const int* __restrict__ first,
              int accumulate, real* __restrict__ dx) {
    const int node = blockIdx.x, u = blockIdx.y * THREADS + threadIdx.x;
    const int end = first[node + 1];
    real sums[X_COMPONENTS];
    UNROLL for (int i = 0; i < X_COMPONENTS; i++) sums[i] = 0;
#pragma unroll 4
    for (int t = first[node]; t < end; t++) {
        const long long row = (long long)order[t] * DX_ROW;
        UNROLL for (int i = 0; i < X_COMPONENTS; i++)
            if (ACTIVE(IN_ROW[i].mul)) sums[i] += load_once(dx_edge + row + DX_OFFSET[i] + u);
    }
    UNROLL for (int i = 0; i < X_COMPONENTS; i++)
        if (ACTIVE(IN_ROW[i].mul)) {
            real* at = dx + (long long)node * X_ROW + IN_ROW[i].offset + u * IN_ROW[i].stride;
            *at = accumulate ? *at + sums[i] : sums[i];
        }
}
#endif
