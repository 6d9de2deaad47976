// What the kernels of the fused convolution share: one channel's terms, and the sums over channels. The
// maths is in convolution.cu.
//
// plan.cuh gives TERM[p] = {x, d1, out, d3, m, weight, stride, mul}: first component of the term's
// input and output among the channel's, its extents, its first entry of M_INDEX, its weights' offset
// and stride (-1: no weights), its multiplicity; and IN_ROW, OUT_ROW: where a component of channel
// u lies in a mul_ir row, offset + u * stride; Y_AT: where a component of the second input lies.
#pragma once

#include "plan.cuh"
#include "real.cuh"

#define UNROLL _Pragma("unroll")
#if FULL  // every channel of every term has a thread
#define ACTIVE(mul) true
#else
#define ACTIVE(mul) (u < (mul))
#endif

struct Range {
    int begin, end;
};

// A block's part of a receiver's edges: the blocks with another blockIdx.z have the rest.
__device__ __forceinline__ Range share_of(const int* first, int node) {
    const int begin = first[node], end = first[node + 1], share = (end - begin + gridDim.z - 1) / gridDim.z;
    const int own = min(begin + (int)blockIdx.z * share, end);
    return {own, min(own + share, end)};
}

// Where a block's outputs of its share go: [shares, nodes], each share's rows behind those of the one before.
__device__ __forceinline__ long long row_of_share(int node) { return (long long)blockIdx.z * gridDim.x + node; }

__device__ __forceinline__ void fetch_outputs(real (&g)[OUT_COMPONENTS], const real* rows, long long node, int u) {
    UNROLL for (int k = 0; k < OUT_COMPONENTS; k++)
        g[k] = ACTIVE(OUT_ROW[k].mul) ? __ldg(rows + node * OUT_ROW_SIZE + OUT_ROW[k].offset + u * OUT_ROW[k].stride) : (real)0;
}

__device__ __forceinline__ void store_outputs(real* rows, const real (&out)[OUT_COMPONENTS], long long node, int u) {
    UNROLL for (int k = 0; k < OUT_COMPONENTS; k++)
        if (ACTIVE(OUT_ROW[k].mul)) rows[node * OUT_ROW_SIZE + OUT_ROW[k].offset + u * OUT_ROW[k].stride] = out[k];
}

// out[k] += sum_i t[i] * m[i,k] over the entries of term p that are not zero
__device__ __forceinline__ void accumulate(int p, const real* t, const real* m, real (&out)[OUT_COMPONENTS]) {
    UNROLL for (int i = 0; i < TERM[p].d1; i++)
        UNROLL for (int k = 0; k < TERM[p].d3; k++) {
            const int q = M_INDEX[TERM[p].m + i * TERM[p].d3 + k];
            if (q >= 0) out[TERM[p].out + k] = multiply_add(t[i], m[q], out[TERM[p].out + k]);
        }
}

// s[i] = sum_k m[i,k] * g[k]
__device__ __forceinline__ void transpose_accumulate(int p, real* s, const real* m, const real (&g)[OUT_COMPONENTS]) {
    UNROLL for (int i = 0; i < TERM[p].d1; i++) {
        s[i] = 0;
        UNROLL for (int k = 0; k < TERM[p].d3; k++) {
            const int q = M_INDEX[TERM[p].m + i * TERM[p].d3 + k];
            if (q >= 0) s[i] = multiply_add(m[q], g[TERM[p].out + k], s[i]);
        }
    }
}

// dy[j] += sum_ik C[i,j,k] * t[i] * g[k]
__device__ __forceinline__ void to_second_input(int p, const real* t, const real (&g)[OUT_COMPONENTS],
                                                real (&dy)[Y_PADDED]) {
    UNROLL for (int i = 0; i < TERM[p].d1; i++)
        UNROLL for (int k = 0; k < TERM[p].d3; k++) {
            const int q = M_INDEX[TERM[p].m + i * TERM[p].d3 + k];
            if (q >= 0) {
                const real tg = t[i] * g[TERM[p].out + k];
                UNROLL for (int s = 0; s < M_TERMS; s++)
                    if (M_VALUE[q][s] != 0) dy[M_Y[q][s]] = multiply_add((real)M_VALUE[q][s], tg, dy[M_Y[q][s]]);
            }
        }
}

#if BACKWARD || DOUBLE
// Writes one edge's sums over channels: each warp reduces its lanes, the block adds its warps.
struct Reduction {
    real partial[EDGES][WARPS][Y_PADDED];
};

__device__ __forceinline__ void keep_partial(Reduction& r, int e, real (&dy)[Y_PADDED]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const real sum = reduce_scatter<Y_PADDED>(dy, lane);
    if (lane % (32 / Y_PADDED) == 0) r.partial[e][warp][owner<Y_PADDED>(lane)] = sum;
}
#endif
