// MACE's symmetric contraction: polynomials in a channel's features, weighted by the node's species.
//
//   out[n,c,m] = sum_p w[n,p,c] * B_p,m(x[n,c])             w[n,p,c] = sum_s attrs[n,s] * weights[s,p,c]
//   dx[n,c,i]  = d/dx_i of sum_p,m y_p,m B_p,m(x[n,c])      y_p,m = w[n,p,c] * g[n,c,m]
//   dweights[s,p,c] = sum_n attrs[n,s] * sum_m g[n,c,m] B_p,m(x[n,c])
//
// B are independent polynomials that span MACE's couplings, written in quadratic covariants of x where that
// takes fewer multiply-adds (contraction_factors.py): 61 polynomials in 430 where MACE has 0e+1o from
// 0e+1o+2e+3o to the third degree. plan.cuh has them as code: `polynomials` hands over each when it is complete,
// `gradient` asks for the factor of each when it comes to it, so that few numbers are in registers at the
// same time. Coefficients are immediates; what is too long for a compiler runs from tables
// (contraction_tables.cuh).
//
// Forward and dx: a thread owns a channel, of `each` nodes one after the other; a block has GROUP nodes at a
// time, with a TEAM of threads for the channels of each. Nodes come in the order of their species: those that
// are together share weights, which the first-level cache keeps. Both read x once; b (in + out) per channel,
// and a few hundred multiply-adds: bound by arithmetic, or by the fetching of so long a code, which is
// less where the warps of a block stay together (TOGETHER).
// For dweights a block owns a species, TEAM channels and a share of the species' nodes, in `order`: a sum
// for each share, to be added up in a fixed order. Nothing is atomic. A node of several species is in a list
// of its own, which every species goes through; first[kinds] is where it starts. Forward and dx do such a node
// once for each of its species.
//
// Second derivatives are the same code in dual numbers (TANGENT): with (hx, hweights) the gradients of
// (dx, dweights), those by (g, x, weights) are the derivatives of (out, dx, dweights) in that direction.
// Either may be absent. Nothing but operands is saved: recomputing costs less than reading.

#include "plan.cuh"

// Where component k of a channel's result lies.
__device__ __forceinline__ long long place(int k, long long node, int channel) {
    return node * (CHANNELS * OUTPUTS) + PLACE[k].offset + channel * PLACE[k].stride + PLACE[k].m;
}

// Which of a block's nodes and which channel a thread has; threads that have none do another's work with it,
// since there may be barriers, and write nothing.
struct Seat {
    int node, channel;
    bool idle;

    __device__ __forceinline__ Seat() {
        const int thread = min((int)threadIdx.x, GROUP * TEAM - 1);
        node = thread / TEAM;
        channel = min((int)blockIdx.y * TEAM + thread % TEAM, CHANNELS - 1);
        idle = (int)threadIdx.x >= GROUP * TEAM || (int)blockIdx.y * TEAM + thread % TEAM >= CHANNELS;
    }
};

#if FORWARD
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
contraction_forward(const real* __restrict__ x, const real* __restrict__ weights, const real* __restrict__ attrs,
                    const int* __restrict__ species, const int* __restrict__ order, const real* __restrict__ hx,
                    const real* __restrict__ hweights, long long nodes, int kinds, int each, real* __restrict__ out) {
    const Seat seat;
    long long base = (long long)blockIdx.x * each * GROUP;
    for (const long long end = min(base + (long long)each * GROUP, nodes); base < end; base += GROUP) {
        const Node node(min(base + seat.node, nodes - 1), order, species, kinds);
        real total[OUTPUTS] = {};
        for (int s = node.species; more(s < node.end); s++) {
            const real a = node.share(s, attrs, kinds);
            if (!TOGETHER && a == 0) continue;
            const Weights w(weights, hweights, min(s, node.end - 1), seat.channel);
            number f[COMPONENTS], sums[OUTPUTS];
            fetch(f, x, hx, node.number * CHANNELS + seat.channel);
            UNROLL for (int k = 0; k < OUTPUTS; k++) sums[k] = number{};
            each_pass([&](auto pass) {
                pass.polynomials(f, [&](int r, number b) {
                    number& sum = sums[pass.row(r).out];
                    sum = multiply_add(w[pass.row(r).weight], b, sum);
                });
                forget_all(f);
            });
            UNROLL for (int k = 0; k < OUTPUTS; k++) total[k] = multiply_add(a, result_of(sums[k]), total[k]);
        }
        if (seat.idle || base + seat.node >= nodes) continue;
        UNROLL for (int k = 0; k < OUTPUTS; k++) store_once(out + place(k, node.number, seat.channel), total[k]);
    }
}
#endif

#if FEATURES
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
contraction_features(const real* __restrict__ x, const real* __restrict__ weights, const real* __restrict__ attrs,
                     const int* __restrict__ species, const int* __restrict__ order, const real* __restrict__ hx,
                     const real* __restrict__ hweights, const real* __restrict__ grad, long long nodes, int kinds,
                     int each, real* __restrict__ dx) {
    const Seat seat;
    long long base = (long long)blockIdx.x * each * GROUP;
    for (const long long end = min(base + (long long)each * GROUP, nodes); base < end; base += GROUP) {
        const Node node(min(base + seat.node, nodes - 1), order, species, kinds);
        const long long column = node.number * CHANNELS + seat.channel;
        number sums[COMPONENTS];
        UNROLL for (int i = 0; i < COMPONENTS; i++) sums[i] = number{};
        for (int s = node.species; more(s < node.end); s++) {
            const real a = node.share(s, attrs, kinds);
            if (!TOGETHER && a == 0) continue;
            const Weights w(weights, hweights, min(s, node.end - 1), seat.channel);
            number f[COMPONENTS];
            fetch(f, x, hx, column);
            real g[OUTPUTS];
            UNROLL for (int k = 0; k < OUTPUTS; k++) g[k] = a * __ldg(grad + place(k, node.number, seat.channel));
            each_pass([&](auto pass) {
                pass.gradient(f, [&](int r) { return multiply(g[pass.row(r).out], w[pass.row(r).weight]); }, sums);
                forget_all(f);
            });
        }
        if (seat.idle || base + seat.node >= nodes) continue;
        real results[COMPONENTS];
        UNROLL for (int i = 0; i < COMPONENTS; i++) results[i] = result_of(sums[i]);
        store_row(dx + column * COMPONENTS, results);
    }
}
#endif

#if WEIGHTS
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
contraction_weights(const real* __restrict__ x, const real* __restrict__ attrs, const int* __restrict__ order,
                    const int* __restrict__ starts, const real* __restrict__ hx, const real* __restrict__ grad,
                    int kinds, real* __restrict__ dweights) {
    const int s = blockIdx.x / CHUNKS, first = blockIdx.x % CHUNKS * TEAM, channel = first + threadIdx.x;
    if ((int)threadIdx.x >= TEAM || channel >= CHANNELS) return;
    only_pass(blockIdx.z, [&](auto pass) {
        typedef decltype(pass) P;
        number sums[P::PATHS];
        UNROLL for (int q = 0; q < P::PATHS; q++) sums[q] = number{};
        for (int list = 0; list < 2; list++) {  // nodes of this species alone, then those of several
            const int* bounds = starts + (list ? kinds : s);
            const long long all = bounds[1] - bounds[0];
            const int end = bounds[0] + (int)(all * (blockIdx.y + 1) / gridDim.y);
            for (int t = bounds[0] + (int)(all * blockIdx.y / gridDim.y); t < end; t++) {
                const long long node = order[t];
                const real a = attrs ? __ldg(attrs + node * kinds + s) : (real)1;
                if (a == 0) continue;
                number f[COMPONENTS];
                fetch(f, x, hx, node * CHANNELS + channel);
                real g[OUTPUTS];
                UNROLL for (int k = 0; k < OUTPUTS; k++) g[k] = a * __ldg(grad + place(k, node, channel));
                pass.polynomials(f, [&](int r, number b) {
                    number& sum = sums[pass.row(r).path];
                    sum = multiply_add(g[pass.row(r).out], b, sum);
                });
            }
        }
        real* to = dweights + ((long long)blockIdx.y * kinds + s) * PATHS_OF_ALL * CHANNELS + channel;
        UNROLL for (int q = 0; q < P::PATHS; q++) store_once(to + (long long)pass.path(q).weight * CHANNELS, result_of(sums[q]));
    });
}
#endif
