// What the tests of the CUDA that runs on the CPU launch: each kernel shows one thing, or does one wrong.
#include "plan.cuh"

// Sums the block by shuffles within warps and shared memory between them.
extern "C" __global__ void sum(const float* x, float* out) {
    __shared__ float warps[32];
    const unsigned lane = threadIdx.x % warpSize, warp = threadIdx.x / warpSize;
    float value = x[blockIdx.x * blockDim.x + threadIdx.x];
    for (int step = 16; step; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    if (lane == 0) warps[warp] = value;
    BARRIER;
    if (threadIdx.x == 0) {
        float all = 0;
        for (unsigned w = 0; w < blockDim.x / warpSize; w++) all += warps[w];
        atomicAdd(out, all);
    }
}

// Every shuffle and vote once; six numbers a lane.
extern "C" __global__ void lanes(int* out) {
    const unsigned all = 0xffffffffu;
    const int lane = threadIdx.x % warpSize;
    int* row = out + 6 * threadIdx.x;
    row[0] = __shfl_sync(all, lane, 5);
    row[1] = __shfl_up_sync(all, lane, 2, 8);
    row[2] = __shfl_down_sync(all, lane, 2, 8);
    row[3] = __shfl_xor_sync(all, lane, 16);
    row[4] = __popc(__ballot_sync(all, lane < 7));
    row[5] = __any_sync(all, lane == 3) + 2 * __all_sync(all, lane < 31);
}

// Half of a warp meets, without the other half.
extern "C" __global__ void half_warp(int* out) {
    int value = threadIdx.x;
    if (threadIdx.x < 16) value = __shfl_xor_sync(0x0000ffffu, value, 1);
    out[threadIdx.x] = value;
}

// Reads shared memory that only the first block writes.
extern "C" __global__ void left_over(float* out) {
    __shared__ float kept;
    if (blockIdx.x == 0 && threadIdx.x == 0) kept = 1;
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = kept;
}

// Half of the threads wait for all.
extern "C" __global__ void stuck(int* out) {
    if (threadIdx.x % 2) {
        __syncthreads();
    } else {
        __syncwarp();
    }
    out[threadIdx.x] = 1;
}

// Lane 0 asks a lane that isn't there any more.
extern "C" __global__ void gone(int* out) {
    if (threadIdx.x >= 16) return;
    out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 20);
}

// Writes one number more than there is room for.
extern "C" __global__ void beyond(float* out, int n) {
    for (int i = threadIdx.x; i <= n; i += blockDim.x) out[i] = 1;
}
