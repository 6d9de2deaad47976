// What a block of a linear by halves does with its tile. See linear_in_halves.cu.
#pragma once

#include "async_copy.cuh"
#include "halves.cuh"
#include "linear_in_halves_ring.cuh"
#include "linear_in_halves_tile.cuh"
#include "overlapping.cuh"
#include "warpgroups.cuh"

// A block's work on these rows for item `number`. MIXED: they may have any of the tile's species, each with a scalar of its own.
template <int DIM, bool MIXED>
__device__ __forceinline__ void tile_of(int number, const Rows rows, const real* __restrict__ x, const real* halves,
                                        real* __restrict__ out, real* memory) {
    constexpr int dim = DIM, nodes = ROWS / dim, pitch = PITCH<DIM>;
    const int t = threadIdx.x, lane = t % 32, count = rows.count;
    const Item item = ITEM[number];
    const Path to = PATH[item.first];

    // What this thread copies of x, step by step along a path's channels: the same part of some nodes' channels, so that
    // all but one address are constants away.
    constexpr int PARTS = DEPTH * dim / TOGETHER, AT_ONCE = THREADS / PARTS, LEFT_COPIES = (nodes + AT_ONCE - 1) / AT_ONCE;
    const int first_node = t / PARTS, at = t % PARTS * TOGETHER;
#if SORTED
    int left_from;  // in a row
#else
    const real* left_from;
#endif
    RightCopies right_copies;
    right_copies.begin(halves + (long long)item.chunk * SLICE);
    struct Place {
        int path, channel, channels;
    } step = {item.first, 0, to.channels}, ahead = step;
    auto advance = [&](Place& step) {
        step.channel += DEPTH;
        if (step.channel < step.channels) return;
        step.channel = 0;
        if (++step.path < item.end) step.channels = PATH[step.path].channels;
    };
    // What step n from this one on takes, if there is one.
    auto fetch = [&](real* left, int n) {
        if (ahead.path >= item.end) return;
#if SORTED
        if (ahead.channel == 0) left_from = PATH[ahead.path].in + at;
        auto from = [&](int i) { return x + rows[first_node + i * AT_ONCE] * IN_ROW + left_from; };
#else
        if (ahead.channel == 0) left_from = x + rows[first_node] * IN_ROW + PATH[ahead.path].in + at;
        auto from = [&](int i) { return left_from + i * AT_ONCE * IN_ROW; };
#endif
        const int valid = WHOLE_CHANNELS ? TOGETHER : min(max((ahead.channels - ahead.channel) * dim - at, 0), TOGETHER);
#pragma unroll
        for (int i = 0; i < LEFT_COPIES; i++) {
            const int node = first_node + i * AT_ONCE;
            if (first_node < AT_ONCE && node < count)
                copy_async<TOGETHER>(left + node * pitch + at, valid ? from(i) : x, valid);
        }
        left_from += DEPTH * dim;
        if (n == 0) wait_for_end_of_last();
        right_copies.ask(left + LEFT_ROOM, WARPGROUPS ? n % (STAGES - 1) : n);
        advance(ahead);
    };

    int begins[DOWN][2];
    own_begins<DIM>(count, begins);
    real sums[DOWN][ACROSS][4] = {};
    // Where MIXED: of the species that is summed over, the rows' scalars and the columns' powers.
    real factor[DOWN][2];
    const real* own_powers;
    unsigned any_low[DOWN][2] = {};
    auto halved_rows = [&](const real* left, real constant, int i, HalvedRows& to) {
        unsigned exponents[2];
        halve_rows<DIM>(left, begins[i], to, exponents);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if constexpr (MIXED)
                to.scale[half] = constant * factor[i][half] * __uint_as_float(exponents[half]);
            else
                to.scale[half] = constant * power_down(exponents[half]);
        }
        gather_low(to.low, any_low[i]);
    };
    // Adds a step's sums, of columns of group j.
    auto add_chain = [&](const real (&chain)[4], const HalvedRows& of, int i, int j) {
        float2 power;
        if constexpr (MIXED) power = *reinterpret_cast<const float2*>(own_powers + j / 2 * 16 + j % 2 * 2);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            real sum = chain[n];
            if constexpr (MIXED) sum *= power_down(__float_as_uint(n % 2 ? power.y : power.x));
            sums[i][j][n] = multiply_add(of.scale[n / 2], sum, sums[i][j][n]);
        }
    };
    auto multiply = [&](const real* left, const real* right, real constant) {
#if WARPGROUPS
        static_assert(STEPS == 2, "as products_of_warpgroup takes them");
#pragma unroll
        for (int i = 0; i < DOWN; i++) {
            HalvedRows of;
            halved_rows(left, constant, i, of);
#pragma unroll
            for (int first = 0; first < ACROSS; first += COLUMNS_AT_ONCE / 8) {
                real chains[COLUMNS_AT_ONCE / 8][4];
                products_of_warpgroup<ACROSS>(chains, of.high, of.low, reinterpret_cast<const unsigned*>(right) + first * 32);
#pragma unroll
                for (int j = 0; j < COLUMNS_AT_ONCE / 8; j++) add_chain(chains[j], of, i, first + j);
            }
        }
#else
        HalvedRows of[DOWN];
#pragma unroll
        for (int i = 0; i < DOWN; i++) halved_rows(left, constant, i, of[i]);
#pragma unroll
        for (int j = 0; j < ACROSS; j++) {
            Pairs b[STEPS];
#pragma unroll
            for (int step = 0; step < STEPS; step++) b[step] = reinterpret_cast<const Pairs*>(right)[(step * ACROSS + j) * 32 + lane];
#pragma unroll
            for (int i = 0; i < DOWN; i++) {
                real chain[4] = {};
                add_products(chain, of[i].high, of[i].low, b);
                add_chain(chain, of[i], i, j);
            }
        }
#endif
    };

    RingSlots slots(memory);
    auto sum_over_channels = [&] {
        slots.begin();
        real constant = to.scale;
#pragma unroll
        for (int n = 0; n < STAGES - 1; n++) {
            fetch(slots[n], n);
            close_copies();
        }
        while (step.path < item.end) {
            wait_for_copies<STAGES - 2>();
            right_copies.wait_here();
            __syncthreads();
            fetch(slots[STAGES - 1], STAGES - 1);
            close_copies();
            const real* left = slots[0];
            multiply(left, left + LEFT_ROOM, constant);
            slots.next(), right_copies.next();
            advance(step);
            if (step.channel == 0 && step.path < item.end) constant = PATH[step.path].scale;
        }
    };
    bool two_products = WHOLE_CHANNELS;
    for (int path = item.first; !WHOLE_CHANNELS && path < item.end; path++) two_products |= PATH[path].channels > CHUNK;
#if SORTED
    if constexpr (MIXED) {
        for (int species = 0; (species = next_species(rows.tile, species, SPECIES)) < SPECIES; species++) {
#pragma unroll
            for (int i = 0; i < DOWN; i++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    factor[i][half] = rows.attrs[rows[min(own_row(i, half) / dim, count - 1)] * SPECIES + species];
            own_powers = powers_in(halves + species * OF_SPECIES, number);
            right_copies.begin(halves + species * OF_SPECIES + (long long)item.chunk * SLICE);
            step = ahead = {item.first, 0, to.channels};
            sum_over_channels();
            __syncthreads();
        }
        wait_for_end_of_last();  // of rows without a species, which nobody has waited for yet
        make_up(sums, any_low, two_products);
    } else {
        sum_over_channels();
        make_up(sums, any_low, two_products);
#pragma unroll
        for (int i = 0; i < DOWN; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const real factor = rows.tile.factor[min(own_row(i, half) / dim, count - 1)];
#pragma unroll
                for (int j = 0; j < ACROSS; j++) sums[i][j][2 * half] *= factor, sums[i][j][2 * half + 1] *= factor;
            }
    }
#else
    sum_over_channels();
    make_up(sums, any_low, two_products);
#endif
    if constexpr (!MIXED) multiply_by_powers(sums, powers_in(halves, number));
    write_results<DIM>(sums, rows, to, item.column, out, memory);
}
