// The gradient of the weights of o3.Linear of many rows in float32, on Hopper, by halves (halves.cuh):
//
//   dW_p[u,w] = c_p * sum over nodes n, components k:  x[n,u,k] * g[n,w,k]
//
// Who owns what. A block owns TILE u by COLUMNS w of a path, and so many steps of the rows: each STEPS times the nodes whose components fit
// in the 16 numbers that tensor cores sum over (CHUNK), the rest of which are zero. Its two warpgroups multiply 64 u each. They have
// x's halves in registers; g's, which both need, go to shared memory, where 16 lanes and their neighbours by 16 cut a column of a
// chunk each. A second lot of these halves makes one barrier a step enough. Other blocks of the multiprocessor multiply while one cuts, which
// takes about as long. Rows come by bulk copies, STAGES steps ahead, which all warps ask for while tensor cores are at work.
//
// Powers of two. Numbers of a u, and of a w, are multiplied by one power of two of their own, that of the largest of them so far: where
// a step has a larger one, what has been summed is multiplied by what lies between the two. So a step's sums are added as they are.
// A product is wrong by 2^-23 of itself, or 2^-39 of that of the largest numbers, as in linear_in_halves.cu.
//
// Every block writes its sums where nobody else does; sum_of_blocks adds those of a tile up, in a fixed order: the same bits each time.
// Bytes, 4 to a number: N (x ceil(columns / COLUMNS) + g ceil(channels / TILE)), and twice a tile for each block.
//
// plan.cuh: IN_ROW, OUT_ROW; COLUMNS; PATH; ITEM = {path, first u, first w}, those of fewer components first; DIMS, for each number of
// components that there is: it, its first item, and how many it has; LEFT_ROOM, RIGHT_ROOM, what x and g of a slot take.
// TRANSPOSED: x and g have changed places, where x has few channels, and W's rows are columns.

#include "plan.cuh"
#include "linear_weights_in_halves.cuh"
#include "pipeline.cuh"
#include "warpgroups.cuh"

#ifndef TRANSPOSED
#define TRANSPOSED 0
#endif
constexpr int WARPS = THREADS / 32, BLOCKS = 2, STAGES = 2;
constexpr int SLOT = LEFT_ROOM + RIGHT_ROOM, HALVES = STEPS * WORDS_OF_A_STEP<ACROSS>, LOTS = 2;
constexpr int WARPS_THAT_CUT = COLUMNS / 16;  // g
static_assert(SLOT % 32 == 0, "halves begin as tensor cores read them");

struct Shared {
    Barrier full[STAGES];
    alignas(16) real factor[LOTS][COLUMNS];  // of what has been summed of a column
    alignas(16) real power[COLUMNS];         // in the end
};

// What a block sums: so many rows.
struct Share {
    const real *x, *grad;  // of the first
    int rows, left_bytes, right_bytes;  // of a node
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

// Blocks of a number of components have its tiles of the first rows, then those of the next.
__device__ __forceinline__ int slices_of(int dim, long long rows, int steps) {
    const unsigned nodes = STEPS * (CHUNK / dim), in_all = (unsigned)((rows + nodes - 1) / nodes);
    return (int)((in_all + steps - 1) / steps);
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
#define OF_DIM(DIM, FIRST, HERE)                                                                                                       \
    {                                                                                                                                  \
        const int blocks = HERE * slices_of(DIM, rows, steps);                                                                         \
        if (block < blocks) {                                                                                                          \
            const Item item = ITEM[FIRST + block % HERE];                                                                              \
            const Path path = PATH[item.path];                                                                                         \
            const long long each = (long long)steps * NODES<DIM>, begin = block / HERE * each;                                         \
            const int of_channel = DIM * sizeof(real);                                                                                 \
            const Share of = {x + begin * IN_ROW + path.in + item.u * DIM, grad + begin * OUT_ROW + path.out + item.w * DIM,           \
                              (int)min(rows - begin, each), min(TILE, path.channels - item.u) * of_channel,                            \
                              min(COLUMNS, path.columns - item.w) * of_channel};                                                       \
            return sum<DIM>(of, memory, s, sums_of_blocks + (long long)blockIdx.x * (TILE * COLUMNS));                                 \
        }                                                                                                                              \
        block -= blocks;                                                                                                               \
    }
    DIMS(OF_DIM)
}

// A block adds up 128 numbers of a tile, those of every so manyth block in each warp, four to a lane, and then what its warps have.
extern "C" __global__ void __launch_bounds__(THREADS)
sum_of_blocks(const real* __restrict__ sums_of_blocks, long long rows, int steps, real* __restrict__ weights) {
    constexpr int of_tile = TILE * COLUMNS;
    __shared__ float4 of_warps[WARPS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, number = blockIdx.x / COLUMNS, at = blockIdx.x % COLUMNS * 128 + lane * 4;
    long long first = at, next = 0;
    int slices = 0;
#define FIND(DIM, FIRST, HERE)                                                  \
    if (number >= FIRST && number < FIRST + HERE) {                             \
        slices = slices_of(DIM, rows, steps), next = (long long)HERE * of_tile; \
        first += (long long)(number - FIRST) * of_tile;                         \
    } else if (number >= FIRST + HERE)                                          \
        first += (long long)HERE * slices_of(DIM, rows, steps) * of_tile;
    DIMS(FIND)
    float4 sum = {};
    auto add = [&](const float4& of) { sum.x += of.x, sum.y += of.y, sum.z += of.z, sum.w += of.w; };
#pragma unroll 4
    for (int slice = warp; slice < slices; slice += WARPS) add(*reinterpret_cast<const float4*>(sums_of_blocks + first + slice * next));
    of_warps[warp][lane] = sum;
    __syncthreads();
    if (warp > 0) return;
    for (int other = 1; other < WARPS; other++) add(of_warps[other][lane]);
    const Item item = ITEM[number];
    const Path path = PATH[item.path];
    const int u = item.u + at / COLUMNS, w = item.w + at % COLUMNS;
    if (u >= path.channels || w >= path.columns) return;
    const int of_next = TRANSPOSED ? path.channels : 1;
    real* to = weights + path.weight + (TRANSPOSED ? w * path.channels + u : u * path.columns + w);
    to[0] = path.scale * sum.x, to[of_next] = path.scale * sum.y, to[2 * of_next] = path.scale * sum.z, to[3 * of_next] = path.scale * sum.w;
}
