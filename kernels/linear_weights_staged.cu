// The gradient of the weights of o3.Linear of many rows in float64, on Hopper:
//
//   dW_p[u,w] = c_p * sum over nodes n, components k:  x[n,u,k] * g[n,w,k]
//
// Who owns what. A block, the only one of a multiprocessor, owns CHANNELS u by COLUMNS w of a path (128 by 128; 64 by 256 where a side has few) and a
// share of the rows (weight_blocks.cuh). Of its three warpgroups two multiply, each warp 32 u by 64 w; the third copies, up to STAGES steps ahead, and
// leaves them most of its registers. A node's channels of a tile lie together, with all components: of x, and of g, they come by one bulk copy, as they
// lie. A slot of the ring has two barriers: `full`, its numbers are there, and `empty`, all warps have read them; nothing else is waited for.
//
// Tensor cores sum over four nodes at a time, one component after the other: there are no components to fill up with zeros, and with
// four numbers between nodes no two lanes read from a bank at once, for the number of components is odd.
//
// Bytes, 8 to a number: N (x ceil(columns / COLUMNS) + g ceil(channels / CHANNELS)), and twice a tile for each block. For each cycle of its
// tensor cores a multiprocessor reads 16 bytes of the second-level cache, and 48 of the 128 that shared memory gives.
//
// plan.cuh: IN_ROW, OUT_ROW; CHANNELS, COLUMNS; WARPS_DOWN, WARPS_ACROSS; SHARED, what a block has; PATH; ITEM = {path, first u, first w}, those
// of fewer components first; DIMS, for each number of components that there is: it, its first item, and how many it has; NODES, of a
// step, and COST, its (node, component) pairs, by number of components.
// TRANSPOSED: x and g have changed places, where g has few columns, and W's rows are columns.

#include "plan.cuh"
#define ROWS CHANNELS  // of the left tile
#include "matrix_tile.cuh"
#include "slots.cuh"
#include "weight_blocks.cuh"

constexpr int WARPS = THREADS / 32, COPIERS = 4, MOST_STAGES = 6;
// Of threads that copy, and of those that multiply: in all what a multiprocessor has.
constexpr int FEW_REGISTERS = 40, MANY_REGISTERS = 232;
static_assert(WARPS == 8 && DOWN == 2 && ACROSS == 8, "two warpgroups, each warp 32 by 64");

// How nodes of DIM components lie in a slot.
template <int DIM>
struct Step {
    static constexpr int nodes = NODES<DIM>, fours = nodes / 4 * DIM;
    static constexpr int left_pitch = CHANNELS * DIM + 4, right_pitch = COLUMNS * DIM + 4, size = nodes * (left_pitch + right_pitch);
    static constexpr int room = SHARED / (size * (int)sizeof(real)), stages = room < MOST_STAGES ? room : MOST_STAGES;
    static_assert(stages >= 2, "one is filled while another is read");
};
typedef Slots<MOST_STAGES> Ring;

// Those that copy go through all steps, a slot after it was read: each warp has every COPIERS-th node. Those that the last step lacks are zeros.
template <int DIM>
__device__ __forceinline__ void copy_steps(const Share& of, real* memory, Ring& slots) {
    using S = Step<DIM>;
    const int t = threadIdx.x - THREADS, warp = number_of_warp() - WARPS;
    const real *x = of.x + warp * IN_ROW, *grad = of.grad + warp * OUT_ROW;
    Turn<S::stages> turn;
    for (int row = 0; row < of.rows; row += S::nodes) {
        wait_until_empty(slots, turn);
        Barrier& full = slots.full[turn.slot];
        real *left = memory + turn.slot * S::size, *right = left + S::nodes * S::left_pitch;
        const int here = min(S::nodes, of.rows - row);
        for (int e = here * S::left_pitch + t; e < S::nodes * S::left_pitch; e += 32 * COPIERS) left[e] = 0;
        for (int e = here * S::right_pitch + t; e < S::nodes * S::right_pitch; e += 32 * COPIERS) right[e] = 0;
        __syncwarp();  // zeros are written before the first lane says so
        if (one_of_warp()) {
            arrive_expecting(full, max(0, (here - warp + COPIERS - 1) / COPIERS) * (of.left_bytes + of.right_bytes));
#pragma unroll 1
            for (int n = warp; n < here; n += COPIERS) {
                copy_in(left + n * S::left_pitch, x, of.left_bytes, full);
                copy_in(right + n * S::right_pitch, grad, of.right_bytes, full);
                x += COPIERS * IN_ROW, grad += COPIERS * OUT_ROW;
            }
        } else if (EVERY_THREAD_ARRIVES)
            arrive(full);
        turn.advance();
    }
}

// Where the nodes of a four begin, of a component.
template <int DIM>
__device__ __forceinline__ constexpr int place_of(int four, int pitch) { return four / DIM * 4 * pitch + four % DIM; }

// The others multiply what is there.
template <int DIM>
__device__ __forceinline__ void multiply_steps(Sums& sums, const Share& of, const real* memory, Ring& slots) {
    using S = Step<DIM>;
    const int node = threadIdx.x % 4, own_left = node * S::left_pitch + own_row(0, 0) * DIM;
    const int own_right = S::nodes * S::left_pitch + node * S::right_pitch + right_column(0) * DIM;
    Turn<S::stages> turn;
    for (int row = 0; row < of.rows; row += S::nodes) {
        wait_until_full(slots, turn);
        const real *left = memory + turn.slot * S::size + own_left, *right = memory + turn.slot * S::size + own_right;
#pragma unroll
        for (int four = 0; four < S::fours; four += 2) {
            const bool two = four + 1 < S::fours;  // the last may be one; known to the compiler
            real a[DOWN][4];
#pragma unroll
            for (int i = 0; i < DOWN; i++)
#pragma unroll
                for (int n = 0; n < (two ? 4 : 2); n++) a[i][n] = left[place_of<DIM>(four + n / 2, S::left_pitch) + (i * 16 + n % 2 * 8) * DIM];
#pragma unroll
            for (int j = 0; j < ACROSS; j++) {
                real b[2];
#pragma unroll
                for (int n = 0; n < (two ? 2 : 1); n++) b[n] = right[place_of<DIM>(four + n, S::right_pitch) + j * 8 * DIM];
#pragma unroll
                for (int i = 0; i < DOWN; i++)
                    if (two)
                        multiply_tiles(sums[i][j], a[i], b);
                    else
                        multiply_four(sums[i][j], {a[i][0], a[i][1]}, b[0]);
            }
        }
        was_read(slots, turn);
        turn.advance();
    }
}

template <int DIM>
__device__ __forceinline__ void tile_of(const Share& of, real* memory, Ring& slots, real* __restrict__ to) {
    if (threadIdx.x >= THREADS) {
        leave_registers<FEW_REGISTERS>();
        copy_steps<DIM>(of, memory, slots);
        return;
    }
    take_registers<MANY_REGISTERS>();
    Sums sums = {};
    multiply_steps<DIM>(sums, of, memory, slots);
#pragma unroll
    for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int j = 0; j < ACROSS; j++)
                *reinterpret_cast<Numbers*>(to + own_row(i, half) * COLUMNS + own_column(j)) = {sums[i][j][2 * half], sums[i][j][2 * half + 1]};
}

extern "C" __global__ void __launch_bounds__(THREADS + 32 * COPIERS, 1)
linear_weights_staged(const real* __restrict__ x, const real* __restrict__ grad, long long rows, int work, real* __restrict__ sums_of_blocks) {
    extern __shared__ __align__(16) real memory[];
    __shared__ Ring slots;
    if (threadIdx.x < MOST_STAGES) {
        barrier_init(slots.full[threadIdx.x], READER * COPIERS);
        barrier_init(slots.empty[threadIdx.x], READER * WARPS);
        fence_for_engines();
    }
    __syncthreads();
    int block = blockIdx.x;
#define OF_DIM(DIM, FIRST, HERE)                                                                                     \
    {                                                                                                                \
        const int blocks = HERE * slices_of<DIM>(rows, work);                                                        \
        if (block < blocks)                                                                                          \
            return tile_of<DIM>(share_of<DIM>(ITEM[FIRST + block % HERE], block / HERE, x, grad, rows, work), memory, \
                                slots, sums_of_blocks + (long long)blockIdx.x * OF_TILE);                            \
        block -= blocks;                                                                                             \
    }
    DIMS(OF_DIM)
}
