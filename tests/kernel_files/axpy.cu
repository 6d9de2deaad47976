// What the tests of the runtime compile and launch: small, but with all that a real kernel has.
#include "plan.cuh"
#include "product.cuh"

extern "C" __global__ void axpy(const REAL* x, REAL* y, long long n, REAL a) {
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) y[i] += product(a * FACTOR, x[i]);
}

// Every kind of argument, read back one by one; `missing` is a null pointer.
extern "C" __global__ void arguments(double* out, const REAL* missing, int i, long long q, float f, double d) {
    out[0] = missing == nullptr;
    out[1] = i;
    out[2] = q;
    out[3] = f;
    out[4] = d;
}

// Reverses the elements of a block by dynamic shared memory.
extern "C" __global__ void reverse(REAL* x, int n) {
    extern __shared__ REAL copy[];
    for (int i = threadIdx.x; i < n; i += blockDim.x) copy[i] = x[i];
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] = copy[n - 1 - i];
}
