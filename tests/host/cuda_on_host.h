// CUDA C++ as g++ understands it: enough of it to run the kernels where there is no GPU.
//
// Blocks run one after another, the threads of a block together: as fibers of one thread (fibers.h), which
// is fast and always takes the same turns, or as real threads (threads.h) for the sanitizers. Shared memory
// is static; between blocks it becomes NaN, so that a kernel that reads what it hasn't written shows.
// Kernels see E3NN_ACCEL_HOST where they have to leave out inline PTX.
#pragma once

#define E3NN_ACCEL_HOST 1

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define HOST_THREADS 1
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>
#else
#define HOST_THREADS 0
#include <setjmp.h>
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define __builtin_assume(condition) ((condition) ? (void)0 : __builtin_unreachable())
#if defined(__SANITIZE_ADDRESS__)  // which guards no variable of a section of its own
#define __shared__ static
#else
#define __shared__ static __attribute__((section("e3nn_shared")))
#endif

struct uint3 { unsigned x = 0, y = 0, z = 0; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

static uint3 blockIdx;
static dim3 blockDim, gridDim;
constexpr int warpSize = 32;
#define threadIdx (host::self().index)

namespace host {

constexpr unsigned MOST_THREADS = 1024, DYNAMIC_SHARED = 227 * 1024;
constexpr std::size_t STACK = 256 * 1024;  // of a fiber

// A thread of a block, as far as kernels see it.
struct Thread {
    uint3 index;
    unsigned number, lane, warp;
};

// What the lanes of a warp tell one another.
struct Exchange {
    alignas(16) unsigned char value[32][16];
};

static Exchange exchanges[MOST_THREADS / 32];
alignas(1024) static unsigned char dynamic_shared[DYNAMIC_SHARED];

inline unsigned threads_of_block() { return blockDim.x * blockDim.y * blockDim.z; }

inline Thread thread_of(unsigned number) {
    const uint3 index{number % blockDim.x, number / blockDim.x % blockDim.y, number / blockDim.x / blockDim.y};
    return {index, number, number % 32, number / 32};
}

}  // namespace host

#if HOST_THREADS
#include "threads.h"
#else
#include "fibers.h"
#endif
#include "intrinsics.h"
#include "async_copy.h"
#include "overlapping.h"
#include "pipeline.h"
#include "tensor_cores.h"
#include "launch.h"
