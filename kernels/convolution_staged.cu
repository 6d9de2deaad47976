// The fused convolution of convolution.cu with its rows moved by the copy engine (sm_90 and newer).
//
// Ownership, maths and order of the sums are those of convolution.cu: a block owns a receiver, or a share of its
// edges, a thread a channel. What differs is how an edge's rows travel. Thread 0 asks for whole rows of the
// weights and the sender's features, SLOTS edges ahead, into a ring in shared memory; each thread
// reads its channel there. Derivatives replace weights and features in the slot and leave by the
// copy engine too, so the loop over edges has no load or store of global memory, and the registers
// that held the next edge are free for more blocks. Backward, dw may be the weights' own memory: a row is
// written after it was read, by the block that alone has its edge.
//
// For one group of paths that covers the rows whole, rows of a multiple of 16 bytes, at most THREADS
// channels. dx of the edges is in mul_ir rows, which sum_rows.cu sums by sender.

#include "convolution_staged.cuh"

#if FORWARD
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
convolution_forward(const real* __restrict__ x, const real* __restrict__ y, const real* __restrict__ weights,
                    const int* __restrict__ order, const int* __restrict__ senders, const int* __restrict__ first,
                    real* __restrict__ out) {
    extern __shared__ __align__(128) unsigned char memory[];
    Stage& s = *reinterpret_cast<Stage*>(memory);
    const int node = blockIdx.x, u = threadIdx.x;
    const auto [begin, end] = share_of(first, node);
    const Rows rows = {x, weights, nullptr, nullptr};
    real sums[OUT_COMPONENTS];
    UNROLL for (int k = 0; k < OUT_COMPONENTS; k++) sums[k] = 0;
    start(s, rows, order, senders, begin, end);
    Turn turn, before;
    int n = 0, batch = 0;
    for (int base = begin; base < end; base += EDGES, batch++) {
        const int edges = min(EDGES, end - base);
        begin_batch(s, order, senders, y, y, base, end, batch);
        for (int e = 0; e < edges; e++, n++) {
            wait(s.ring.full[turn.slot], turn.parity);
            const Slot& slot = s.ring.slots[turn.slot];
            real w[TERMS], xs[X_COMPONENTS];
            read_weights(w, slot.w, u);
            read_features(xs, slot.x, u);
            UNROLL for (int p = 0; p < TERMS; p++) {
                real t[MAX_D1];
                UNROLL for (int i = 0; i < TERM[p].d1; i++) t[i] = w[p] * xs[TERM[p].x + i];
                accumulate(p, t, s.m[e], sums);
            }
            done_with(s.ring, turn.slot);
            if (n > 0) {
                if (threadIdx.x == 0 && begin + n - 1 + SLOTS < end) {
                    wait(s.ring.done[before.slot], before.parity);
                    ask_for(s.ring, before.slot, rows, s.ids, n - 1 + SLOTS);
                }
                before.next();
            }
            turn.next();
        }
    }
    write_outputs(s, out, sums, row_of_share(node), u);
}
#endif

#if BACKWARD || DOUBLE
// Thread 0, when edge n is computed: edge n - 1 leaves, and the slot of n - 2 is asked for again.
struct Leaving {
    Turn turn;        // of edge n - 1
    int slot_before;  // of edge n - 2

    __device__ __forceinline__ void send(Ring& ring, real* dx, real* dw) {
        wait(ring.done[turn.slot], turn.parity);
        const long long edge = ring.edge[turn.slot];
        Slot& slot = ring.slots[turn.slot];
#if WANT_X && DX_BY_ATOMICS
        add_out(dx + (long long)ring.sender[turn.slot] * X_ROW, slot.x, X_ROW * sizeof(real));
#elif WANT_X
        copy_out_once(dx + edge * X_ROW, slot.x, X_ROW * sizeof(real));
#endif
#if WANT_W
        copy_out_once(dw + edge * WEIGHT_ROW, slot.w, WEIGHT_ROW * sizeof(real));
#endif
        close_group();
        slot_before = turn.slot;
        turn.next();
    }
};

__device__ __forceinline__ void leave(Leaving& leaving, Stage& s, const Rows& rows, real* dx, real* dw, int begin, int end, int n) {
    if (n == 0) return;
    const int slot = leaving.slot_before;
    leaving.send(s.ring, dx, dw);
    if (n > 1 && begin + n - 2 + SLOTS < end) {
        wait_for_groups<1>();
        ask_for(s.ring, slot, rows, s.ids, n - 2 + SLOTS);
    }
}

// The last edge leaves; shared memory must outlive its copies.
__device__ __forceinline__ void leave_last(Leaving& leaving, Stage& s, real* dx, real* dw, int n) {
    if (threadIdx.x == 0 && n > 0) {
        leaving.send(s.ring, dx, dw);
        wait_for_groups<0>();
    }
}

__device__ __forceinline__ void store_second(const Stage& s, real* dy, int batch, int edges) {
    __syncthreads();
    for (int t = threadIdx.x; t < edges * Y_COMPONENTS; t += THREADS) {
        const int e = t / Y_COMPONENTS, j = t % Y_COMPONENTS;
        real sum = 0;
        UNROLL for (int warp = 0; warp < WARPS; warp++) sum += s.sums.partial[e][warp][j];
        dy[(long long)s.ids.edge[batch & 1][e] * Y_COMPONENTS + j] = sum;
    }
}
#endif

#if BACKWARD
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
convolution_backward(const real* __restrict__ x, const real* __restrict__ y, const real* weights,
                     const real* __restrict__ grad, const int* __restrict__ order, const int* __restrict__ senders,
                     const int* __restrict__ first, long long all, real* __restrict__ dx,
                     real* __restrict__ dy, real* dw) {
    extern __shared__ __align__(128) unsigned char memory[];
    Stage& s = *reinterpret_cast<Stage*>(memory);
    const int node = blockIdx.x, u = threadIdx.x;
    const auto [begin, end] = share_of(first, node);
    if (begin == end) return;
    const Rows rows = {x, weights, nullptr, nullptr};
    start(s, rows, order, senders, begin, end);
    real g[OUT_COMPONENTS];
    fetch_outputs(g, grad, node, u);
    Turn turn;
    Leaving leaving = {};
    int n = 0, batch = 0;
    for (int base = begin; base < end; base += EDGES, batch++) {
        const int edges = min(EDGES, end - base);
        begin_batch(s, order, senders, y, y, base, end, batch);
        for (int e = 0; e < edges; e++, n++) {
            wait(s.ring.full[turn.slot], turn.parity);
            Slot& slot = s.ring.slots[turn.slot];
            real xs[X_COMPONENTS], dxs[X_COMPONENTS], dys[Y_PADDED];
            read_features(xs, slot.x, u);
            UNROLL for (int i = 0; i < X_COMPONENTS; i++) dxs[i] = 0;
            UNROLL for (int j = 0; j < Y_PADDED; j++) dys[j] = 0;
            UNROLL for (int p = 0; p < TERMS; p++) {
                real t[MAX_D1];
                real* at = slot.w + TERM[p].weight + u * TERM[p].stride;
                const bool weighted = TERM[p].weight >= 0;
                const real w = !weighted ? (real)1 : ACTIVE(TERM[p].mul) ? *at : (real)0;
                transpose_accumulate(p, t, s.m[e], g);
                real sum = 0;
                UNROLL for (int i = 0; i < TERM[p].d1; i++) {
                    dxs[TERM[p].x + i] = multiply_add(w, t[i], dxs[TERM[p].x + i]);
                    sum = multiply_add(xs[TERM[p].x + i], t[i], sum);
                    t[i] = w * xs[TERM[p].x + i];
                }
#if WANT_W
                if (weighted && ACTIVE(TERM[p].mul)) *at = sum;
#endif
                to_second_input(p, t, g, dys);
            }
#if WANT_X
            write_features(slot.x, dxs, u);
#endif
            done_with(s.ring, turn.slot);
#if WANT_Y
            keep_partial(s.sums, e, dys);
#endif
            if (threadIdx.x == 0) leave(leaving, s, rows, dx, dw, begin, end, n);
            turn.next();
        }
        if (base + EDGES >= end) leave_last(leaving, s, dx, dw, n);
#if WANT_Y
        store_second(s, dy, batch, edges);
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
                   real* __restrict__ dx, real* __restrict__ dy, real* __restrict__ dw) {
    extern __shared__ __align__(128) unsigned char memory[];
    Stage& s = *reinterpret_cast<Stage*>(memory);
    const int node = blockIdx.x, u = threadIdx.x;
    const int begin = first[node], end = first[node + 1];
    const Rows rows = {x, weights, hx, hw};
    start(s, rows, order, senders, begin, end);
    real g[OUT_COMPONENTS], sums[OUT_COMPONENTS];
    UNROLL for (int k = 0; k < OUT_COMPONENTS; k++) sums[k] = 0;
    fetch_outputs(g, grad, node, u);
    Turn turn;
    Leaving leaving = {};
    int n = 0, batch = 0;
    for (int base = begin; base < end; base += EDGES, batch++) {
        const int edges = min(EDGES, end - base);
        begin_batch(s, order, senders, y, hy, base, end, batch);
        for (int e = 0; e < edges; e++, n++) {
            wait(s.ring.full[turn.slot], turn.parity);
            Slot& slot = s.ring.slots[turn.slot];
            real xs[X_COMPONENTS], hs[X_COMPONENTS], dxs[X_COMPONENTS], dys[Y_PADDED];
            read_features(xs, slot.x, u);
            read_features(hs, slot.hx, u);
            UNROLL for (int i = 0; i < X_COMPONENTS; i++) dxs[i] = 0;
            UNROLL for (int j = 0; j < Y_PADDED; j++) dys[j] = 0;
            UNROLL for (int p = 0; p < TERMS; p++) {
                const int row = TERM[p].weight + u * TERM[p].stride;
                const bool weighted = TERM[p].weight >= 0, active = ACTIVE(TERM[p].mul);
                const real w = !weighted ? (real)1 : active ? slot.w[row] : (real)0;
                const real v = weighted && active ? slot.hw[row] : (real)0;  // no weights, no tangent of them
                real t[MAX_D1], q[MAX_D1];
                transpose_accumulate(p, t, s.m[e], g);
                transpose_accumulate(p, q, s.h[e], g);
                real sum = 0;
                UNROLL for (int i = 0; i < TERM[p].d1; i++) {
                    const int at = TERM[p].x + i;
                    sum = multiply_add(hs[at], t[i], multiply_add(xs[at], q[i], sum));
                    dxs[at] = multiply_add(w, q[i], multiply_add(v, t[i], dxs[at]));
                    t[i] = multiply_add(w, hs[at], v * xs[at]);
                    q[i] = w * xs[at];
                }
                if (weighted && active) slot.w[row] = sum;
                accumulate(p, t, s.m[e], sums);
                accumulate(p, q, s.h[e], sums);
                to_second_input(p, t, g, dys);
            }
            write_features(slot.x, dxs, u);
            done_with(s.ring, turn.slot);
            keep_partial(s.sums, e, dys);
            if (threadIdx.x == 0) leave(leaving, s, rows, dx, dw, begin, end, n);
            turn.next();
        }
        if (base + EDGES >= end) leave_last(leaving, s, dx, dw, n);
        store_second(s, dy, batch, edges);
    }
    write_outputs(s, out, sums, node, u);
}
#endif
