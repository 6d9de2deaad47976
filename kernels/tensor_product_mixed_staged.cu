// The product of tensor_product_mixed.cu with its weights moved by the copy engine (sm_90 and newer).
//
//   z[q,k] = sum_ij C_p[i,j,k] * x[u(q),i] * y[v(q),j]     for every pair q = (u,v) of channels of path p
//   out[w,k] = sum over pairs q into the block:  W[q,w] * z[q,k]
//
// W [pairs, mul] of each row are nearly all of the traffic, tens of KiB a row that lie together. So a block goes
// through rows, a ring of SLOTS rows of weights in shared memory ahead of it, filled by bulk copies: what
// is on its way takes no thread, no register and no turn of the row that is being computed. Bytes, b to a
// number: b rows (W + x + y + out) forward, b rows (2 W + 2 x + 2 y + out) backward, b rows (3 W + 3 x + 3 y + 2 out)
// for second derivatives, which are one pass:
//
//   zh = z of (hx, y) + z of (x, hy)      out' = W zh + hW z      dW' = zh g      dz = W g      dzh = hW g
//   dx' = C (hy dz + y dzh)               dy' = C (hx dz + x dzh)
//
// Who owns what. Forward, a warp has TASKs: a lane has a few columns w of an output block (VECTOR at a time, one
// load of up to 16 bytes) and every some pair of it; partial sums meet in shared memory. Backward, a
// thread has pairs: it walks along w, adds up dz[q,:] and writes dW[q,w] over W[q,w], and the row leaves as
// it came. Lanes begin at different columns where they would otherwise meet in a bank (SHAPE.shift). x, y and g
// are few; a thread fetches its numbers of the next row while this one is computed. Two barriers a row,
// three for second derivatives: the values of a row's pairs are made beside the results of the row before.
// Sums have a fixed order, nothing is atomic.
//
// plan.cuh: *_ENTRY, *_ITEM, Z_FIRST as in tensor_product_mixed.cu; BLOCK an output block, RUN the pairs of one path
// into it, whose weights lie together; PAIR where a pair's weights, z and g begin, sorted by SHAPE.

#include "tensor_product_mixed_staged.cuh"

// The sum over every step-th of the entries from first to end: c * a[..] * b[..]
__device__ __forceinline__ real contract(const Entry* entries, int first, int end, int step, const real* a, const real* b, real sum) {
#pragma unroll 4
    for (int n = first; n < end; n += step) {
        const Entry e = entries[n];
        sum = multiply_add(e.c * a[e.a], b[e.b], sum);
    }
    return sum;
}

__device__ __forceinline__ void pair_values(Stage& s, int n) {
#if READS_Z
    const real* operands = s.operands[n & 1];
    for (int i = threadIdx.x; i < Z_ITEMS; i += THREADS) {
        const int first = Z_FIRST[i], end = Z_FIRST[i + 1];
        s.z[0][i] = contract(Z_ENTRY, first, end, 1, operands + X_AT, operands + Y_AT, 0);
#if DOUBLE
        const real h = contract(Z_ENTRY, first, end, 1, operands + HX_AT, operands + Y_AT, 0);
        s.z[1][i] = contract(Z_ENTRY, first, end, 1, operands + X_AT, operands + HY_AT, h);
#endif
    }
#endif
}

#if RESULTS
template <int N>
__device__ __forceinline__ void tasks_from(Stage& s, int slot, int warp, int lane) {
    if constexpr (N < TASKS) {
        constexpr Task task = TASK[N];
        constexpr Block b = BLOCK[task.block];
        constexpr int V = b.vector, D3 = b.d3, LANES = b.lanes, LENGTH = b.mul / V;
        const int column = task.column + lane % LANES, slice = task.slice + lane / LANES;
        if (task.warp == warp && lane < 32 / LANES * LANES && column < LENGTH) {
            real sums[V][D3];
            UNROLL for (int i = 0; i < V; i++) UNROLL for (int k = 0; k < D3; k++) sums[i][k] = 0;
            UNROLL for (int r = b.run; r < b.run_end; r++) {
#pragma unroll 4
                for (int q = slice; q < RUN[r].pairs; q += b.slices) {
                    const int at = RUN[r].weight + q * b.mul + column * V;
                    const real* z = s.z[0] + RUN[r].z + q * D3;
#if DOUBLE
                    const real* zh = s.z[1] + RUN[r].z + q * D3;
                    const Vector<V> w = read<V>(s.w[slot][0] + at), h = read<V>(s.w[slot][1] + at);
                    UNROLL for (int k = 0; k < D3; k++)
                        UNROLL for (int i = 0; i < V; i++)
                            sums[i][k] = multiply_add(w.v[i], zh[k], multiply_add(h.v[i], z[k], sums[i][k]));
#else
                    const Vector<V> w = read<V>(s.w[slot][0] + at);
                    UNROLL for (int k = 0; k < D3; k++)
                        UNROLL for (int i = 0; i < V; i++) sums[i][k] = multiply_add(w.v[i], z[k], sums[i][k]);
#endif
                }
            }
            real* to = s.sums + b.sums + (slice * b.mul + column * V) * D3;
            UNROLL for (int i = 0; i < V; i++) UNROLL for (int k = 0; k < D3; k++) to[i * D3 + k] = sums[i][k];
        }
        tasks_from<N + 1>(s, slot, warp, lane);
    }
}

// A number of the result that a thread writes: where its slices' sums are, one after so many, and where it goes.
struct Result {
    int sums, step, slices, out, accumulate;
};

__device__ __forceinline__ Result result_of(int n) {
    UNROLL for (int b = 0; b < BLOCKS; b++) {
        const int size = BLOCK[b].mul * BLOCK[b].d3;
        if (n < size) return {BLOCK[b].sums + n, size, BLOCK[b].slices, BLOCK[b].out + n, BLOCK[b].accumulate};
        n -= size;
    }
    return {0, 0, 0, -1, 0};
}

__device__ __forceinline__ void write_result(const Stage& s, const Result (&results)[WRITES], real* out, int n) {
    UNROLL for (int c = 0; c < WRITES; c++) {
        const Result r = results[c];
        if (r.out < 0) continue;
        real sum = s.sums[r.sums];
        for (int slice = 1; slice < r.slices; slice++) sum += s.sums[r.sums + slice * r.step];
        real* to = out + row_of(n) * OUT_ROW + r.out;
        *to = r.accumulate ? *to + sum : sum;
    }
}
#endif

#if GRADIENTS
// dz of a pair, and its gradients over its weights.
template <int S>
__device__ __forceinline__ void pairs_of_shape(Stage& s, const real* g, int slot, int pair) {
    if constexpr (S < SHAPES) {
        constexpr Shape shape = SHAPE[S];
        constexpr int V = shape.vector, D3 = shape.d3, LENGTH = shape.mul / V;
        if (pair >= shape.first && pair < shape.end) {
            const Pair p = PAIR[pair];
            real *w = s.w[slot][0] + p.weight, z[D3], dz[SETS][D3];
            UNROLL for (int k = 0; k < D3; k++) {
#if WANT_W
                z[k] = s.z[SETS - 1][p.z + k];
#endif
                UNROLL for (int h = 0; h < SETS; h++) dz[h][k] = 0;
            }
            int column = shape.shift * pair % LENGTH;
#pragma unroll 2
            for (int n = 0; n < LENGTH; n++) {
                Vector<V> values[SETS], sums;
#if READS_W
                UNROLL for (int h = 0; h < SETS; h++) values[h] = read<V>(w + h * WEIGHT_ROW + column * V);
#endif
                UNROLL for (int k = 0; k < D3; k++) {
                    const Vector<V> gs = read<V>(g + p.g + k * shape.mul + column * V);
                    UNROLL for (int i = 0; i < V; i++) {
#if READS_W
                        UNROLL for (int h = 0; h < SETS; h++) dz[h][k] = multiply_add(values[h].v[i], gs.v[i], dz[h][k]);
#endif
#if WANT_W
                        sums.v[i] = k == 0 ? z[0] * gs.v[i] : multiply_add(z[k], gs.v[i], sums.v[i]);
#endif
                    }
                }
#if WANT_W
                *reinterpret_cast<Vector<V>*>(w + column * V) = sums;
#endif
                if (++column == LENGTH) column = 0;
            }
#if READS_W
            UNROLL for (int k = 0; k < D3; k++) UNROLL for (int h = 0; h < SETS; h++) s.dz[h][p.z + k] = dz[h][k];
#endif
        }
        pairs_of_shape<S + 1>(s, g, slot, pair);
    }
}

__device__ __forceinline__ void all_pairs(Stage& s, int slot, int n) {
    UNROLL for (int c = 0; c < PAIRS_OF_A_THREAD; c++)
        pairs_of_shape<0>(s, s.operands[n & 1] + G_AT, slot, threadIdx.x + c * THREADS);
}

// The gradient of one input: a sum over the other input and dz for each number; with tangents two.
template <int ITEMS, int LANES>
__device__ __forceinline__ void write_gradient(const Stage& s, const Item* items, const Entry* entries, const real* other,
                                               const real* tangent, int t, bool accumulate, real* row) {
    for (int n = t; n < (ITEMS * LANES + 31) / 32 * 32; n += THREADS) {
        const Item item = items[min(n / LANES, ITEMS - 1)];
        const int first = item.first + n % LANES;
        real sum = 0;
#if DOUBLE
        sum = contract(entries, first, item.end, LANES, tangent, s.dz[0], sum);
#endif
        sum = contract(entries, first, item.end, LANES, other, s.dz[SETS - 1], sum);
        UNROLL for (int step = 16; step > 0; step /= 2)
            if (step < LANES) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (n % LANES == 0 && n / LANES < ITEMS) row[item.at] = accumulate ? row[item.at] + sum : sum;
    }
}

// By other warps as far as there are: y has few numbers with many terms, x many with few.
__device__ __forceinline__ void write_gradients(const Stage& s, int n, bool accumulate, real* dx, real* dy) {
    const real* operands = s.operands[n & 1];
#if WANT_X
    write_gradient<X_ITEMS, LANES_X>(s, X_ITEM, X_ENTRY, operands + Y_AT, operands + HY_AT, threadIdx.x, accumulate,
                                     dx + row_of(n) * X_ROW);
#endif
#if WANT_Y
    write_gradient<Y_ITEMS, LANES_Y>(s, Y_ITEM, Y_ENTRY, operands + X_AT, operands + HX_AT, (threadIdx.x + THREADS / 2) % THREADS,
                                     accumulate, dy + row_of(n) * Y_ROW);
#endif
}
#endif

// Everything, whichever kernel it is in: what is not its business is compiled out.
__device__ __forceinline__ void all_rows(const Inputs& in, const Weights& weights, long long rows, bool accumulate, real* out,
                                         real* dx, real* dy) {
    extern __shared__ __align__(128) unsigned char memory[];
    Stage& s = *reinterpret_cast<Stage*>(memory);
    const int t = threadIdx.x, count = (int)((rows - blockIdx.x + gridDim.x - 1) / gridDim.x);
    if (t == 0) {
        for (int i = 0; i < SLOTS; i++) barrier_init(s.full[i], 1);
        fence_for_engines();
        for (int n = 0; n < SLOTS && n < count; n++) ask_for(s, n, weights, n);
    }
    Operands operands(in);
    operands.fetch(0);
    operands.keep(s, 0);
#if RESULTS
    Result results[WRITES];
    UNROLL for (int c = 0; c < WRITES; c++) results[c] = result_of(t + c * THREADS);
#endif
    __syncthreads();
    Turn turn;
    for (int n = 0; n <= count; n++) {
        if (n < count) pair_values(s, n);
        if (n > 0) {
#if RESULTS
            write_result(s, results, out, n - 1);
#endif
#if GRADIENTS
            write_gradients(s, n - 1, accumulate, dx, dy);
#endif
        }
        if (n == count) break;
        __syncthreads();
        if (n + 1 < count) operands.fetch(n + 1);
#if READS_W
        wait(s.full[turn.slot], turn.parity);
#endif
#if RESULTS
        tasks_from<0>(s, turn.slot, t / 32, t % 32);
#endif
#if DOUBLE
        __syncthreads();  // W has been read by column, and is overwritten pair by pair
#endif
#if GRADIENTS
        all_pairs(s, turn.slot, n);
#endif
        if (n + 1 < count) operands.keep(s, n + 1);
#if WANT_W
        fence_for_engines();
#endif
        __syncthreads();
        if (t == 0) turn_over(s, turn, weights, n, count);
        turn.next();
    }
#if WANT_W
    if (t == 0) wait_for_groups<0>();  // shared memory must outlive its copies
#endif
}

#if FORWARD
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
tensor_product_forward(const real* __restrict__ x, const real* __restrict__ y, const real* __restrict__ weights,
                       int, long long rows, real* __restrict__ out) {
    all_rows({x, y, nullptr, nullptr, nullptr}, {weights, nullptr, nullptr}, rows, false, out, nullptr, nullptr);
}
#endif

#if BACKWARD
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
tensor_product_backward(const real* __restrict__ x, const real* __restrict__ y, const real* __restrict__ weights,
                        const real* __restrict__ grad, int, long long rows, int accumulate, real* __restrict__ dx,
                        real* __restrict__ dy, real* __restrict__ dw) {
    all_rows({x, y, nullptr, nullptr, grad}, {weights, nullptr, dw}, rows, accumulate, nullptr, dx, dy);
}
#endif

#if DOUBLE
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
tensor_product_double(const real* __restrict__ x, const real* __restrict__ y, const real* __restrict__ weights,
                      const real* __restrict__ grad, const real* __restrict__ hx, const real* __restrict__ hy,
                      const real* __restrict__ hw, int, long long rows, int accumulate, real* __restrict__ out,
                      real* __restrict__ dx, real* __restrict__ dy, real* __restrict__ dw) {
    all_rows({x, y, hx, hy, grad}, {weights, hw, dw}, rows, accumulate, out, dx, dy);
}
#endif
