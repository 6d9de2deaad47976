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
// A slot's turn: filled (`full`, by bytes) -> read, in derivatives overwritten (`done`, one arrival a
// warp) -> in derivatives copied out -> asked for again, one edge later, when the other warps have
// caught up and nobody waits.
//
// For one group of paths that covers the rows whole, rows of a multiple of 16 bytes, at most THREADS
// channels. dx of the edges is in mul_ir rows, which sum_rows.cu sums by sender.

#include "convolution.cuh"
#include "pipeline.cuh"

// compute-sanitizer's racecheck doesn't see that a warp's reads come before its first lane's arrival, and is shown all lanes'.
#ifndef EVERY_THREAD_ARRIVES
#define EVERY_THREAD_ARRIVES 0
#endif

#if DOUBLE  // which gives every gradient
#define WANT_X 1
#define WANT_Y 1
#define WANT_W 1
#define PAIRS 2  // rows of weights and features, and of their tangents
#else
#define PAIRS 1
#endif

struct alignas(128) Slot {
    real w[WEIGHT_ROW];
    real x[X_ROW];
#if DOUBLE
    real hw[WEIGHT_ROW];
    real hx[X_ROW];
#endif
};

struct Ring {
    Slot slots[SLOTS];
    Barrier full[SLOTS];
    Barrier done[SLOTS];
    int edge[SLOTS];  // whose rows they are; thread 0's own
    int sender[SLOTS];
};
static_assert(SLOTS <= EDGES, "rows are asked for one batch ahead at most");

struct Ids {
    int edge[2][EDGES];  // of this batch and of the next, by the batch's parity
    int sender[2][EDGES];
};

struct Stage {
    Ring ring;
    Ids ids;
    real y[EDGES][Y_COMPONENTS];
    real m[EDGES][M_PADDED];
#if DOUBLE
    real hy[EDGES][Y_COMPONENTS];
    real h[EDGES][M_PADDED];
#endif
#if BACKWARD || DOUBLE
    Reduction sums;
#endif
};
static_assert(sizeof(Stage) <= DYNAMIC_SHARED, "the schedule counts on less shared memory");

// Where an edge of the node lies in the ring, kept up instead of divided out.
struct Turn {
    int slot = 0;
    unsigned parity = 0;
    __device__ __forceinline__ void next() {
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
};

struct Rows {
    const real *x, *w, *hx, *hw;
};

__device__ __forceinline__ void load_ids(Ids& ids, const int* order, const int* senders, int at, int end, int batch) {
    for (int t = threadIdx.x; t < EDGES && at + t < end; t += THREADS) {
        const int e = order[at + t];
        ids.edge[batch & 1][t] = e;
        ids.sender[batch & 1][t] = senders[e];
    }
}

__device__ __forceinline__ void ask_for(Ring& ring, int slot, const Rows& rows, const Ids& ids, int n) {
    const int t = n % EDGES, batch = (n / EDGES) & 1;
    const long long edge = ids.edge[batch][t], sender = ids.sender[batch][t];
    ring.edge[slot] = ids.edge[batch][t];
    ring.sender[slot] = ids.sender[batch][t];
    Slot& s = ring.slots[slot];
    Barrier& b = ring.full[slot];
    arrive_expecting(b, PAIRS * (WEIGHT_ROW + X_ROW) * sizeof(real));
    copy_in_once(s.w, rows.w + edge * WEIGHT_ROW, WEIGHT_ROW * sizeof(real), b);
    copy_in(s.x, rows.x + sender * X_ROW, X_ROW * sizeof(real), b);
#if DOUBLE
    copy_in_once(s.hw, rows.hw + edge * WEIGHT_ROW, WEIGHT_ROW * sizeof(real), b);
    copy_in(s.hx, rows.hx + sender * X_ROW, X_ROW * sizeof(real), b);
#endif
}

// Barriers, the first ids, and the first rows on their way.
__device__ __forceinline__ void start(Stage& s, const Rows& rows, const int* order, const int* senders, int begin, int end) {
    if (threadIdx.x == 0)
        for (int i = 0; i < SLOTS; i++) barrier_init(s.ring.full[i], 1), barrier_init(s.ring.done[i], EVERY_THREAD_ARRIVES ? THREADS : WARPS);
    load_ids(s.ids, order, senders, begin, end, 0);
    fence_for_copies();
    __syncthreads();
    if (threadIdx.x == 0)
        for (int n = 0; n < SLOTS && n < EDGES && begin + n < end; n++) ask_for(s.ring, n, rows, s.ids, n);
}

// y and M of a batch, and the ids of the next. A thread owns entries of M: their coefficients are
// read once for all edges.
__device__ __forceinline__ void begin_batch(Stage& s, const int* order, const int* senders, const real* y, const real* hy,
                                            int base, int end, int batch) {
    __syncthreads();  // the batch before is done with
    const int edges = min(EDGES, end - base);
    load_ids(s.ids, order, senders, base + EDGES, end, batch + 1);
    for (int t = threadIdx.x; t < edges * Y_COMPONENTS; t += THREADS) {
        const int e = t / Y_COMPONENTS, j = t % Y_COMPONENTS;
        const long long at = (long long)s.ids.edge[batch & 1][e] * Y_ROW + Y_AT[j];
        s.y[e][j] = y[at];
#if DOUBLE
        s.hy[e][j] = hy[at];
#endif
    }
    __syncthreads();
    for (int q = threadIdx.x; q < M_ENTRIES; q += THREADS) {
        real value[M_TERMS];
        int j[M_TERMS];
        UNROLL for (int t = 0; t < M_TERMS; t++) value[t] = M_VALUE[q][t], j[t] = M_Y[q][t];
        for (int e = 0; e < edges; e++) {
            real m = 0;
            UNROLL for (int t = 0; t < M_TERMS; t++) m = multiply_add(value[t], s.y[e][j[t]], m);
            s.m[e][q] = m;
#if DOUBLE
            real h = 0;
            UNROLL for (int t = 0; t < M_TERMS; t++) h = multiply_add(value[t], s.hy[e][j[t]], h);
            s.h[e][q] = h;
#endif
        }
    }
    __syncthreads();
}

__device__ __forceinline__ void read_weights(real (&w)[TERMS], const real* row, int u) {
    UNROLL for (int p = 0; p < TERMS; p++)
        w[p] = TERM[p].weight < 0 ? (real)1 : ACTIVE(TERM[p].mul) ? row[TERM[p].weight + u * TERM[p].stride] : (real)0;
}

__device__ __forceinline__ void read_features(real (&x)[X_COMPONENTS], const real* row, int u) {
    UNROLL for (int i = 0; i < X_COMPONENTS; i++)
        x[i] = ACTIVE(IN_ROW[i].mul) ? row[IN_ROW[i].offset + u * IN_ROW[i].stride] : (real)0;
}

__device__ __forceinline__ void write_features(real* row, const real (&x)[X_COMPONENTS], int u) {
    UNROLL for (int i = 0; i < X_COMPONENTS; i++)
        if (ACTIVE(IN_ROW[i].mul)) row[IN_ROW[i].offset + u * IN_ROW[i].stride] = x[i];
}

// One arrival a warp, when all its lanes have read the slot.
__device__ __forceinline__ void done_with(Ring& ring, int slot) {
    __syncwarp();
    if (EVERY_THREAD_ARRIVES || threadIdx.x % 32 == 0) arrive(ring.done[slot]);
}

// The ring is free at the end: the node's outputs leave through it as one row, where they fit.
__device__ __forceinline__ void write_outputs(Stage& s, real* out, const real (&sums)[OUT_COMPONENTS], long long node, int u) {
#if OUTPUTS_STAGED
    __syncthreads();
    real* row = reinterpret_cast<real*>(s.ring.slots);
    UNROLL for (int k = 0; k < OUT_COMPONENTS; k++)
        if (ACTIVE(OUT_ROW[k].mul)) row[OUT_ROW[k].offset + u * OUT_ROW[k].stride] = sums[k];
    fence_for_copies();
    __syncthreads();
    if (threadIdx.x == 0) {
        copy_out_once(out + node * OUT_ROW_SIZE, row, OUT_ROW_SIZE * sizeof(real));
        close_group();
        wait_for_groups<0>();
    }
#else
    store_outputs(out, sums, node, u);
#endif
}

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

__device__ __forceinline__ void finish_edge(Stage& s, int slot) {
    fence_for_copies();
    done_with(s.ring, slot);
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
            finish_edge(s, turn.slot);
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
            finish_edge(s, turn.slot);
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
