// A value and its derivative in one direction: what is written for values computes derivatives with these.
#pragma once

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

__device__ __forceinline__ Dual operator+(Dual a, Dual b) { return add(a, b); }
__device__ __forceinline__ Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.d - b.d}; }
__device__ __forceinline__ Dual operator*(Dual a, Dual b) { return multiply(a, b); }
__device__ __forceinline__ Dual operator*(real a, Dual b) { return multiply(a, b); }
__device__ __forceinline__ Dual operator/(Dual a, Dual b) {
    const real quotient = a.v / b.v;
    return {quotient, (a.d - quotient * b.d) / b.v};
}

__device__ __forceinline__ real square_root(real a) { return sizeof(real) == 4 ? (real)sqrtf((float)a) : (real)sqrt((double)a); }
__device__ __forceinline__ Dual square_root(Dual a) {
    const real root = square_root(a.v);
    return {root, a.d / (2 * root)};
}

__device__ __forceinline__ real value_of(real a) { return a; }
__device__ __forceinline__ real value_of(Dual a) { return a.v; }
__device__ __forceinline__ real tangent_of(Dual a) { return a.d; }
