// A tensor product row by row, in every mode of e3nn, from tables: values and first derivatives.
//
//   z[q,k] = sum_ij C_p[i,j,k] * x[u(q),i] * y[v(q),j]     for every pair q = (u,v) of channels of path p
//   ELEMENTS:  out[d,k] = sum over pairs q into channel d:  w[q] * z[q,k]            (w absent: 1)
//   MIX:       out[w,k] = sum over pairs q into the block:  W[q,w] * z[q,k]          (weights of each row)
//
// The modes differ in their list of pairs and in where a pair goes, so that they are data: PAIR.
// A team of TEAM threads (a warp, or the block) owns a row, whose x and y lie in shared memory; a
// thread owns components of the result, or with LANES_* > 1 a share of one's terms. Items are in the
// order of memory: loads and stores of rows are coalesced. Sums have a fixed order, nothing is atomic.
//
// MIX is bound by W [rows, pairs, mul], read once: z lies in shared memory, thread (slice of q, w)
// reads W side by side with its neighbours and keeps out[w,:] in registers; slices are added through
// shared memory. Its backward reads W once and writes dW once: a tile of W in shared memory (rows of
// odd length: no bank conflicts) gives dz[q,k] = sum_w W[q,w] g[w,k], dW[q,w] = sum_k z[q,k] g[w,k].
// Then dx and dy are sums over the constants with dz = W g in place of w g.
//
// Compiled once for each of FORWARD and BACKWARD (with WANT_X, WANT_Y, WANT_W) of each part of a plan.
// ELEMENTS may have many pairs, so that the constants are looked up by path: in plan.cuh ENTRY_* =
// {a, b, c} are the other two indices and C, sorted by the index that is given; PATH = where its
// entries start, sorted by k, i, j, and where its output goes; *_ITEM = {at, first, end, component}:
// a component of a row, and its pairs in PAIR, PAIRS_OF_X or PAIRS_OF_Y. MIX has few pairs, since
// each has a row of weights: *_ENTRY = {a, b, c} are all terms of a value, places in shared memory
// and C, found by one look-up instead of five that wait for each other.
// With SHARED_WEIGHTS all rows have the weights w[0], and dw is a partial sum for each team. `plain`
// is 1, or 0 where w is a tangent, of which paths without weights are no function.

#include "plan.cuh"
#include "real.cuh"

#define UNROLL _Pragma("unroll")

struct Team {
    real x[X_ROW], y[Y_ROW];
#if MIX
    real z[Z_ITEMS];
#if FORWARD
    real sums[2][TEAM * MAX_D3];
#else
    real dz[Z_ITEMS], g[G_ITEMS], w[W_TILE];
#endif
#endif
};

__device__ __forceinline__ void meet() {
#if TEAM == 32
    __syncwarp();
#else
    __syncthreads();
#endif
}

__device__ __forceinline__ void fetch_row(real* to, const real* from, int n, int t) {
    for (int at = t; at < n; at += TEAM) to[at] = __ldg(from + at);
}

// The sum over groups of lanes, a power of two that is known when compiled.
__device__ __forceinline__ real over_lanes(real sum, int lanes) {
    UNROLL for (int step = 16; step > 0; step /= 2)
        if (step < lanes) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
}

// Rounded up so that whole warps run through a loop and can shuffle in it.
__device__ constexpr int whole_warps(int n) { return (n + 31) / 32 * 32; }

#if MIX
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
#else
// sum over the entries of one index: c * a[..] * b[.. * stride]
__device__ __forceinline__ real contract(const Entry* entries, const int* first, const real* a, const real* b, int stride) {
    real sum = 0;
    const int end = first[1];
    for (int n = first[0]; n < end; n++) {
        const Entry e = entries[n];
        sum = multiply_add(e.c * a[e.a], b[e.b * stride], sum);
    }
    return sum;
}

__device__ __forceinline__ real pair_value(const Team& s, const Pair& pair, int k) {
    return contract(ENTRY_OUT, FIRST_OUT + PATH[pair.path].k + k, s.x + pair.x, s.y + pair.y, 1);
}

__device__ __forceinline__ real weight_of(const real* weights, int plain, long long row, const Pair& pair) {
    if (pair.weight < 0) return plain;
#if SHARED_WEIGHTS
    return __ldg(weights + pair.weight);
#else
    return __ldg(weights + row * WEIGHT_ROW + pair.weight);
#endif
}
#endif

// A result is a list of matrices, one after the other, each [rows, size].
__device__ __forceinline__ long long place(int segment, long long row, long long rows) {
    return SEGMENT[segment].base * rows + row * SEGMENT[segment].size;
}

#if FORWARD && !MIX
extern "C" __global__ void __launch_bounds__(TEAM * TEAMS)
tensor_product_forward(const real* __restrict__ x, const real* __restrict__ y, const real* __restrict__ weights,
                       int plain, long long rows, real* __restrict__ out) {
    __shared__ Team teams[TEAMS];
    Team& s = teams[threadIdx.x / TEAM];
    const int t = threadIdx.x % TEAM;
    for (long long row = (long long)blockIdx.x * TEAMS + threadIdx.x / TEAM; row < rows; row += (long long)gridDim.x * TEAMS) {
        meet();
        fetch_row(s.x, x + row * X_ROW, X_ROW, t);
        fetch_row(s.y, y + row * Y_ROW, Y_ROW, t);
        meet();
        for (int n = t; n < whole_warps(OUT_ITEMS * LANES_OUT); n += TEAM) {
            const Item item = OUT_ITEM[min(n / LANES_OUT, OUT_ITEMS - 1)];
            real sum = 0;
            for (int q = item.first + n % LANES_OUT; q < item.end; q += LANES_OUT) {
                const Pair pair = PAIR[q];
                sum = multiply_add(weight_of(weights, plain, row, pair), pair_value(s, pair, item.component), sum);
            }
            sum = over_lanes(sum, LANES_OUT);
            if (n % LANES_OUT == 0 && n / LANES_OUT < OUT_ITEMS)
                out[place(item.segment, row, rows) + item.at] = sum;
        }
    }
}
#endif

#if MIX
__device__ __forceinline__ void fetch_pair_values(Team& s, int t) {
    for (int n = t; n < Z_ITEMS; n += TEAM) s.z[n] = contract(Z_ENTRY, Z_FIRST[n], Z_FIRST[n + 1], 1, s.x, s.y);
}
#endif

#if FORWARD && MIX
extern "C" __global__ void __launch_bounds__(TEAM * TEAMS)
tensor_product_forward(const real* __restrict__ x, const real* __restrict__ y, const real* __restrict__ weights,
                       int plain, long long rows, real* __restrict__ out) {
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
#if MIX
#define AHEAD 4  // weights on their way to a thread
#ifndef WANT_X
#define WANT_X 0
#endif
#ifndef WANT_Y
#define WANT_Y 0
#endif

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
#endif

extern "C" __global__ void __launch_bounds__(TEAM * TEAMS)
tensor_product_backward(const real* __restrict__ x, const real* __restrict__ y, const real* __restrict__ weights,
                        const real* __restrict__ grad, int plain, long long rows, int accumulate, real* __restrict__ dx,
                        real* __restrict__ dy, real* __restrict__ dw) {
    __shared__ Team teams[TEAMS];
    Team& s = teams[threadIdx.x / TEAM];
    const int t = threadIdx.x % TEAM;
    for (long long row = (long long)blockIdx.x * TEAMS + threadIdx.x / TEAM; row < rows; row += (long long)gridDim.x * TEAMS) {
        meet();
        fetch_row(s.x, x + row * X_ROW, X_ROW, t);
        fetch_row(s.y, y + row * Y_ROW, Y_ROW, t);
#if MIX
        const real* g_row = grad + place(0, row, rows);
        UNROLL for (int b = 0; b < BLOCKS; b++) fetch_row(s.g + BLOCK[b].g, g_row + BLOCK[b].out, BLOCK[b].mul * BLOCK[b].d3, t);
        meet();
#if WANT_W
        fetch_pair_values(s, t);
        meet();
#endif
        through_weights(s, weights + row * WEIGHT_ROW, dw + row * WEIGHT_ROW, t);
#else
        meet();
#if WANT_W
        for (int q = t; q < PAIRS; q += TEAM) {
            const Pair pair = PAIR[q];
            if (pair.weight < 0) continue;
            const Path path = PATH[pair.path];
            const real* g = grad + place(path.segment, row, rows) + pair.out;
            real sum = 0;
            for (int k = 0; k < path.d3; k++) sum = multiply_add(pair_value(s, pair, k), __ldg(g + k * path.stride), sum);
#if SHARED_WEIGHTS
            dw[((long long)blockIdx.x * TEAMS + threadIdx.x / TEAM) * WEIGHT_ROW + pair.weight] += sum;
#else
            store_once(dw + row * WEIGHT_ROW + pair.weight, sum);
#endif
        }
#endif
#endif

#if MIX
#define THROUGH(NAME, name, other)                                                                                     \
    sum = contract(NAME##_ENTRY, item.first + n % LANES_##NAME, item.end, LANES_##NAME, s.other, s.dz)
#else
#define THROUGH(NAME, name, other)                                                                                     \
    for (int m = item.first + n % LANES_##NAME; m < item.end; m += LANES_##NAME) {                                     \
        const Pair pair = PAIR[PAIRS_OF_##NAME[m]];                                                                    \
        const Path path = PATH[pair.path];                                                                             \
        const real* g = grad + place(path.segment, row, rows) + pair.out;                                              \
        sum += weight_of(weights, plain, row, pair) *                                                                  \
               contract(ENTRY_##NAME, FIRST_##NAME + path.name + item.component, s.other + pair.other, g, path.stride); \
    }
#endif
#if WANT_X
        for (int n = t; n < whole_warps(X_ITEMS * LANES_X); n += TEAM) {
            const Item item = X_ITEM[min(n / LANES_X, X_ITEMS - 1)];
            real sum = 0;
            THROUGH(X, i, y);
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
            real sum = 0;
            THROUGH(Y, j, x);
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
