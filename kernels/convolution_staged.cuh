// A ring of edges' rows in shared memory, for convolution_staged.cu: who asks for a row, who reads it, and how the node's outputs leave.
//
// A slot's turn: filled (`full`, by bytes) -> read, in derivatives overwritten (`done`, one arrival a
// warp) -> in derivatives copied out -> asked for again, one edge later, when the other warps have
// caught up and nobody waits.
#pragma once

#include "convolution.cuh"
#include "pipeline.cuh"

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
    fence_for_engines();
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

// One arrival a warp, when the copy engine may have the slot: all lanes have read it, and no read is still on its way, nor what was written.
__device__ __forceinline__ void done_with(Ring& ring, int slot) {
    fence_for_engines();
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
    fence_for_engines();
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
