// What the kernels of the symmetric contraction share: numbers with tangents, rows of features, weights of
// a node. The maths is in contraction.cu. Included by plan.cuh, which has the sizes and then the polynomials.
#pragma once

#define UNROLL _Pragma("unroll")
#define WIDTH (16 / (int)sizeof(real))

// Component k of channel c: at offset + c * stride + m of a row of results.
struct Place {
    int offset, stride, m;
};
// A polynomial with 2l+1 = width components: its weight, its output's first component, its first row.
struct Path {
    int weight, width, out, row;
};

// A component of a polynomial: its path within the pass, and the component of the output.
struct Row {
    int path, out;
};

// A value and its derivative in one direction: what is written for values computes derivatives with these.
struct Dual {
    real v, d;
};

__device__ __forceinline__ real multiply(real a, real b) { return a * b; }
__device__ __forceinline__ Dual multiply(real a, Dual b) { return {a * b.v, a * b.d}; }
__device__ __forceinline__ Dual multiply(Dual a, Dual b) { return {a.v * b.v, multiply_add(a.v, b.d, a.d * b.v)}; }
__device__ __forceinline__ Dual multiply_add(real a, Dual b, Dual c) {
    return {multiply_add(a, b.v, c.v), multiply_add(a, b.d, c.d)};
}
__device__ __forceinline__ Dual multiply_add(Dual a, Dual b, Dual c) {
    return {multiply_add(a.v, b.v, c.v), multiply_add(a.v, b.d, multiply_add(a.d, b.v, c.d))};
}
__device__ __forceinline__ real add(real a, real b) { return a + b; }
__device__ __forceinline__ Dual add(Dual a, Dual b) { return {a.v + b.v, a.d + b.d}; }

#if TANGENT
typedef Dual number;
__device__ __forceinline__ number number_of(real v, real d) { return {v, d}; }
__device__ __forceinline__ real result_of(number a) { return a.d; }
#else
typedef real number;
__device__ __forceinline__ number number_of(real v, real) { return v; }
__device__ __forceinline__ real result_of(number a) { return a; }
#endif

// The compiler takes what it knows of a number for lost. Without it monomials of one pass would be kept for
// the next, in more registers than there are.
__device__ __forceinline__ void forget(float& a) {
#ifndef E3NN_ACCEL_HOST
    asm("" : "+f"(a));
#endif
}
__device__ __forceinline__ void forget(double& a) {
#ifndef E3NN_ACCEL_HOST
    asm("" : "+d"(a));
#endif
}
__device__ __forceinline__ void forget(Dual& a) {
    forget(a.v);
    forget(a.d);
}

template <class T, int N>
__device__ __forceinline__ void forget_all(T (&f)[N]) {
    UNROLL for (int i = 0; i < N; i++) forget(f[i]);
}

// Sections of the generated code begin by this: warps that stay together share what is fetched of it.
__device__ __forceinline__ void stay_together() {
#if TOGETHER
    __syncthreads();
#endif
}

// A channel's numbers are contiguous: 16 bytes at a time, where rows are a multiple of that. Lanes are apart by a
// row, and the first-level cache keeps the rest of a line for the loads that follow at once.
struct alignas(16) Wide {
    real of[WIDTH];
};

__device__ __forceinline__ void load_row(real (&to)[COMPONENTS], const real* row) {
    if constexpr (COMPONENTS % WIDTH == 0)
        UNROLL for (int i = 0; i < COMPONENTS / WIDTH; i++) {
            const Wide wide = reinterpret_cast<const Wide*>(row)[i];
            UNROLL for (int k = 0; k < WIDTH; k++) to[i * WIDTH + k] = wide.of[k];
        }
    else
        UNROLL for (int i = 0; i < COMPONENTS; i++) to[i] = __ldg(row + i);
}

__device__ __forceinline__ void store_row(real* row, const real (&from)[COMPONENTS]) {
    if constexpr (COMPONENTS % WIDTH == 0)
        UNROLL for (int i = 0; i < COMPONENTS / WIDTH; i++) {
            Wide wide;
            UNROLL for (int k = 0; k < WIDTH; k++) wide.of[k] = from[i * WIDTH + k];
            reinterpret_cast<Wide*>(row)[i] = wide;
        }
    else
        UNROLL for (int i = 0; i < COMPONENTS; i++) row[i] = from[i];
}

__device__ __forceinline__ void fetch(number (&f)[COMPONENTS], const real* x, const real* hx, long long column) {
    real v[COMPONENTS], d[COMPONENTS] = {};
    load_row(v, x + column * COMPONENTS);
    if (hx) load_row(d, hx + column * COMPONENTS);
    UNROLL for (int i = 0; i < COMPONENTS; i++) f[i] = number_of(v[i], d[i]);
}

// A node, and the factor of its weights.
struct Node {
    long long number;
    int species;  // `kinds` of a node of no single species
    real scale;
};

__device__ __forceinline__ Node node_at(long long position, const int* order, const int* species, const real* attrs, int kinds) {
    const long long number = __ldg(order + position);
    const int own = __ldg(species + number);
    return {number, own, attrs && own < kinds ? __ldg(attrs + number * kinds + own) : (real)1};
}

// w[q] * scale = sum over the species s of a node: attrs[node,s] * weights[s, path q of the pass, channel]
template <class P>
__device__ __forceinline__ void weights_of(number (&w)[P::PATHS], const P& pass, const real* weights, const real* hweights,
                                           const real* attrs, int kinds, const Node& node, int channel) {
    const long long of_species = (long long)PATHS_OF_ALL * CHANNELS;
    weights += channel;
    if (hweights) hweights += channel;
    if (node.species < kinds) {
        weights += node.species * of_species;
        if (hweights) hweights += node.species * of_species;
        UNROLL for (int q = 0; q < P::PATHS; q++) {
            const int at = pass.path(q).weight * CHANNELS;
            w[q] = number_of(__ldg(weights + at), hweights ? __ldg(hweights + at) : (real)0);
        }
        return;
    }
    UNROLL for (int q = 0; q < P::PATHS; q++) w[q] = number{};
    for (int s = 0; s < kinds; s++, weights += of_species, hweights += hweights ? of_species : 0) {
        const real a = __ldg(attrs + node.number * kinds + s);
        if (a == 0) continue;
        UNROLL for (int q = 0; q < P::PATHS; q++) {
            const int at = pass.path(q).weight * CHANNELS;
            w[q] = multiply_add(a, number_of(__ldg(weights + at), hweights ? __ldg(hweights + at) : (real)0), w[q]);
        }
    }
}
