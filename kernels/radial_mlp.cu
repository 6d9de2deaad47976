// The hidden layers of a radial MLP, e3nn.nn.FullyConnectedNet: everything but its last product.
//
//   a_0[e] = x[e]        z_l[e,w] = SCALE_l * sum_u a_l[e,u] W_l[u,w]        a_l+1 = GAIN_l * act_l(z_l)        out = a_HIDDEN
//
// and from g, the gradient of out:
//
//   d_l = GAIN_l * act_l'(z_l) * g_l+1        g_l[e,u] = SCALE_l * sum_w d_l[e,w] W_l[u,w]        dx = g_0
//   dW_l[u,w] = SCALE_l * sum_e a_l[e,u] d_l[e,w]
//
// A block owns ROWS edges at a time, tile after tile, with the weights of all layers in shared memory from its start: nothing
// but x is read and nothing but out is written, numbers E (w_0 + w_HIDDEN) where a kernel for each product, scale and
// activation moves some 12 E w. Backward makes the activations anew, which costs less than to read them:
// E (2 w_0 + w_HIDDEN). 128 threads share each product as in matrix_tile.cuh: tensor cores, as accurate as multiply-adds of
// the working type. The slopes act' stay in the registers of the threads that make them, which own the same rows and
// columns on the way back; activations go through shared memory from one product to the next.
//
// Second derivatives (GRADIENTS 3) are those of <h, dx>, with h the gradient of dx. <h, dx> = <g, out'>, out' being the
// derivative of out in the direction h:
//
//   a'_0 = h        z'_l = SCALE_l * a'_l W_l        a'_l+1 = GAIN_l * act_l'(z_l) * z'_l        dg = a'_HIDDEN
//   p_l = GAIN_l * act_l'(z_l) * g_l+1        q_l = GAIN_l * (act_l''(z_l) * z'_l * g_l+1 + act_l'(z_l) * f_l+1)
//   g_l = SCALE_l * p_l W_l^T        f_l = SCALE_l * q_l W_l^T, f_HIDDEN = 0        dx = f_0
//   dW_l = SCALE_l * sum_e (a'_l[e] p_l[e] + a_l[e] q_l[e])
//
// Those are the same products of twice as many rows: of a tile's rows, groups of eight are in turn a' (g, p) and a (f, q) of the
// same eight edges, which the layout of tensor cores gives to the same thread. Reads E (2 w_0 + w_HIDDEN), writes as much.
//
// dW: each block keeps sums of its own in global memory (the second-level cache), to which it adds tile after tile;
// they are added up in a fixed order. Nothing is atomic.
//
// plan.cuh: HIDDEN; WIDTH[HIDDEN + 1]; SCALE, GAIN, ACTIVATION[HIDDEN]; ROWS, BLOCKS (of a multiprocessor), SHARED (bytes of a block);
// GRADIENTS: 0 forward, 1 dx, 2 dx and dW, 3 second derivatives: dg, dx and dW.

#include "plan.cuh"
#include "radial_mlp.cuh"

// Of layer l: rows of its weights in shared memory, filled up to whole steps, and numbers from one to the next.
constexpr int weight_rows(int l) { return up_to(WIDTH[l], DEPTH); }
constexpr int weight_pitch(int l) { return up_to(WIDTH[l + 1], TILE); }
constexpr int weight_begin(int l) { return l == 0 ? 0 : weight_begin(l - 1) + weight_rows(l - 1) * weight_pitch(l - 1); }
constexpr int result_begin(int l) { return l == 0 ? 0 : result_begin(l - 1) + WIDTH[l - 1] * WIDTH[l]; }
// Of a_l, with room for whole tiles as the result of a product.
constexpr int pitch(int l) { return l == 0 ? up_to(WIDTH[0], 32) : up_to(WIDTH[l], TILE); }
constexpr int widest(int l) { return l == 0 ? pitch(0) : pitch(l) > widest(l - 1) ? pitch(l) : widest(l - 1); }
// All a_l have a place of their own where dW needs them, else one for all; that of d_l comes after them.
constexpr int KEPT = GRADIENTS >= 2;
constexpr int begin_of(int l) { return !KEPT || l == 0 ? weight_begin(HIDDEN) : begin_of(l - 1) + ROWS * pitch(l - 1); }
constexpr int WIDEST = widest(HIDDEN);
constexpr int ROOM = begin_of(HIDDEN) + ROWS * WIDEST;
static_assert(ROOM * sizeof(real) == SHARED, "as the launch has it");

constexpr int TILES = (WIDEST + TILE - 1) / TILE;
#if GRADIENTS
typedef real Slopes[HIDDEN][TILES][DOWN][ACROSS][4];
#else
typedef real Slopes[1][1][1][1][1];
#endif

// Rows of a tile and its edges: the same, but for second derivatives.
constexpr bool SECOND = GRADIENTS == 3;
constexpr int EDGES = SECOND ? ROWS / 2 : ROWS;
constexpr int DIRECTION = 0, VALUE = 1;  // rows of second derivatives: a' and a
__device__ __forceinline__ int edge_of(int row) { return SECOND ? row / 16 * 8 + row % 8 : row; }
__device__ __forceinline__ int half_of(int row) { return row / 8 % 2; }

struct alignas(2 * sizeof(real)) Two {
    real of[2];
};

// What all threads of a block have.
struct Block {
    real* memory;
    long long first;  // edge of the tile
    int count;        // edges of it
};

// The weights of a layer, zeros where there are none.
template <int L>
__device__ __forceinline__ void load_weights(real* memory, const real* __restrict__ weights) {
    constexpr int rows = weight_rows(L), columns = weight_pitch(L);
    for (int e = threadIdx.x; e < rows * columns; e += THREADS) {
        const int u = e / columns, w = e % columns;
        memory[weight_begin(L) + place<columns>(u, w)] = u < WIDTH[L] && w < WIDTH[L + 1] ? weights[u * WIDTH[L + 1] + w] : (real)0;
    }
}

// a_0, and a'_0 for second derivatives: zeros for edges and columns that aren't there.
__device__ __forceinline__ void load_input(const Block& b, const real* __restrict__ x, const real* __restrict__ h) {
    constexpr int columns = weight_rows(0);
    for (int e = threadIdx.x; e < ROWS * columns; e += THREADS) {
        const int row = e / columns, u = e % columns, edge = edge_of(row);
        const bool there = edge < b.count && u < WIDTH[0];
        const real* from = SECOND && half_of(row) == DIRECTION ? h : x;
        b.memory[begin_of(0) + place<pitch(0)>(row, u)] = there ? from[(b.first + edge) * WIDTH[0] + u] : (real)0;
    }
}

// Numbers of a thread that lie side by side in memory go there together; of second derivatives one half of the rows.
template <int WIDE, int HALF = VALUE>
__device__ __forceinline__ void store(const Block& b, real* __restrict__ to, const Sums& sums, int tile) {
#pragma unroll
    for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int edge = edge_of(own_row(i, half));
            if (edge >= b.count || (SECOND && half != HALF)) continue;
#pragma unroll
            for (int j = 0; j < ACROSS; j++) {
                const int column = tile * TILE + own_column(j);
                real* here = to + (b.first + edge) * WIDE + column;
                const Two two = {sums[i][j][2 * half], sums[i][j][2 * half + 1]};
                if (WIDE % 2 == 0) {
                    if (column < WIDE) *reinterpret_cast<Two*>(here) = two;
                } else {
                    if (column < WIDE) here[0] = two.of[0];
                    if (column + 1 < WIDE) here[1] = two.of[1];
                }
            }
        }
}

// From a_L in shared memory on: slopes, and the last activations to `out` unless it is null.
template <int L>
__device__ __forceinline__ void forward(const Block& b, Slopes& slopes, real* __restrict__ out) {
    if constexpr (L < HIDDEN) {
        constexpr int tiles = weight_pitch(L) / TILE;
        const real *left = b.memory + begin_of(L), *right = b.memory + weight_begin(L);
        Sums sums[tiles];
        __syncthreads();
#pragma unroll
        for (int tile = 0; tile < tiles; tile++) {
            product<weight_rows(L)>(
                sums[tile], SCALE[L], [&](int row, int u) { return left[place<pitch(L)>(row, u)]; },
                [&](int u, int w) { return right[place<weight_pitch(L)>(u, tile * TILE + w)]; });
            each_own([&](int i, int j, int n, int, int) {
                if (SECOND && n / 2 == DIRECTION) return;
                real value, slope;
                const real z = sums[tile][i][j][n];
                activate<ACTIVATION[L]>(z, value, slope);
                sums[tile][i][j][n] = (real)GAIN[L] * value;
#if GRADIENTS
                slopes[L][tile][i][j][SECOND ? n - 2 : n] = (real)GAIN[L] * slope;
#endif
                if constexpr (SECOND) {
                    real& direction = sums[tile][i][j][n - 2];
                    slopes[L][tile][i][j][n] = (real)GAIN[L] * curvature<ACTIVATION[L]>(z, value, slope) * direction;
                    direction *= (real)GAIN[L] * slope;
                }
            });
        }
        if constexpr (L + 1 < HIDDEN) {
            if (!KEPT) __syncthreads();
#pragma unroll
            for (int tile = 0; tile < tiles; tile++)
                each_own([&](int i, int j, int n, int row, int column) {
                    b.memory[begin_of(L + 1) + place<pitch(L + 1)>(row, tile * TILE + column)] = sums[tile][i][j][n];
                });
            forward<L + 1>(b, slopes, out);
        } else if (!GRADIENTS || (SECOND && out)) {
#pragma unroll
            for (int tile = 0; tile < tiles; tile++) store<WIDTH[HIDDEN], DIRECTION>(b, out, sums[tile], tile);
        }
    }
}

#if GRADIENTS
// What a block has of dW_L, of this tile added to that of those before.
template <int L>
__device__ __forceinline__ void add_weights(const Block& b, const real* d, bool before, real* __restrict__ results) {
    const real* a = b.memory + begin_of(L);
    real* to = results + result_begin(L);
#pragma unroll 1
    for (int first_u = 0; first_u < WIDTH[L]; first_u += ROWS)
#pragma unroll 1
        for (int first_w = 0; first_w < WIDTH[L + 1]; first_w += TILE) {
            Sums sums;
            product<ROWS>(
                sums, SCALE[L], [&](int u, int row) { return a[place<pitch(L)>(row, min(first_u + u, weight_rows(L) - 1))]; },
                [&](int row, int w) { return d[place<WIDEST>(row, first_w + w)]; });
            each_own([&](int i, int j, int n, int u, int w) {
                u += first_u, w += first_w;
                if (u >= WIDTH[L] || w >= WIDTH[L + 1]) return;
                real& here = to[u * WIDTH[L + 1] + w];
                here = before ? here + sums[i][j][n] : sums[i][j][n];
            });
        }
}

// From the gradient of a_L+1, this thread's numbers of it, on.
template <int L>
__device__ __forceinline__ void backward(const Block& b, const Slopes& slopes, Sums* grads, bool before, real* __restrict__ dx,
                                         real* __restrict__ dweights) {
    constexpr int tiles = weight_pitch(L) / TILE, below = (WIDTH[L] + TILE - 1) / TILE;
    real* d = b.memory + begin_of(HIDDEN);
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < tiles; tile++)
        each_own([&](int i, int j, int n, int row, int column) {
            real of_z = grads[tile][i][j][n] * slopes[L][tile][i][j][SECOND ? n % 2 : n];
            if (SECOND && n / 2 == VALUE) of_z += grads[tile][i][j][n % 2] * slopes[L][tile][i][j][n];
            d[place<WIDEST>(row, tile * TILE + column)] = of_z;
        });
    __syncthreads();
    if (KEPT && dweights) add_weights<L>(b, d, before, dweights);
    if (L == 0 && !dx) return;
    const real* right = b.memory + weight_begin(L);
#pragma unroll
    for (int tile = 0; tile < below; tile++) {
        if (tile * TILE + right_column(0) / 8 * 8 >= WIDTH[L]) continue;  // of this warp: it has nothing to add up
        product<up_to(WIDTH[L + 1], DEPTH)>(
            grads[tile], SCALE[L], [&](int row, int w) { return d[place<WIDEST>(row, w)]; },
            [&](int w, int u) { return right[place<weight_pitch(L)>(min(tile * TILE + u, weight_rows(L) - 1), w)]; });
        if (L == 0) store<WIDTH[0]>(b, dx, grads[tile], tile);
    }
    if constexpr (L > 0) backward<L - 1>(b, slopes, grads, before, dx, dweights);
}
#endif

template <int L>
__device__ __forceinline__ void load_all(real* memory, const real* const (&weights)[4]) {
    if constexpr (L < HIDDEN) {
        load_weights<L>(memory, weights[L]);
        load_all<L + 1>(memory, weights);
    }
}

#if GRADIENTS == 0
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
radial_mlp(const real* __restrict__ x, const real* __restrict__ w0, const real* __restrict__ w1, const real* __restrict__ w2,
           const real* __restrict__ w3, long long edges, real* __restrict__ out) {
    extern __shared__ __align__(16) real memory[];
    load_all<0>(memory, {w0, w1, w2, w3});
    for (long long first = (long long)blockIdx.x * ROWS; first < edges; first += (long long)gridDim.x * ROWS) {
        const Block b = {memory, first, (int)min((long long)ROWS, edges - first)};
        Slopes none;
        load_input(b, x, nullptr);
        forward<0>(b, none, out);
        __syncthreads();
    }
}
#else
// All tiles of a block; with h, second derivatives.
__device__ __forceinline__ void all_gradients(const real* __restrict__ grad, const real* __restrict__ x, const real* __restrict__ h,
                                              const real* const (&weights)[4], long long edges, real* __restrict__ dgrad,
                                              real* __restrict__ dx, real* __restrict__ dweights) {
    extern __shared__ __align__(16) real memory[];
    constexpr int tiles = weight_pitch(HIDDEN - 1) / TILE;
    if (dweights) dweights += (long long)blockIdx.x * result_begin(HIDDEN);
    load_all<0>(memory, weights);
    bool before = false;
    for (long long first = (long long)blockIdx.x * EDGES; first < edges; first += (long long)gridDim.x * EDGES) {
        const Block b = {memory, first, (int)min((long long)EDGES, edges - first)};
        Slopes slopes;
        load_input(b, x, h);
        forward<0>(b, slopes, dgrad);
        Sums grads[TILES];
#pragma unroll
        for (int tile = 0; tile < tiles; tile++)
            each_own([&](int i, int j, int n, int row, int column) {
                const int w = tile * TILE + column, edge = edge_of(row);
                const bool there = edge < b.count && w < WIDTH[HIDDEN] && !(SECOND && n / 2 == VALUE);
                grads[tile][i][j][n] = there ? grad[(first + edge) * WIDTH[HIDDEN] + w] : (real)0;
            });
        backward<HIDDEN - 1>(b, slopes, grads, before, dx, dweights);
        before = true;
        __syncthreads();
    }
}

#if GRADIENTS == 3
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
radial_mlp_second(const real* __restrict__ grad, const real* __restrict__ x, const real* __restrict__ h, const real* __restrict__ w0,
                  const real* __restrict__ w1, const real* __restrict__ w2, const real* __restrict__ w3, long long edges,
                  real* __restrict__ dgrad, real* __restrict__ dx, real* __restrict__ dweights) {
    all_gradients(grad, x, h, {w0, w1, w2, w3}, edges, dgrad, dx, dweights);
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
radial_mlp_gradients(const real* __restrict__ grad, const real* __restrict__ x, const real* __restrict__ w0,
                     const real* __restrict__ w1, const real* __restrict__ w2, const real* __restrict__ w3, long long edges,
                     real* __restrict__ dx, real* __restrict__ dweights) {
    all_gradients(grad, x, nullptr, {w0, w1, w2, w3}, edges, nullptr, dx, dweights);
}
#endif
#endif
