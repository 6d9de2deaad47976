// What a block of tensor_product_mixed_staged.cu holds of its rows: a ring of weights that bulk copies fill and empty, and the
// operands of this row and the next, which threads fetch.
#pragma once

#include "plan.cuh"
#include "real.cuh"
#include "pipeline.cuh"

#define UNROLL _Pragma("unroll")
#ifndef FORWARD
#define FORWARD 0
#endif
#ifndef BACKWARD
#define BACKWARD 0
#endif
#ifndef DOUBLE
#define DOUBLE 0
#endif
#ifndef WANT_X
#define WANT_X DOUBLE
#endif
#ifndef WANT_Y
#define WANT_Y DOUBLE
#endif
#ifndef WANT_W
#define WANT_W DOUBLE
#endif

#define SETS (1 + DOUBLE)  // values, and tangents
#define RESULTS (FORWARD || DOUBLE)
#define GRADIENTS (BACKWARD || DOUBLE)
#define READS_W (RESULTS || WANT_X || WANT_Y)
#define READS_Z (RESULTS || WANT_W)

// Where x, y, their tangents and g[k,w] are among a row's operands.
constexpr int ALIGNED = 16 / sizeof(real);
constexpr int X_AT = 0, Y_AT = X_ROW, HX_AT = X_ROW + Y_ROW, HY_AT = 2 * X_ROW + Y_ROW;
constexpr int G_AT = (SETS * (X_ROW + Y_ROW) + ALIGNED - 1) / ALIGNED * ALIGNED;
constexpr int FETCHED = SETS * (X_ROW + Y_ROW) + GRADIENTS * OUTPUTS;
constexpr int FETCHES = (FETCHED + THREADS - 1) / THREADS, WRITES = (OUTPUTS + THREADS - 1) / THREADS;
constexpr int PAIRS_OF_A_THREAD = (PAIRS + THREADS - 1) / THREADS, WARPS = THREADS / 32;

struct Stage {
    alignas(128) real w[SLOTS][SETS][WEIGHT_ROW];
    alignas(16) real operands[2][G_AT + GRADIENTS * G_ROOM];  // of this row and the next, by the row's parity
    real z[SETS][Z_ITEMS];
#if RESULTS
    real sums[SUMS];
#endif
#if GRADIENTS
    real dz[SETS][Z_ITEMS];
#endif
    Barrier full[SLOTS];
};
static_assert(sizeof(Stage) <= DYNAMIC_SHARED, "the plan counts on less shared memory");

template <int V>
struct alignas(V * sizeof(real)) Vector {
    real v[V];
};

template <int V>
__device__ __forceinline__ Vector<V> read(const real* from) {
    return *reinterpret_cast<const Vector<V>*>(from);
}

// The rows of a block: every gridDim.x-th.
__device__ __forceinline__ long long row_of(int n) { return blockIdx.x + (long long)n * gridDim.x; }

// Slot and parity of a row, kept up instead of divided out.
struct Turn {
    int slot = 0, before = SLOTS - 1;
    unsigned parity = 0;
    __device__ __forceinline__ void next() {
        before = slot;
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
};

struct Weights {
    const real *w, *hw;
    real* dw;
};

__device__ __forceinline__ void ask_for(Stage& s, int slot, const Weights& weights, int n) {
#if READS_W
    constexpr unsigned bytes = WEIGHT_ROW * sizeof(real);
    arrive_expecting(s.full[slot], SETS * bytes);
    copy_in_once(s.w[slot][0], weights.w + row_of(n) * WEIGHT_ROW, bytes, s.full[slot]);
#if DOUBLE
    copy_in_once(s.w[slot][1], weights.hw + row_of(n) * WEIGHT_ROW, bytes, s.full[slot]);
#endif
#endif
}

// Thread 0, when row n is computed: its gradient leaves, and a slot is asked for again. Where gradients
// leave, that is the slot of the row before, which has had the time of a row to do so.
__device__ __forceinline__ void turn_over(Stage& s, const Turn& turn, const Weights& weights, int n, int count) {
#if WANT_W
    copy_out_once(weights.dw + row_of(n) * WEIGHT_ROW, s.w[turn.slot][0], WEIGHT_ROW * sizeof(real));
    close_group();
#if READS_W
    if (n > 0 && n - 1 + SLOTS < count) {
        wait_for_groups<1>();
        ask_for(s, turn.before, weights, n - 1 + SLOTS);
    }
#else
    wait_for_groups<SLOTS - 1>();  // the slot of the next row
#endif
#else
    if (n + SLOTS < count) ask_for(s, turn.slot, weights, n + SLOTS);
#endif
}

// A number of a row's operands that a thread fetches: where from, of rows of what length, and where to.
struct Fetch {
    const real* from;
    int row, to;
};

struct Inputs {
    const real *x, *y, *hx, *hy, *g;
};

__device__ __forceinline__ Fetch fetch_of(int n, const Inputs& in) {
    if (n < X_ROW) return {in.x + n, X_ROW, X_AT + n};
    n -= X_ROW;
    if (n < Y_ROW) return {in.y + n, Y_ROW, Y_AT + n};
    n -= Y_ROW;
#if DOUBLE
    if (n < X_ROW) return {in.hx + n, X_ROW, HX_AT + n};
    n -= X_ROW;
    if (n < Y_ROW) return {in.hy + n, Y_ROW, HY_AT + n};
    n -= Y_ROW;
#endif
#if GRADIENTS
    UNROLL for (int b = 0; b < BLOCKS; b++) {
        const int mul = BLOCK[b].mul, d3 = BLOCK[b].d3;
        if (n < mul * d3) return {in.g + BLOCK[b].out + n, OUT_ROW, G_AT + BLOCK[b].g + n % d3 * mul + n / d3};
        n -= mul * d3;
    }
#endif
    return {nullptr, 0, 0};
}

struct Operands {
    Fetch fetches[FETCHES];
    real next[FETCHES];

    __device__ __forceinline__ explicit Operands(const Inputs& in) {
        UNROLL for (int c = 0; c < FETCHES; c++) fetches[c] = fetch_of(threadIdx.x + c * THREADS, in);
    }
    __device__ __forceinline__ void fetch(int n) {
        UNROLL for (int c = 0; c < FETCHES; c++)
            if (fetches[c].from) next[c] = __ldg(fetches[c].from + row_of(n) * fetches[c].row);
    }
    __device__ __forceinline__ void keep(Stage& s, int n) const {
        UNROLL for (int c = 0; c < FETCHES; c++)
            if (fetches[c].from) s.operands[n & 1][fetches[c].to] = next[c];
    }
};
