// How tensor_product_channels.cu moves rows between memory, shared memory and registers. After
// plan.cuh, real.cuh.
#pragma once

#define UNROLL _Pragma("unroll")
#if FULL  // every channel of every block of irreps has a thread
#define ACTIVE(mul) true
#else
#define ACTIVE(mul) (u < (mul))
#endif

constexpr int WARPS = THREADS / 32;

#if BACKWARD && !WANT_Y
#define NEEDS_DY 0
#else
#define NEEDS_DY (BACKWARD || DOUBLE)
#endif

struct Shared {
    real y[ROWS][Y_COMPONENTS];
    real m[ROWS][M_PADDED];
#if DOUBLE
    real hy[ROWS][Y_COMPONENTS];
    real h[ROWS][M_PADDED];
#endif
    real buffer[WARPS][32 * MAX_D];
#if NEEDS_DY
    real partial[ROWS][WARPS][Y_PADDED];
#endif
};

__device__ __forceinline__ void couple(real (*m)[M_PADDED], const real (*y)[Y_COMPONENTS], int rows) {
    for (int t = threadIdx.x; t < rows * M_ENTRIES; t += THREADS) {
        const int r = t / M_ENTRIES, q = t % M_ENTRIES;
        real sum = 0;
        UNROLL for (int n = 0; n < M_TERMS; n++) sum = multiply_add(M_VALUE[q][n], y[r][M_Y[q][n]], sum);
        m[r][q] = sum;
    }
}

__device__ __forceinline__ void fetch_rows(Shared& s, const real* y, const real* hy, long long base, int rows) {
    for (int t = threadIdx.x; t < rows * Y_COMPONENTS; t += THREADS) {
        const int r = t / Y_COMPONENTS, j = t % Y_COMPONENTS;
        s.y[r][j] = y[(base + r) * Y_ROW + Y_AT[j]];
#if DOUBLE
        s.hy[r][j] = hy[(base + r) * Y_ROW + Y_AT[j]];
#endif
    }
    __syncthreads();  // the rows before are done with, too
    couple(s.m, s.y, rows);
#if DOUBLE
    couple(s.h, s.hy, rows);
#endif
    __syncthreads();
}

__device__ __forceinline__ void fetch_weights(real (&w)[TERMS], const real* weights, int plain, long long row, int u) {
    UNROLL for (int p = 0; p < TERMS; p++) {
        w[p] = plain;  // paths without weights
#if SHARED_WEIGHTS
        if (TERM[p].weight >= 0) w[p] = ACTIVE(TERM[p].mul) ? __ldg(weights + TERM[p].weight + u * TERM[p].stride) : (real)0;
#else
        if (TERM[p].weight >= 0)
            w[p] = ACTIVE(TERM[p].mul) ? load_once(weights + row * WEIGHT_ROW + TERM[p].weight + u * TERM[p].stride) : (real)0;
#endif
    }
}

__device__ __forceinline__ void fetch_inputs(real (&x)[X_COMPONENTS], const real* rows, long long row, int u) {
    UNROLL for (int i = 0; i < X_COMPONENTS; i++)
        x[i] = ACTIVE(COMPONENT[i].mul) ? __ldg(rows + row * X_ROW + COMPONENT[i].offset + u * COMPONENT[i].stride) : (real)0;
}

// The warp's 32 channels of a block of irreps, side by side: v[n] is number 32 n + lane of them.
__device__ __forceinline__ void load_block(real* v, const real* block, int d, int mul, int u) {
    const int lane = threadIdx.x % 32, left = (mul - (u - lane)) * d;
    UNROLL for (int n = 0; n < MAX_D; n++) {
        const int at = 32 * n + lane;
        if (n < d) v[n] = FULL || at < left ? load_once(block + (u - lane) * d + at) : (real)0;
    }
}

__device__ __forceinline__ void store_block(real* block, const real* buffer, int d, int mul, int u, bool accumulate) {
    const int lane = threadIdx.x % 32, left = (mul - (u - lane)) * d;
    UNROLL for (int n = 0; n < MAX_D; n++) {
        const int at = 32 * n + lane;
        if (n < d && (FULL || at < left)) {
            real* to = block + (u - lane) * d + at;
            *to = accumulate ? *to + buffer[at] : buffer[at];
        }
    }
}

__device__ __forceinline__ void store_channel(real* block, const real* v, real* buffer, int d, int mul, int u, bool accumulate) {
    __syncwarp();
    UNROLL for (int k = 0; k < MAX_D; k++)
        if (k < d) buffer[threadIdx.x % 32 * d + k] = v[k];
    __syncwarp();
    store_block(block, buffer, d, mul, u, accumulate);
}

// The next gradients, from the order in which they were loaded to channel by channel.
__device__ __forceinline__ void turn(real (&g)[MAX_D], const real (&loaded)[MAX_D], real* buffer, int d) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
    UNROLL for (int n = 0; n < MAX_D; n++)
        if (n < d) buffer[32 * n + lane] = loaded[n];
    __syncwarp();
    UNROLL for (int k = 0; k < MAX_D; k++)
        if (k < d) g[k] = buffer[lane * d + k];
}

// Gradients of output b + 1 of this row, or of the first of the next row.
__device__ __forceinline__ void load_after(real (&g)[MAX_D], const real* row, int b, bool last_row, int u) {
    const int n = (b + 1) % OUTPUTS;
    if (n > 0 || !last_row)
        load_block(g, row + (n > 0 ? 0 : OUT_ROW) + OUTPUT[n].offset, OUTPUT[n].d, OUTPUT[n].mul, u);
}

#if NEEDS_DY
__device__ __forceinline__ void store_sums(const Shared& s, real* dy, long long base, long long rows, int here, int accumulate) {
    __syncthreads();
    for (int t = threadIdx.x; t < here * Y_COMPONENTS; t += THREADS) {
        const int r = t / Y_COMPONENTS, j = t % Y_COMPONENTS;
        real sum = 0;
        UNROLL for (int n = 0; n < WARPS; n++) sum += s.partial[r][n][j];
        real* to = dy + ((long long)blockIdx.y * rows + base + r) * Y_ROW + Y_AT[j];
        *to = accumulate ? *to + sum : sum;
    }
}
#endif

__device__ __forceinline__ void store_inputs(real* dx, const real (&sums)[X_COMPONENTS], real* buffer, int u, int accumulate) {
    UNROLL for (int a = 0; a < INPUTS; a++) {
        real here[MAX_D];
        UNROLL for (int i = 0; i < MAX_D; i++)
            if (i < INPUT[a].d) here[i] = sums[INPUT[a].first + i];
        store_channel(dx + INPUT[a].offset, here, buffer, INPUT[a].d, INPUT[a].mul, u, accumulate);
    }
}
