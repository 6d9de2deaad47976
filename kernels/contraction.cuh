// What the kernels of the symmetric contraction share: numbers with tangents, rows of features, weights of
// a node. The maths is in contraction.cu. Included by plan.cuh, which has the sizes and then the polynomials.
#pragma once

#define UNROLL _Pragma("unroll")
#define STRIDE (COMPONENTS | 1)  // of rows in shared memory: odd, so that lanes are in different banks
#define CHUNKS ((CHANNELS + THREADS - 1) / THREADS)

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

// The features of `count` channels that follow one another, from `first` on, a thread each. They are moved
// in the order of memory, through shared memory. All threads of the block take part.
__device__ __forceinline__ void fetch_rows(real (&to)[COMPONENTS], real* staged, const real* rows, long long first, int count) {
    const real* from = rows + first * COMPONENTS;
    __syncthreads();
    for (int n = threadIdx.x; n < count * COMPONENTS; n += THREADS)
        staged[n / COMPONENTS * STRIDE + n % COMPONENTS] = __ldg(from + n);
    __syncthreads();
    if ((int)threadIdx.x < count)
        UNROLL for (int i = 0; i < COMPONENTS; i++) to[i] = staged[threadIdx.x * STRIDE + i];
}

__device__ __forceinline__ void fetch(number (&f)[COMPONENTS], real* staged, const real* x, const real* hx, long long first, int count) {
    real v[COMPONENTS] = {}, d[COMPONENTS] = {};
    fetch_rows(v, staged, x, first, count);
    if (hx) fetch_rows(d, staged, hx, first, count);
    UNROLL for (int i = 0; i < COMPONENTS; i++) f[i] = number_of(v[i], d[i]);
}

// w[q] = sum over the species s of a node: attrs[node,s] * weights[s, path q of the pass, channel]
template <class P>
__device__ __forceinline__ void weights_of(number (&w)[P::PATHS], const P& pass, const real* weights, const real* hweights,
                                           const real* attrs, const int* species, int kinds, long long node, int channel) {
    const int own = __ldg(species + node);
    const int end = own < kinds ? own + 1 : kinds;  // a node of no single species has `kinds` for one
    UNROLL for (int q = 0; q < P::PATHS; q++) w[q] = number{};
    for (int s = own < kinds ? own : 0; s < end; s++) {
        const real a = attrs ? __ldg(attrs + node * kinds + s) : (real)1;
        if (a == 0) continue;
        UNROLL for (int q = 0; q < P::PATHS; q++) {
            const long long at = ((long long)s * PATHS_OF_ALL + pass.path(q).weight) * CHANNELS + channel;
            w[q] = multiply_add(a, number_of(__ldg(weights + at), hweights ? __ldg(hweights + at) : (real)0), w[q]);
        }
    }
}
