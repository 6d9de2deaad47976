// A tensor product row by row whose pairs of channels are mixed by weights of each row: uvw, uuw, u<vw.
//
//   z[q,k] = sum_ij C_p[i,j,k] * x[u(q),i] * y[v(q),j]     for every pair q = (u,v) of channels of path p
//   out[w,k] = sum over pairs q into the block:  W[q,w] * z[q,k]
//
// Bound by W [rows, pairs, mul], which is read once; bytes, b to a number: b rows (W + x + y + out)
// forward, b rows (2 W + 2 x + 2 y + out) backward. A team of TEAM threads (a warp, or the block)
// owns a row, whose x, y and z lie in shared memory. Thread (slice of q, w) reads W side by side with
// its neighbours and keeps out[w,:] in registers; slices are added through shared memory. Backward, a
// tile of W in shared memory (rows of odd length: no bank conflicts) gives dz[q,k] = sum_w W[q,w] g[w,k]
// and on its way there dW[q,w] = sum_k z[q,k] g[w,k]. Then dx and dy are sums over constants and dz.
// Sums have a fixed order, nothing is atomic.
//
// Compiled once for each of FORWARD and BACKWARD (with WANT_X, WANT_Y, WANT_W) of each part of a plan.
// There are few pairs, since each has a row of weights, so that plan.cuh lists all terms: *_ENTRY =
// {a, b, c} are places in shared memory and C, *_ITEM = {at, first, end} a component and its entries,
// found by one look-up instead of five that wait for each other. BLOCK[b] is an output block: its
// pairs from first, where its z and g start in shared memory, pairs in a tile, whether to add to what
// another part has written; WEIGHT_AT[q] where the weights of a pair start in a row.

#include "plan.cuh"
#include "real.cuh"
#include "tensor_product.cuh"

#define AHEAD 4  // weights on their way to a thread
#ifndef WANT_X
#define WANT_X 0
#endif
#ifndef WANT_Y
#define WANT_Y 0
#endif
#ifndef WANT_W
#define WANT_W 0
#endif

struct Team {
    real x[X_ROW], y[Y_ROW], z[Z_ITEMS];
#if FORWARD
    real sums[2][TEAM * MAX_D3];
#else
    real dz[Z_ITEMS], g[G_ITEMS], w[W_TILE];
#endif
};

// Every share-th of the entries from first to end: sum of c * a[..] * b[..]
__device__ __forceinline__ real contract(const Entry* entries, int first, int end, int share, const real* a, const real* b) {
    real sum = 0;
#pragma unroll 4
    for (int n = first; n < end; n += share) {
        const Entry e = entries[n];
        sum = multiply_add(e.c * a[e.a], b[e.b], sum);
    }
    return sum;
}

__device__ __forceinline__ void fetch_pair_values(Team& s, int t) {
    for (int n = t; n < Z_ITEMS; n += TEAM) s.z[n] = contract(Z_ENTRY, Z_FIRST[n], Z_FIRST[n + 1], 1, s.x, s.y);
}

#if FORWARD
extern "C" __global__ void __launch_bounds__(TEAM * TEAMS)
tensor_product_forward(const real* __restrict__ x, const real* __restrict__ y, const real* __restrict__ weights,
                       int, long long rows, real* __restrict__ out) {
    __shared__ Team teams[TEAMS];
    Team& s = teams[threadIdx.x / TEAM];
    const int t = threadIdx.x % TEAM;
    int turn = 0;
    for (long long row = (long long)blockIdx.x * TEAMS + threadIdx.x / TEAM; row < rows; row += (long long)gridDim.x * TEAMS) {
        fetch_row(s.x, x + row * X_ROW, X_ROW, t);
        fetch_row(s.y, y + row * Y_ROW, Y_ROW, t);
        meet();
        fetch_pair_values(s, t);
        meet();
        const real* w_row = weights + row * WEIGHT_ROW;
        UNROLL for (int b = 0; b < BLOCKS; b++) {
            const int mul = BLOCK[b].mul, d3 = BLOCK[b].d3, width = mul < TEAM ? mul : TEAM, slices = TEAM / width;
            for (int start = 0; start < mul; start += width, turn ^= 1) {
                const int slice = t / width, w = start + t % width;
                real sums[MAX_D3];
                UNROLL for (int k = 0; k < d3; k++) sums[k] = 0;
                if (slice < slices && w < mul) {
#pragma unroll 8
                    for (int q = slice; q < BLOCK[b].pairs; q += slices) {
                        const real value = load_once(w_row + WEIGHT_AT[BLOCK[b].first + q] + w);
                        UNROLL for (int k = 0; k < d3; k++) sums[k] = multiply_add(value, s.z[BLOCK[b].z + q * d3 + k], sums[k]);
                    }
                    UNROLL for (int k = 0; k < d3; k++) s.sums[turn][t * d3 + k] = sums[k];
                }
                meet();  // the sums of two turns ago have been read
                real* to = out + place(0, row, rows) + BLOCK[b].out + start * d3;
                for (int n = t; n < min(width, mul - start) * d3; n += TEAM) {
                    real sum = s.sums[turn][n];
                    for (int other = 1; other < slices; other++) sum += s.sums[turn][other * width * d3 + n];
                    to[n] = BLOCK[b].accumulate ? to[n] + sum : sum;
                }
            }
        }
    }
}
#endif

#if BACKWARD
// dW, and dz from a tile of W at a time.
__device__ __forceinline__ void through_weights(Team& s, const real* w_row, real* dw_row, int t) {
    UNROLL for (int b = 0; b < BLOCKS; b++) {
        const int mul = BLOCK[b].mul, d3 = BLOCK[b].d3, length = mul | 1, tile = BLOCK[b].tile;
        for (int start = 0; start < BLOCK[b].pairs; start += tile) {
            const int pairs = min(tile, BLOCK[b].pairs - start);
            for (int begin = t; begin < pairs * mul; begin += AHEAD * TEAM) {
                real value[AHEAD];
                int at[AHEAD];
                UNROLL for (int c = 0; c < AHEAD; c++) {
                    const int n = begin + c * TEAM;
                    if (n >= pairs * mul) break;
                    at[c] = WEIGHT_AT[BLOCK[b].first + start + n / mul] + n % mul;
                    if (WANT_X || WANT_Y) value[c] = load_once(w_row + at[c]);
                }
                UNROLL for (int c = 0; c < AHEAD; c++) {
                    const int n = begin + c * TEAM, q = n / mul, w = n % mul;
                    if (n >= pairs * mul) break;
                    if (WANT_X || WANT_Y) s.w[q * length + w] = value[c];
#if WANT_W
                    real sum = 0;
                    UNROLL for (int k = 0; k < MAX_D3; k++)
                        if (k < d3) sum = multiply_add(s.z[BLOCK[b].z + (start + q) * d3 + k], s.g[BLOCK[b].g + w * d3 + k], sum);
                    store_once(dw_row + at[c], sum);
#endif
                }
            }
#if WANT_X || WANT_Y
            meet();
            const int lanes = BLOCK[b].lanes;
            for (int n = t; n < whole_warps(pairs * d3 * lanes); n += TEAM) {
                const int item = n / lanes, q = item / d3, k = item % d3;
                real sum = 0;
                if (item < pairs * d3)
#pragma unroll 4
                    for (int w = n % lanes; w < mul; w += lanes)
                        sum = multiply_add(s.w[q * length + w], s.g[BLOCK[b].g + w * d3 + k], sum);
                sum = over_lanes(sum, lanes);
                if (n % lanes == 0 && item < pairs * d3) s.dz[BLOCK[b].z + start * d3 + item] = sum;
            }
            meet();
#endif
        }
    }
}

extern "C" __global__ void __launch_bounds__(TEAM * TEAMS)
tensor_product_backward(const real* __restrict__ x, const real* __restrict__ y, const real* __restrict__ weights,
                        const real* __restrict__ grad, int, long long rows, int accumulate, real* __restrict__ dx,
                        real* __restrict__ dy, real* __restrict__ dw) {
    __shared__ Team teams[TEAMS];
    Team& s = teams[threadIdx.x / TEAM];
    const int t = threadIdx.x % TEAM;
    for (long long row = (long long)blockIdx.x * TEAMS + threadIdx.x / TEAM; row < rows; row += (long long)gridDim.x * TEAMS) {
        meet();
        fetch_row(s.x, x + row * X_ROW, X_ROW, t);
        fetch_row(s.y, y + row * Y_ROW, Y_ROW, t);
        const real* g_row = grad + place(0, row, rows);
        UNROLL for (int b = 0; b < BLOCKS; b++) fetch_row(s.g + BLOCK[b].g, g_row + BLOCK[b].out, BLOCK[b].mul * BLOCK[b].d3, t);
        meet();
#if WANT_W
        fetch_pair_values(s, t);
        meet();
#endif
        through_weights(s, weights + row * WEIGHT_ROW, WANT_W ? dw + row * WEIGHT_ROW : nullptr, t);
#if WANT_X
        for (int n = t; n < whole_warps(X_ITEMS * LANES_X); n += TEAM) {
            const Item item = X_ITEM[min(n / LANES_X, X_ITEMS - 1)];
            real sum = contract(X_ENTRY, item.first + n % LANES_X, item.end, LANES_X, s.y, s.dz);
            sum = over_lanes(sum, LANES_X);
            if (n % LANES_X == 0 && n / LANES_X < X_ITEMS) {
                real* to = dx + row * X_ROW + item.at;
                *to = accumulate ? *to + sum : sum;
            }
        }
#endif
#if WANT_Y
        for (int n = t; n < whole_warps(Y_ITEMS * LANES_Y); n += TEAM) {
            const Item item = Y_ITEM[min(n / LANES_Y, Y_ITEMS - 1)];
            real sum = contract(Y_ENTRY, item.first + n % LANES_Y, item.end, LANES_Y, s.x, s.dz);
            sum = over_lanes(sum, LANES_Y);
            if (n % LANES_Y == 0 && n / LANES_Y < Y_ITEMS) {
                real* to = dy + row * Y_ROW + item.at;
                *to = accumulate ? *to + sum : sum;
            }
        }
#endif
    }
}
#endif
