// o3.Linear of many rows in float64, on Hopper: the sums of indexed_linear.cu, in the same order, to the bit, with warps that do
// nothing but copy.
//
//   out[n,w,k] = sum over paths p into the block of w, channels u:  c_p * x[n,u,k] * W_p[u,w]
//
// Who owns what. A block owns ROWS / dim nodes, all their components, and TILE columns of an output block, and sums over all paths into
// it, DEPTH channels a step. Of its two warpgroups one multiplies (matrix_tile.cuh), each warp its part of the tile's rows, one component
// of all nodes after the other; the other one copies, up to STAGES steps ahead, and hands it most of its registers. A slot of the ring
// has two barriers: `full` says that a step's numbers are there, `empty` that all warps have read them. So warps that multiply
// have neither addresses nor a barrier in common, and one that waits holds up no other. In indexed_linear.cu, whose threads ask for
// copies between their products, these take a quarter of the time.
//
// x comes as it lies, a node's DEPTH channels with their components by one bulk copy; so does W, TILE columns of a channel.
// TRANSPOSED, the gradient of x, W is read along w, where DEPTH numbers are too few for a copy of their own: threads copy 16 bytes each.
// The result leaves mul_ir through shared memory, a node's columns by one bulk copy. Path constants multiply x as it is read, or the
// result, where all paths into a block have the same (ONE_SCALE).
//
// Bytes, 8 to a number: 8 N (x + out), x for further columns and W once a tile of nodes from the second-level cache, for the blocks of a
// tile of nodes are neighbours in the grid.
//
// plan.cuh and parameters: as in indexed_linear.cu, but that nothing sorts rows. Channels fill steps, columns fill tiles, and all that is
// copied begins at multiples of 16 bytes.

#include "plan.cuh"
#include "right_tile.cuh"
#include "slots.cuh"

constexpr int WARPS = THREADS / 32;
// Of threads that copy, and of those that multiply: in all what a multiprocessor has.
constexpr int FEW_REGISTERS = 40, MANY_REGISTERS = (BLOCKS == 2 ? 256 : 160) - FEW_REGISTERS;
static_assert(WARPS == 4 && COPIERS == 4 && BLOCKS >= 2 && BLOCKS <= 3, "two warpgroups, between which registers are handed over");
constexpr int SLOT = LEFT_ROOM + RIGHT_ROOM;
template <int DIM>
constexpr int OUT_PITCH = TILE * DIM + 4;
static_assert(WHOLE_CHANNELS && WHOLE_COLUMNS && X_COPY == 2 && W_COPY == 2 && OUT_COPY == 2, "as bulk copies have them");

struct Tile {
    long long begin;  // first row of x and out
    int count;        // nodes
};

// Those that copy go through all steps, a slot after it was read: of nodes and of lines of W each warp has every COPIERS-th.
template <int DIM>
__device__ __forceinline__ void copy_steps(const Item& item, const Tile tile, const real* __restrict__ x, const real* __restrict__ weights,
                                           real* memory, Slots<STAGES>& slots) {
    constexpr int of_node = DEPTH * DIM, of_line = TILE * sizeof(real);
    const int t = threadIdx.x - THREADS, warp = number_of_warp() - WARPS;
    const int nodes = (tile.count - warp + COPIERS - 1) / COPIERS;
    Turn<STAGES> turn;
    for (int p = item.first; p < item.end; p++) {
        const Path path = PATH[p];
        const real* left_from = x + (tile.begin + warp) * IN_ROW + path.in;
#if TRANSPOSED
        constexpr int pieces = DEPTH / W_COPY, lines = 32 * COPIERS / pieces;
        const int place = t / pieces * RIGHT_PITCH + t % pieces * W_COPY;
        const real* right_from = weights + path.weight + (item.column + t / pieces) * (long long)path.channels + t % pieces * W_COPY;
#else
        const real* right_from = weights + path.weight + warp * (long long)path.columns + item.column;
#endif
        for (int channel = 0; channel < path.channels; channel += DEPTH) {
            wait_until_empty(slots, turn);
            Barrier& full = slots.full[turn.slot];
            real *left = memory + turn.slot * SLOT, *right = left + LEFT_ROOM;
            if (one_of_warp()) {
                arrive_expecting(full, nodes * of_node * sizeof(real) + (TRANSPOSED ? 0 : DEPTH / COPIERS * of_line));
#if !TRANSPOSED
#pragma unroll
                for (int n = 0; n < DEPTH / COPIERS; n++)
                    copy_in(right + (n * COPIERS + warp) * RIGHT_PITCH, right_from + n * COPIERS * (long long)path.columns, of_line, full);
#endif
                for (int n = 0; n < nodes; n++)
                    copy_in(left + (n * COPIERS + warp) * PITCH<DIM>, left_from + n * COPIERS * IN_ROW, of_node * sizeof(real), full);
            }
#if TRANSPOSED
            const real* line = right_from;
#pragma unroll
            for (int n = 0; n < TILE; n += lines, line += lines * (long long)path.channels)
                copy_async<W_COPY>(right + n * RIGHT_PITCH + place, line, W_COPY);
            arrive_when_copied(full);
            right_from += DEPTH;
#else
            right_from += DEPTH * (long long)path.columns;
#endif
            left_from += of_node;
            turn.advance();
        }
    }
}

// The others multiply what is there.
template <int DIM>
__device__ __forceinline__ void multiply_steps(Sums& sums, const Item& item, const Tile tile, const real* memory, Slots<STAGES>& slots) {
    constexpr int nodes = ROWS / DIM;
    // Where this thread's rows begin in the left tile. Those without a node, or a component, are not used.
    int begins[DOWN][2];
#pragma unroll
    for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = own_row(i, half);
            begins[i][half] = min(row % nodes, tile.count - 1) * PITCH<DIM> + min(row / nodes, DIM - 1) + own_depth(0, 0) * DIM;
        }
    Turn<STAGES> turn;
    for (int p = item.first; p < item.end; p++) {
        const Path path = PATH[p];
        for (int channel = 0; channel < path.channels; channel += DEPTH) {
            wait_until_full(slots, turn);
            const real *left = memory + turn.slot * SLOT, *right = left + LEFT_ROOM;
            auto of_left = [&](int i, int half, int at, int n) {
                const real number = left[begins[i][half] + (own_depth(at, n) - own_depth(0, 0)) * DIM];
                return ONE_SCALE ? number : path.scale * number;
            };
            auto of_right = [&](int j, int at, int n) { return number_of_right(right, own_depth(at, n), right_column(j)); };
            add_products(sums, of_left, of_right);
            was_read(slots, turn);
            turn.advance();
        }
    }
}

// Results leave through shared memory, where a node's TILE columns with all components come to lie as they do in `out`.
template <int DIM>
__device__ __forceinline__ void write_results(const Sums& sums, const Item& item, const Tile tile, real* __restrict__ out, real* memory,
                                              Barrier& together) {
    constexpr int nodes = ROWS / DIM;
    const Path to = PATH[item.first];
    meet(together, 0);  // all have read their last step
#pragma unroll
    for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = own_row(i, half), node = row % nodes, component = row / nodes;
            if (node >= tile.count || component >= DIM) continue;
            real* here = memory + node * OUT_PITCH<DIM> + component;
            const real factor = ONE_SCALE ? to.scale : (real)1;
#pragma unroll
            for (int j = 0; j < ACROSS; j++)
#pragma unroll
                for (int n = 0; n < 2; n++) here[(own_column(j) + n) * DIM] = factor * sums[i][j][2 * half + n];
        }
    fence_for_engines();
    meet(together, 1);
    if (one_of_warp()) {
        for (int node = threadIdx.x / 32; node < tile.count; node += WARPS)
            copy_out(out + (tile.begin + node) * OUT_ROW + to.out + item.column * DIM, memory + node * OUT_PITCH<DIM>, TILE * DIM * sizeof(real));
        close_group();
        wait_for_groups<0>();  // shared memory must outlive its copies
    }
}

template <int DIM>
__device__ __forceinline__ void tile_of(const Item& item, int number, const real* __restrict__ x, const real* __restrict__ weights,
                                        long long rows, real* __restrict__ out, real* memory, Slots<STAGES>& slots,
                                        Barrier& together) {
    constexpr int nodes = ROWS / DIM;
    const int t = threadIdx.x;
    const Tile tile = {(long long)number * nodes, (int)min((long long)nodes, rows - (long long)number * nodes)};
    if (tile.count <= 0) return;
    if (t < STAGES) {
        barrier_init(slots.full[t], COPIERS + (TRANSPOSED ? 32 * COPIERS : 0));
        barrier_init(slots.empty[t], READER * WARPS);
        if (t == 0) barrier_init(together, THREADS);
        fence_for_engines();
    }
    __syncthreads();
    if (t < THREADS) {
        take_registers<MANY_REGISTERS>();
        Sums sums = {};
        multiply_steps<DIM>(sums, item, tile, memory, slots);
        write_results<DIM>(sums, item, tile, out, memory, together);
    } else {
        leave_registers<FEW_REGISTERS>();
        copy_steps<DIM>(item, tile, x, weights, memory, slots);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS + 32 * COPIERS, BLOCKS)
linear_staged(const real* __restrict__ x, const real*, const int*, const int*, const real* __restrict__ weights, long long rows,
              real* __restrict__ out) {
    extern __shared__ __align__(16) real memory[];
    __shared__ Slots<STAGES> slots;
    __shared__ Barrier together;
    long long block = blockIdx.x;
#define OF_DIM(DIM, FIRST, HERE)                                                                                            \
    {                                                                                                                       \
        const long long blocks = HERE * (rows / (ROWS / DIM) + min(rows, 1ll));                                             \
        if (block < blocks)                                                                                                 \
            return tile_of<DIM>(ITEM[FIRST + block % HERE], block / HERE, x, weights, rows, out, memory, slots, together); \
        block -= blocks;                                                                                                    \
    }
    DIMS(OF_DIM)
}
