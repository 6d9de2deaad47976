// MACE's radial embedding, Bessel functions times a polynomial cutoff, of edge lengths r, with x = r / r_max:
//
//   R_n(r) = c sin(w_n r) / r * f(r),   f = 1 - (p+1)(p+2)/2 x^p + p(p+2) x^(p+1) - p(p+1)/2 x^(p+2) where r < r_max, else 0
//
// f is computed as (1-x)^3 (1 + 3 x + 6 x^2 + .. + p(p+1)/2 x^(p-1)), which is the same and has nothing to cancel near
// the cutoff, where MACE's sum has no digits left; f' is -p(p+1)(p+2)/2 x^(p-1) (1-x)^2 / r_max.
//
// Who owns what: forward, a thread a number of the result, which is written in full lines (BASIS threads compute the
// same f, p multiply-adds); backward and second derivatives, a thread an edge, whose BASIS numbers are a
// contiguous piece of a line. w, c, r_max and p are read where the module has them. Numbers for E edges and B
// functions: forward E (1 + B), backward E (2 + B), second derivatives E (3 + 2 B).

#include "plan.cuh"  // BASIS, EXPONENT (the type that p is kept in), THREADS
#include "real.cuh"

struct SineCosine {
    real s, c;
};
__device__ __forceinline__ SineCosine sine_cosine(real a) {
    SineCosine out;
    if constexpr (sizeof(real) == 4) sincosf(a, (float*)&out.s, (float*)&out.c);
    else sincos(a, (double*)&out.s, (double*)&out.c);
    return out;
}

// The cutoff function and its derivatives by r.
struct Cutoff {
    real f, df, ddf;

    __device__ __forceinline__ Cutoff(real r, real r_max, int p) {
        f = df = ddf = r - r;  // zero, or NaN where r is no number
        if (!(r < r_max)) return;
        const real x = r / r_max, rest = (r_max - r) / r_max;
        real sum = 0, power = 0, before = 0;  // x^(p-1), x^(p-2)
        for (int k = p; k > 0; k--) {
            sum = sum * x + (real)(k * (k + 1) / 2);
            before = power;
            power = k == p ? (real)1 : power * x;
        }
        const real slope = -(real)0.5 * (real)p * (real)(p + 1) * (real)(p + 2) / r_max;
        f = rest * rest * rest * sum;
        df = slope * power * rest * rest;
        ddf = slope / r_max * rest * ((real)(p - 1) * before * rest - 2 * power);
    }
};

// sin(w r) / r and its derivatives by r.
struct Bessel {
    real b, db, ddb;

    __device__ __forceinline__ Bessel(real w, real r) {
        const SineCosine of = sine_cosine(w * r);
        b = of.s / r;
        db = (w * of.c - b) / r;
        ddb = -(w * w * of.s + 2 * db) / r;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS)
radial(const real* __restrict__ lengths, const real* __restrict__ weights, const real* __restrict__ prefactor,
       const real* __restrict__ r_max, const EXPONENT* __restrict__ p, long long edges, real* __restrict__ out) {
    const long long n = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (n >= edges * BASIS) return;
    const real r = lengths[n / BASIS];
    out[n] = *prefactor * (sine_cosine(weights[n % BASIS] * r).s / r) * Cutoff(r, *r_max, (int)*p).f;
}

extern "C" __global__ void __launch_bounds__(THREADS)
radial_gradient(const real* __restrict__ g, const real* __restrict__ lengths, const real* __restrict__ weights,
                const real* __restrict__ prefactor, const real* __restrict__ r_max, const EXPONENT* __restrict__ p,
                long long edges, real* __restrict__ out) {
    const long long edge = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (edge >= edges) return;
    const real r = lengths[edge];
    const Cutoff cutoff(r, *r_max, (int)*p);
    real sum = 0;
#pragma unroll 1
    for (int n = 0; n < BASIS; n++) {
        const Bessel bessel(weights[n], r);
        sum += g[edge * BASIS + n] * (bessel.db * cutoff.f + bessel.b * cutoff.df);
    }
    out[edge] = *prefactor * sum;
}

// In the direction h of lengths: dg = R' h, and dr = <g, R''> h. What isn't wanted is a null pointer.
extern "C" __global__ void __launch_bounds__(THREADS)
radial_second(const real* __restrict__ g, const real* __restrict__ lengths, const real* __restrict__ h,
              const real* __restrict__ weights, const real* __restrict__ prefactor, const real* __restrict__ r_max,
              const EXPONENT* __restrict__ p, long long edges, real* __restrict__ dg, real* __restrict__ dr) {
    const long long edge = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (edge >= edges) return;
    const real r = lengths[edge], scale = *prefactor * h[edge];
    const Cutoff cutoff(r, *r_max, (int)*p);
    real sum = 0;
#pragma unroll 1
    for (int n = 0; n < BASIS; n++) {
        const Bessel bessel(weights[n], r);
        if (dg) dg[edge * BASIS + n] = scale * (bessel.db * cutoff.f + bessel.b * cutoff.df);
        sum += g[edge * BASIS + n] * (bessel.ddb * cutoff.f + 2 * bessel.db * cutoff.df + bessel.b * cutoff.ddf);
    }
    if (dr) dr[edge] = scale * sum;
}
