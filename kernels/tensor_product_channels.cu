// A tensor product row by row whose paths go channel by channel (uvu, few channels in the second input).
//
//   out[z,u,k] = sum over terms p into the block:  w[z,p,u] * sum_i x[z,u,i] * M_p[z,i,k]
//   M_p[z,i,k] = sum_j C_p[i,j,k] * y[z,j]                       (depends on the row alone)
//
// The convolution's arithmetic without its graph: a block owns ROWS rows and THREADS channels, a
// thread one channel u. The block builds M for its rows in shared memory; a thread runs through the
// rows with the weights and features of the next row on their way in registers.
//
// Bytes, b to a number: b rows (x + y + w + out) forward, where out (every path has its own output)
// is most of it; backward reads all and writes dx, dy, dw. So rows of x, out and grad must cross
// memory whole: 32 channels of a block of irreps, 32 * d numbers, are contiguous. A warp moves them
// through a buffer of its own in shared memory, contiguous on the one side and, d being odd, without
// bank conflicts at stride d on the other. The gradients of the next block are loaded meanwhile.
//
// Compiled once for each of FORWARD, BACKWARD (with WANT_X, WANT_Y, WANT_W) and DOUBLE, the second
// derivative, of each group of outputs.
// plan.cuh gives INPUT[a] and OUTPUT[b] = {offset in the row, d, mul, first, ..}: an input's first
// component among the registers, an output's terms from first to end; COMPONENT[i]: where a register
// of x lies, offset + u * stride; TERM[p] = {x, d1, m, weight, stride, mul}, its first entry of M_INDEX
// (-1: zero) and its weights' offset (-1: none) and stride. With SHARED_WEIGHTS all rows have the
// weights w[0], and dw is a partial sum for each block. `plain` is 1, or 0 where w is a tangent, of
// which paths without weights are no function.
//
// Loops run to a bound of all blocks and break: with a trip count that is known they unroll before
// arrays are given registers; with OUTPUT[b].d as the bound they did so too late, on a stack.

#include "plan.cuh"
#include "real.cuh"
#include "tensor_product_channels.cuh"

#if FORWARD
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
tensor_product_forward(const real* __restrict__ x, const real* __restrict__ y, const real* __restrict__ weights,
                       int plain, long long rows, real* __restrict__ out) {
    __shared__ Shared s;
    const int u = blockIdx.y * THREADS + threadIdx.x;
    real* buffer = s.buffer[threadIdx.x / 32];
    for (long long base = (long long)blockIdx.x * ROWS; base < rows; base += (long long)gridDim.x * ROWS) {
        const int here = (int)min((long long)ROWS, rows - base);
        fetch_rows(s, y, y, base, here);
        real w_next[TERMS], x_next[X_COMPONENTS];
        fetch_weights(w_next, weights, plain, base, u);
        fetch_inputs(x_next, x, base, u);
        for (int r = 0; r < here; r++) {
            real w[TERMS], xs[X_COMPONENTS];
            UNROLL for (int p = 0; p < TERMS; p++) w[p] = w_next[p];
            UNROLL for (int i = 0; i < X_COMPONENTS; i++) xs[i] = x_next[i];
            if (r + 1 < here) {
                fetch_weights(w_next, weights, plain, base + r + 1, u);
                fetch_inputs(x_next, x, base + r + 1, u);
            }
            UNROLL for (int b = 0; b < OUTPUTS; b++) {
                real sums[MAX_D];
                UNROLL for (int k = 0; k < MAX_D; k++) sums[k] = 0;
                UNROLL for (int n = 0; n < MAX_TERMS; n++) {
                    const int p = OUTPUT[b].first + n;
                    if (p >= OUTPUT[b].end) break;
                    UNROLL for (int i = 0; i < MAX_D; i++) {
                        if (i >= TERM[p].d1) break;
                        const real wx = w[p] * xs[TERM[p].x + i];
                        UNROLL for (int k = 0; k < MAX_D; k++) {
                            if (k >= OUTPUT[b].d) break;
                            const int q = M_INDEX[TERM[p].m + i * OUTPUT[b].d + k];
                            if (q >= 0) sums[k] = multiply_add(wx, s.m[r][q], sums[k]);
                        }
                    }
                }
                store_channel(out + (base + r) * OUT_ROW + OUTPUT[b].offset, sums, buffer, OUTPUT[b].d, OUTPUT[b].mul, u, false);
            }
        }
    }
}
#endif

#if BACKWARD
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
tensor_product_backward(const real* __restrict__ x, const real* __restrict__ y, const real* __restrict__ weights,
                        const real* __restrict__ grad, int plain, long long rows, int accumulate, real* __restrict__ dx,
                        real* __restrict__ dy, real* __restrict__ dw) {
    __shared__ Shared s;
    const int u = blockIdx.y * THREADS + threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    real* buffer = s.buffer[warp];
#if WANT_W && SHARED_WEIGHTS
    real dw_sums[TERMS];
    UNROLL for (int p = 0; p < TERMS; p++) dw_sums[p] = 0;
#endif
    for (long long base = (long long)blockIdx.x * ROWS; base < rows; base += (long long)gridDim.x * ROWS) {
        const int here = (int)min((long long)ROWS, rows - base);
        fetch_rows(s, y, y, base, here);
        real w_next[TERMS], x_next[X_COMPONENTS], g_next[MAX_D];
        fetch_weights(w_next, weights, plain, base, u);
        fetch_inputs(x_next, x, base, u);
        load_block(g_next, grad + base * OUT_ROW + OUTPUT[0].offset, OUTPUT[0].d, OUTPUT[0].mul, u);
        for (int r = 0; r < here; r++) {
            const long long row = base + r;
            real w[TERMS], xs[X_COMPONENTS];
            UNROLL for (int p = 0; p < TERMS; p++) w[p] = w_next[p];
            UNROLL for (int i = 0; i < X_COMPONENTS; i++) xs[i] = x_next[i];
            if (r + 1 < here) {
                fetch_weights(w_next, weights, plain, row + 1, u);
                fetch_inputs(x_next, x, row + 1, u);
            }
#if WANT_X
            real dx_sums[X_COMPONENTS];
            UNROLL for (int i = 0; i < X_COMPONENTS; i++) dx_sums[i] = 0;
#endif
#if WANT_Y
            real dy_sums[Y_PADDED];
            UNROLL for (int j = 0; j < Y_PADDED; j++) dy_sums[j] = 0;
#endif
            UNROLL for (int b = 0; b < OUTPUTS; b++) {
                real g[MAX_D];
                turn(g, g_next, buffer, OUTPUT[b].d);
                load_after(g_next, grad + row * OUT_ROW, b, r + 1 == here, u);
                UNROLL for (int t = 0; t < MAX_TERMS; t++) {
                    const int p = OUTPUT[b].first + t;
                    if (p >= OUTPUT[b].end) break;
                    real dw_sum = 0;
                    UNROLL for (int i = 0; i < MAX_D; i++) {
                        if (i >= TERM[p].d1) break;
                        real sum = 0;  // sum_k M[i,k] g[k]
                        const real wx = w[p] * xs[TERM[p].x + i];
                        UNROLL for (int k = 0; k < MAX_D; k++) {
                            if (k >= OUTPUT[b].d) break;
                            const int q = M_INDEX[TERM[p].m + i * OUTPUT[b].d + k];
                            if (q >= 0) {
                                sum = multiply_add(s.m[r][q], g[k], sum);
#if WANT_Y
                                UNROLL for (int n = 0; n < M_TERMS; n++)
                                    if (M_VALUE[q][n] != 0)
                                        dy_sums[M_Y[q][n]] = multiply_add((real)M_VALUE[q][n], wx * g[k], dy_sums[M_Y[q][n]]);
#endif
                            }
                        }
                        dw_sum = multiply_add(xs[TERM[p].x + i], sum, dw_sum);
#if WANT_X
                        dx_sums[TERM[p].x + i] = multiply_add(w[p], sum, dx_sums[TERM[p].x + i]);
#endif
                    }
#if WANT_W && SHARED_WEIGHTS
                    dw_sums[p] += dw_sum;
#elif WANT_W
                    if (TERM[p].weight >= 0 && ACTIVE(TERM[p].mul))
                        store_once(dw + row * WEIGHT_ROW + TERM[p].weight + u * TERM[p].stride, dw_sum);
#endif
                }
            }
#if WANT_X
            store_inputs(dx + row * X_ROW, dx_sums, buffer, u, accumulate);
#endif
#if WANT_Y
            const real sum = reduce_scatter<Y_PADDED>(dy_sums, lane);
            if (lane % (32 / Y_PADDED) == 0) s.partial[r][warp][owner<Y_PADDED>(lane)] = sum;
#endif
        }
#if WANT_Y
        store_sums(s, dy, base, rows, here, accumulate);
#endif
    }
#if WANT_W && SHARED_WEIGHTS
    UNROLL for (int p = 0; p < TERMS; p++)
        if (TERM[p].weight >= 0 && ACTIVE(TERM[p].mul))
            dw[(long long)blockIdx.x * WEIGHT_ROW + TERM[p].weight + u * TERM[p].stride] = dw_sums[p];
#endif
}
#endif

// The derivatives of <hx, dx> + <hy, dy> + <hw, dw> by grad, x, y and w in one pass. With h made of
// hy as m is of y, and v the tangent of w:
//   out = (w hx + v x) m + w x h,  dx = w h g + v m g,  dw = hx m g + x h g,  dy = C (w hx + v x) g
#if DOUBLE
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
tensor_product_double(const real* __restrict__ x, const real* __restrict__ y, const real* __restrict__ weights,
                      const real* __restrict__ grad, const real* __restrict__ hx, const real* __restrict__ hy,
                      const real* __restrict__ hw, int plain, long long rows, int accumulate, real* __restrict__ out,
                      real* __restrict__ dx, real* __restrict__ dy, real* __restrict__ dw) {
    __shared__ Shared s;
    const int u = blockIdx.y * THREADS + threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    real* buffer = s.buffer[warp];
#if SHARED_WEIGHTS
    real dw_sums[TERMS];
    UNROLL for (int p = 0; p < TERMS; p++) dw_sums[p] = 0;
#endif
    for (long long base = (long long)blockIdx.x * ROWS; base < rows; base += (long long)gridDim.x * ROWS) {
        const int here = (int)min((long long)ROWS, rows - base);
        fetch_rows(s, y, hy, base, here);
        real g_next[MAX_D];
        load_block(g_next, grad + base * OUT_ROW + OUTPUT[0].offset, OUTPUT[0].d, OUTPUT[0].mul, u);
        for (int r = 0; r < here; r++) {
            const long long row = base + r;
            real w[TERMS], v[TERMS], xs[X_COMPONENTS], hs[X_COMPONENTS], dx_sums[X_COMPONENTS], dy_sums[Y_PADDED];
            fetch_weights(w, weights, plain, row, u);
            fetch_weights(v, hw, 0, row, u);
            fetch_inputs(xs, x, row, u);
            fetch_inputs(hs, hx, row, u);
            UNROLL for (int i = 0; i < X_COMPONENTS; i++) dx_sums[i] = 0;
            UNROLL for (int j = 0; j < Y_PADDED; j++) dy_sums[j] = 0;
            UNROLL for (int b = 0; b < OUTPUTS; b++) {
                real g[MAX_D], sums[MAX_D];
                turn(g, g_next, buffer, OUTPUT[b].d);
                load_after(g_next, grad + row * OUT_ROW, b, r + 1 == here, u);
                UNROLL for (int k = 0; k < MAX_D; k++) sums[k] = 0;
                UNROLL for (int t = 0; t < MAX_TERMS; t++) {
                    const int p = OUTPUT[b].first + t;
                    if (p >= OUTPUT[b].end) break;
                    real dw_sum = 0;
                    UNROLL for (int i = 0; i < MAX_D; i++) {
                        if (i >= TERM[p].d1) break;
                        const int at = TERM[p].x + i;
                        const real a = multiply_add(w[p], hs[at], v[p] * xs[at]), c = w[p] * xs[at];
                        real mg = 0, hg = 0;
                        UNROLL for (int k = 0; k < MAX_D; k++) {
                            if (k >= OUTPUT[b].d) break;
                            const int q = M_INDEX[TERM[p].m + i * OUTPUT[b].d + k];
                            if (q >= 0) {
                                mg = multiply_add(s.m[r][q], g[k], mg);
                                hg = multiply_add(s.h[r][q], g[k], hg);
                                sums[k] = multiply_add(a, s.m[r][q], multiply_add(c, s.h[r][q], sums[k]));
                                UNROLL for (int n = 0; n < M_TERMS; n++)
                                    if (M_VALUE[q][n] != 0)
                                        dy_sums[M_Y[q][n]] = multiply_add((real)M_VALUE[q][n], a * g[k], dy_sums[M_Y[q][n]]);
                            }
                        }
                        dw_sum = multiply_add(hs[at], mg, multiply_add(xs[at], hg, dw_sum));
                        dx_sums[at] = multiply_add(w[p], hg, multiply_add(v[p], mg, dx_sums[at]));
                    }
#if SHARED_WEIGHTS
                    dw_sums[p] += dw_sum;
#else
                    if (TERM[p].weight >= 0 && ACTIVE(TERM[p].mul))
                        store_once(dw + row * WEIGHT_ROW + TERM[p].weight + u * TERM[p].stride, dw_sum);
#endif
                }
                store_channel(out + row * OUT_ROW + OUTPUT[b].offset, sums, buffer, OUTPUT[b].d, OUTPUT[b].mul, u, false);
            }
            store_inputs(dx + row * X_ROW, dx_sums, buffer, u, accumulate);
            const real sum = reduce_scatter<Y_PADDED>(dy_sums, lane);
            if (lane % (32 / Y_PADDED) == 0) s.partial[r][warp][owner<Y_PADDED>(lane)] = sum;
        }
        store_sums(s, dy, base, rows, here, accumulate);
    }
#if SHARED_WEIGHTS
    UNROLL for (int p = 0; p < TERMS; p++)
        if (TERM[p].weight >= 0 && ACTIVE(TERM[p].mul))
            dw[(long long)blockIdx.x * WEIGHT_ROW + TERM[p].weight + u * TERM[p].stride] = dw_sums[p];
#endif
}
#endif
