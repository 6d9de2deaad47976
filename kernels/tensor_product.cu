// A tensor product row by row, in every mode of e3nn, from tables: values and first derivatives.
//
//   z[q,k] = sum_ij C_p[i,j,k] * x[u(q),i] * y[v(q),j]     for every pair q = (u,v) of channels of path p
//   out[d,k] = sum over pairs q into channel d:  w[q] * z[q,k]            (w absent: 1)
//
// The modes differ in their list of pairs and in where a pair goes, so that they are data: PAIR.
// A team of TEAM threads (a warp, or the block) owns a row, whose x and y lie in shared memory; a
// thread owns components of the result, or with LANES_* > 1 a share of one's terms. Items are in the
// order of memory: loads and stores of rows are coalesced. Sums have a fixed order, nothing is atomic.
// Bytes, b to a number: b rows (x + y + w + out) forward; backward reads all and writes dx, dy, dw.
//
// Compiled once for each of FORWARD and BACKWARD (with WANT_X, WANT_Y, WANT_W) of each part of a plan.
// There may be many pairs, so that constants are looked up by path: in plan.cuh ENTRY_* = {a, b, c}
// are the other two indices and C, sorted by the index that is given; PATH = where its entries start,
// sorted by k, i, j, and where its output goes; *_ITEM = {at, first, end, component, segment}: a
// component of a row, and its pairs in PAIR, PAIRS_OF_X or PAIRS_OF_Y.
// With SHARED_WEIGHTS all rows have the weights w[0], and dw is a partial sum for each team. `plain`
// is 1, or 0 where w is a tangent, of which paths without weights are no function.

#include "plan.cuh"
#include "real.cuh"
#include "tensor_product.cuh"

struct Team {
    real x[X_ROW], y[Y_ROW];
};

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

#if FORWARD
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

#if BACKWARD
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
#if WANT_X
        for (int n = t; n < whole_warps(X_ITEMS * LANES_X); n += TEAM) {
            const Item item = X_ITEM[min(n / LANES_X, X_ITEMS - 1)];
            real sum = 0;
            for (int m = item.first + n % LANES_X; m < item.end; m += LANES_X) {
                const Pair pair = PAIR[PAIRS_OF_X[m]];
                const Path path = PATH[pair.path];
                const real* g = grad + place(path.segment, row, rows) + pair.out;
                const int* first = FIRST_X + path.i + item.component;
                sum += weight_of(weights, plain, row, pair) * contract(ENTRY_X, first, s.y + pair.y, g, path.stride);
            }
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
            for (int m = item.first + n % LANES_Y; m < item.end; m += LANES_Y) {
                const Pair pair = PAIR[PAIRS_OF_Y[m]];
                const Path path = PATH[pair.path];
                const real* g = grad + place(path.segment, row, rows) + pair.out;
                const int* first = FIRST_Y + path.j + item.component;
                sum += weight_of(weights, plain, row, pair) * contract(ENTRY_Y, first, s.x + pair.x, g, path.stride);
            }
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
