// The gradient of the weights of o3.Linear of many rows in float32, on Hopper, by halves (halves.cuh):
//
//   dW_p[u,w] = c_p * sum over nodes n, components k:  x[n,u,k] * g[n,w,k]
//
// Who owns what. A block owns CHANNELS u by COLUMNS w of a path, and so many steps of the rows (weight_blocks.cuh): each STEPS times the
// nodes whose components fit in the 16 numbers that tensor cores sum over (CHUNK), the rest of which are zero. Its two warpgroups multiply 64 u each. They have
// x's halves in registers; g's, which both need, go to shared memory, where 16 lanes and their neighbours by 16 cut a column of a
// chunk each. A second lot of these halves makes one barrier a step enough. Other blocks of the multiprocessor multiply while one cuts, which
// takes about as long. Rows come by bulk copies, STAGES steps ahead, which all warps ask for while tensor cores are at work.
//
// Powers of two. Numbers of a u, and of a w, are multiplied by one power of two of their own, that of the largest of them so far: where
// a step has a larger one, what has been summed is multiplied by what lies between the two. So a step's sums are added as they are.
// A product is wrong by 2^-23 of itself, or 2^-39 of that of the largest numbers, as in linear_in_halves.cu.
//
// Bytes, 4 to a number: N (x ceil(columns / COLUMNS) + g ceil(channels / CHANNELS)), and twice a tile for each block.
//
// plan.cuh: IN_ROW, OUT_ROW; CHANNELS, COLUMNS; PATH; ITEM = {path, first u, first w}, those of fewer components
// first; DIMS, for each number of components that there is: it, its first item, and how many it has; NODES, of a step, by number of
// components, COST, 1; LEFT_ROOM, RIGHT_ROOM, what x and g of a slot take.
// TRANSPOSED: x and g have changed places, where x has few channels, and W's rows are columns.

#include "plan.cuh"
#include "linear_weights_in_halves.cuh"
#include "pipeline.cuh"
#include "warpgroups.cuh"
#include "weight_blocks.cuh"

constexpr int WARPS = THREADS / 32, BLOCKS = 2, STAGES = 2;
constexpr int SLOT = LEFT_ROOM + RIGHT_ROOM, HALVES = STEPS * WORDS_OF_A_STEP<ACROSS>, LOTS = 2;
constexpr int WARPS_THAT_CUT = COLUMNS / 16;  // g
static_assert(SLOT % 32 == 0, "halves begin as tensor cores read them");

struct Shared {
    Barrier full[STAGES];
    alignas(16) real factor[LOTS][COLUMNS];  // of what has been summed of a column
    alignas(16) real power[COLUMNS];         // in the end
};

// Asks for the nodes of a step that begins at row `row`: half of the warps for those of a chunk, each for every so manyth.
template <int DIM>
__device__ __forceinline__ void ask(const Share& of, int row, int warp, real* slot, Barrier& full) {
    using L = LeftChunk<DIM>;
    using R = RightChunk<DIM>;
    constexpr int warps = WARPS / STEPS;
    if (!one_of_warp()) return;
    const int chunk = warp / warps, first = warp % warps, here = min(L::nodes, of.rows - row - chunk * L::nodes);
    arrive_expecting(full, here > first ? (here - first + warps - 1) / warps * (of.left_bytes + of.right_bytes) : 0);
    const long long begin = row + chunk * L::nodes + first;
    const real *x = of.x + begin * IN_ROW, *grad = of.grad + begin * OUT_ROW;
    real *left = slot + chunk * L::size + first * L::pitch, *right = slot + LEFT_ROOM + chunk * R::size + first * R::pitch;
#pragma unroll 1
    for (int n = first; n < here; n += warps) {
        copy_in(left, x, of.left_bytes, full);
        copy_in(right, grad, of.right_bytes, full);
        left += warps * L::pitch, right += warps * R::pitch, x += warps * IN_ROW, grad += warps * OUT_ROW;
    }
}

// Of the last step, which may have fewer nodes: zeros in place of the others.
template <class C>
__device__ __forceinline__ void clear_after(int count, real* chunks) {
    for (int n = count; n < STEPS * C::nodes; n++) {
        real* node = chunks + n / C::nodes * C::size + n % C::nodes * C::pitch;
        for (int e = threadIdx.x; e < C::pitch; e += THREADS) node[e] = 0;
    }
}

template <int DIM>
__device__ __forceinline__ void sum(const Share& of, real* memory, Shared& s, real* __restrict__ to) {
    using L = LeftChunk<DIM>;
    constexpr int nodes = NODES<DIM>;
    static_assert(nodes == STEPS * L::nodes, "chunks are full");
    const int lane = threadIdx.x % 32, warp = number_of_warp(), own_row = threadIdx.x / 32 * 16 + lane / 4;
    unsigned* const all_halves = reinterpret_cast<unsigned*>(memory + STAGES * SLOT);
    int places[4];
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const int r = min(lane % 4 + n * 4, L::rows - 1);  // those beyond are multiplied by zeros
        places[n] = r / DIM * L::pitch + r % DIM + own_row * DIM;
    }
    for (int n = 0; n < STAGES; n++)
        if (n * nodes < of.rows) ask<DIM>(of, n * nodes, warp, memory + n * SLOT, s.full[n]);

    Sums sums;
    Column column;
    unsigned parity = 0;
    int turn = 0, lot = 0;  // of slots; of halves and factors
    for (int row = 0; row < of.rows; row += nodes) {
        real* slot = memory + turn * SLOT;
        unsigned* halves = all_halves + lot * HALVES;
        wait(s.full[turn], parity);
        if (of.rows - row < nodes) {
            clear_after<L>(of.rows - row, slot), clear_after<RightChunk<DIM>>(of.rows - row, slot + LEFT_ROOM);
            __syncthreads();
        }
        bool other = false;
        if (warp < WARPS_THAT_CUT) {
            column.read<DIM>(slot + LEFT_ROOM);
            other = column.cut(halves, s.factor[lot]);
        }
        real numbers[2][STEPS][4];
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int step = 0; step < STEPS; step++)
#pragma unroll
                for (int n = 0; n < 4; n++) numbers[half][step][n] = slot[places[n] + half * 8 * DIM + step * L::size];
        unsigned high[STEPS][4], low[STEPS][4];
        cut_rows(numbers, sums, high, low);
        fence_for_engines();
        if (__syncthreads_or(other)) sums.multiply_columns(s.factor[lot]);
#pragma unroll
        for (int first = 0; first < ACROSS; first += AT_ONCE) {
            real chains[AT_ONCE][4];
            ask_for_products<ACROSS>(chains, high, low, halves + first * 32);
            if (first == 0 && row + STAGES * nodes < of.rows) ask<DIM>(of, row + STAGES * nodes, warp, slot, s.full[turn]);
            wait_for_products(chains);
            keep_rows(high), keep_rows(low);
            sums.add(chains, first);
        }
        lot ^= 1;
        if (++turn == STAGES) turn = 0, parity ^= 1;
    }
    if (warp < WARPS_THAT_CUT && column.chunk == 0) s.power[column.column] = __uint_as_float(column.exponent);
    __syncthreads();
    write_tile(sums, own_row, s.power, to);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
linear_weights_in_halves(const real* __restrict__ x, const real* __restrict__ grad, long long rows, int steps, real* __restrict__ sums_of_blocks) {
    extern __shared__ __align__(128) real memory[];
    __shared__ Shared s;
    if (threadIdx.x == 0) {
        for (int n = 0; n < STAGES; n++) barrier_init(s.full[n], WARPS);
        fence_for_engines();
    }
    __syncthreads();
    int block = blockIdx.x;
#define OF_DIM(DIM, FIRST, HERE)                                                                                                 \
    {                                                                                                                            \
        const int blocks = HERE * slices_of<DIM>(rows, steps);                                                                   \
        if (block < blocks)                                                                                                      \
            return sum<DIM>(share_of<DIM>(ITEM[FIRST + block % HERE], block / HERE, x, grad, rows, steps), memory, s,            \
                            sums_of_blocks + (long long)blockIdx.x * OF_TILE);                                                   \
        block -= blocks;                                                                                                         \
    }
    DIMS(OF_DIM)
}
