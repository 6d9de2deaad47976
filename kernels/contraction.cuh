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

// A component of a polynomial: its path within the pass, the path's weight, and the component of the output.
struct Row {
    int path, weight, out;
};

#include "dual.cuh"

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

// A node, and those species that it may be of: its own, or all.
struct Node {
    long long number;
    int species, end;

    __device__ __forceinline__ Node(long long position, const int* order, const int* of, int kinds) {
        number = __ldg(order + position);
        const int own = __ldg(of + number);  // `kinds` of a node of no single species
        species = own < kinds ? own : 0;
        end = own < kinds ? own + 1 : kinds;
    }

    // How much of species s there is in it.
    __device__ __forceinline__ real share(int s, const real* attrs, int kinds) const {
        return s >= end ? (real)0 : attrs ? __ldg(attrs + number * kinds + s) : (real)1;
    }
};

// Whether a thread has species left, or one of those has that it stays together with.
__device__ __forceinline__ bool more(bool mine) {
#if TOGETHER
    return __syncthreads_or(mine);
#else
    return mine;
#endif
}

// A species' weights of a channel, each loaded where it is needed: all at once would take as many registers.
struct Weights {
    const real *value, *direction;

    __device__ __forceinline__ Weights(const real* weights, const real* hweights, int species, int channel) {
        const long long at = (long long)species * PATHS_OF_ALL * CHANNELS + channel;
        value = weights + at;
        direction = hweights ? hweights + at : hweights;
    }
    __device__ __forceinline__ number operator[](int n) const {
        return number_of(__ldg(value + n * CHANNELS), direction ? __ldg(direction + n * CHANNELS) : (real)0);
    }
};
