// o3.Linear of many rows in float32, on Hopper: the sums of linear_in_halves.cu, in the same order, by blocks that stay.
//
//   out[n,w,k] = sum over paths p into the block of w, channels u:  c_p * x[n,u,k] * W_p[u,w]
//
// Who owns what. A block to a multiprocessor, of MULTIPLIERS warpgroups that multiply and one that copies, which hands them most of its
// registers. One that multiplies takes tiles of ROWS (node, component) pairs and COLUMNS of an output block, every so manyth of them all, and
// does with each what a block of linear_in_halves.cu does with its own. A warp copies for it, into a ring of its own, up to STAGES
// steps ahead and across tiles: so memory is read while results are written, and a warpgroup that multiplies has no addresses, no barrier
// with what isn't its own and no beginning of a tile. In linear_in_halves.cu, whose threads ask for copies between their products, a
// third of a step goes to that, and to waiting.
//
// A step's halves of W come by one bulk copy; a node's DEPTH channels with all components by one each, scalars, which are short, by 16
// bytes of a lane. A warpgroup's results leave through room of their own, AT_ONCE columns at a time, a node's by one bulk copy, which is
// read while the next tile is multiplied; scalars from registers.
// Bytes: as in linear_in_halves.cu. Warpgroups that share W's copies, a third of its traffic, wait for one another: 0.069 ms for 0.062
// after the convolution.
//
// plan.cuh: as in linear_in_halves.cu. Channels fill steps, columns fill tiles, there are no species.

#include "plan.cuh"
#include "async_copy.cuh"
#include "linear_in_halves_tile.cuh"
#include "halve_weights.cuh"
#include "overlapping.cuh"
#include "slots.cuh"
#include "warpgroups.cuh"

// Of threads that copy, and of those that multiply: in all what a multiprocessor has.
constexpr int FEW_REGISTERS = 32, MANY_REGISTERS = (512 - FEW_REGISTERS) / MULTIPLIERS / 8 * 8;
static_assert(MULTIPLIERS <= 4, "each has a warp that copies");
static_assert(ROWS == 64 && STEPS == 2 && WARPGROUPS && WHOLE_CHANNELS && WHOLE_COLUMNS && !SORTED, "as products_of_warpgroup takes them");
constexpr int MOST_COMPONENTS = 15;  // of degree 7
constexpr int AT_ONCE = 64;
template <int DIM>
constexpr int RESULTS_PITCH = AT_ONCE * DIM + 4;
constexpr int RESULTS = ROWS * (AT_ONCE + 4), ROOM = STAGES * SLOT + RESULTS;  // of a warpgroup
static_assert(ROOM % 32 == 0, "W begins as tensor cores read it");

// What a warpgroup that multiplies has with the warp that copies for it, and by itself.
struct Own {
    Slots<STAGES> slots;
    Barrier together;
};

struct Progress {
    Turn<STAGES> turn;
    unsigned meetings = 0;
};

template <int DIM>
__device__ __forceinline__ void copy_tile(const Item& item, const Rows rows, const real* __restrict__ x, const real* halves, real* ring,
                                          Slots<STAGES>& slots, Turn<STAGES>& turn) {
    constexpr int of_node = DEPTH * DIM, of_columns = STEPS * SLICE;
    // Of scalars a lane's copies, the same part of every so manyth node.
    constexpr int parts = DEPTH / TOGETHER, at_once = 32 / parts;
    const int lane = threadIdx.x % 32, own_node = lane / parts, at = lane % parts * TOGETHER;
    const real* right_from = halves + (long long)item.chunk * SLICE;
    for (int p = item.first; p < item.end; p++) {
        const Path path = PATH[p];
        const real* left_from = x + rows.begin * IN_ROW + path.in;
#pragma unroll 1  // registers
        for (int channel = 0; channel < path.channels; channel += DEPTH) {
            wait_until_empty(slots, turn);
            Barrier& full = slots.full[turn.slot];
            real* left = ring + turn.slot * SLOT;
            if constexpr (DIM == 1) {
                const real* from = left_from + own_node * (long long)IN_ROW + at;
                real* to = left + own_node * PITCH<DIM> + at;
                count_from(from), count_from(to);
#pragma unroll
                for (int n = 0; n < ROWS; n += at_once)
                    if (n < rows.count - own_node) copy_async<TOGETHER>(to + n * PITCH<DIM>, from + n * (long long)IN_ROW, TOGETHER);
            }
            if (one_of_warp()) {
                arrive_expecting(full, (of_columns + (DIM == 1 ? 0 : rows.count * of_node)) * sizeof(real));
                const real* node = left_from;
                for (int n = 0; DIM > 1 && n < rows.count; n++, node += IN_ROW) copy_in(left + n * PITCH<DIM>, node, of_node * sizeof(real), full);
                wait_for_end_of_last();
                copy_in(left + LEFT_ROOM, right_from, of_columns * sizeof(real), full);
            }
            arrive_when_copied(full);
            left_from += of_node;
            right_from += of_columns;
            turn.advance();
        }
    }
}

// Results leave by AT_ONCE columns, where a node's with all components lie as they do in `out`.
template <int DIM>
__device__ __forceinline__ void send_results(const real (&sums)[DOWN][ACROSS][4], const Rows rows, const Path to, int column,
                                             real* __restrict__ out, real* results, Barrier& together, unsigned& meetings) {
    const int t = threadIdx.x % THREADS, lane = t % 32;
#pragma unroll
    for (int first = 0; first < COLUMNS; first += AT_ONCE) {
        wait_for_groups<0>();  // what left before has been read
        meet(together, meetings++ & 1);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int node = own_row(0, half) / DIM;
            if (node >= rows.count) continue;
            real* row = results + node * RESULTS_PITCH<DIM> + lane % 4 * 4 * DIM + own_row(0, half) % DIM;
#pragma unroll
            for (int j = 0; j < AT_ONCE / 8; j++)
#pragma unroll
                for (int n = 0; n < 2; n++) row[(j / 2 * 16 + j % 2 * 2 + n) * DIM] = sums[0][first / 8 + j][2 * half + n];
        }
        fence_for_engines();
        meet(together, meetings++ & 1);
        if (t % 4 == 0 && t / 4 < rows.count)
            copy_out(out + rows[t / 4] * OUT_ROW + to.out + (column + first) * DIM, results + t / 4 * RESULTS_PITCH<DIM>, AT_ONCE * DIM * sizeof(real));
        close_group();
    }
}

template <int DIM>
__device__ __forceinline__ void multiply_tile(int number, const Rows rows, const real* halves, real* __restrict__ out, real* ring,
                                              Own& own, Progress& progress) {
    const Item item = ITEM[number];
    const Path to = PATH[item.first];
    int begins[DOWN][2];
    own_begins<DIM>(rows.count, begins);
    real sums[DOWN][ACROSS][4] = {};
    unsigned any_low[DOWN][2] = {};
    for (int p = item.first; p < item.end; p++) {
        const Path path = PATH[p];
        for (int channel = 0; channel < path.channels; channel += DEPTH) {
            wait_until_full(own.slots, progress.turn);
            const real *left = ring + progress.turn.slot * SLOT, *right = left + LEFT_ROOM;
            HalvedRows of;
            unsigned exponents[2];
            halve_rows<DIM>(left, begins[0], of, exponents);
#pragma unroll
            for (int half = 0; half < 2; half++) of.scale[half] = path.scale * power_down(exponents[half]);
            gather_low(of.low, any_low[0]);
#pragma unroll
            for (int first = 0; first < ACROSS; first += COLUMNS_AT_ONCE / 8) {
                real chains[COLUMNS_AT_ONCE / 8][4];
                products_of_warpgroup<ACROSS>(chains, of.high, of.low, reinterpret_cast<const unsigned*>(right) + first * 32);
                if (first + COLUMNS_AT_ONCE / 8 == ACROSS) was_read(own.slots, progress.turn);
#pragma unroll
                for (int j = 0; j < COLUMNS_AT_ONCE / 8; j++)
#pragma unroll
                    for (int n = 0; n < 4; n++) sums[0][first + j][n] = multiply_add(of.scale[n / 2], chains[j][n], sums[0][first + j][n]);
            }
            progress.turn.advance();
        }
    }
    make_up(sums, any_low, true);
    multiply_by_powers(sums, powers_in(halves, number));
    if constexpr (DIM == 1)
        write_scalars(sums, rows, to, item.column, out);
    else
        send_results<DIM>(sums, rows, to, item.column, out, ring + STAGES * SLOT, own.together, progress.meetings);
}

// Tiles of all rows, for each number of components.
__device__ __forceinline__ void count_tiles(long long rows, int* tiles_of) {
#define COUNT(DIM, FIRST, HERE) tiles_of[DIM] = HERE * (int)((rows + ROWS / DIM - 1) / (ROWS / DIM));
    DIMS(COUNT)
}

// Every tile of one warpgroup's, for it or for the warp that copies.
template <bool COPIES>
__device__ __forceinline__ void all_tiles(int of, const real* __restrict__ x, const real* halves, long long rows,
                                          real* __restrict__ out, real* memory, Own& own, const int* tiles_of) {
    real* ring = memory + of * ROOM;
    Progress progress;
    // Neighbours in this order, which share x or W, are neighbours in time.
    for (int next = of * gridDim.x + blockIdx.x;; next += gridDim.x * MULTIPLIERS) {
        int tile = next;
#define OF_DIM(DIM, FIRST, HERE)                                                                              \
    {                                                                                                         \
        constexpr int nodes = ROWS / DIM;                                                                     \
        const int tiles = tiles_of[DIM];                                                                      \
        if (tile < tiles) {                                                                                   \
            const long long begin = (long long)(tile / HERE) * nodes;                                         \
            const Rows taken = {(int)min((long long)nodes, rows - begin), begin};                             \
            if constexpr (COPIES)                                                                             \
                copy_tile<DIM>(ITEM[FIRST + tile % HERE], taken, x, halves, ring, own.slots, progress.turn); \
            else                                                                                              \
                multiply_tile<DIM>(FIRST + tile % HERE, taken, halves, out, ring, own, progress);             \
            continue;                                                                                         \
        }                                                                                                     \
        tile -= tiles;                                                                                        \
    }
        DIMS(OF_DIM)
        return;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS * (MULTIPLIERS + 1), BLOCKS)
linear_in_halves(const real* __restrict__ x, const real* halves, long long rows, real* __restrict__ out) {
    extern __shared__ __align__(128) real memory[];  // see linear_in_halves_tile.cuh
    __shared__ Own owns[MULTIPLIERS];
    __shared__ int tiles_of[MOST_COMPONENTS + 1];  // not in registers, of which those that copy have few
    const int t = threadIdx.x, warp = number_of_warp(), group = warp / WARPS;
    if (t < MULTIPLIERS) {
        for (int n = 0; n < STAGES; n++) {
            barrier_init(owns[t].slots.full[n], 1 + 32);
            barrier_init(owns[t].slots.empty[n], READER * WARPS);
        }
        barrier_init(owns[t].together, THREADS);
        fence_for_engines();
    }
    if (t == 0) count_tiles(rows, tiles_of);
    __syncthreads();
    if (group == MULTIPLIERS) {
        leave_registers<FEW_REGISTERS>();
        const int of = warp % WARPS;
        if (of < MULTIPLIERS) all_tiles<true>(of, x, halves, rows, out, memory, owns[of], tiles_of);
    } else {
        take_registers<MANY_REGISTERS>();
        all_tiles<false>(group, x, halves, rows, out, memory, owns[group], tiles_of);
        wait_for_groups<0>();  // shared memory must outlive its copies
    }
}
