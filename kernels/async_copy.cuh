// A few numbers moved from global to shared memory without passing through registers (sm_80 and newer).
//
// Copies that a thread has asked for since it last closed a group are a group; it can wait until all but its
// latest groups have arrived. Others see them after a barrier.
#pragma once

#include "real.cuh"

#ifndef E3NN_ACCEL_HOST  // where kernels are tested without a GPU, copies are made by hand

// COUNT numbers, of 4, 8 or 16 bytes in all and aligned to that; those after the first `valid` are zero and not read.
template <int COUNT>
__device__ __forceinline__ void copy_async(real* to, const real* from, int valid) {
    constexpr int BYTES = COUNT * sizeof(real);
    const unsigned address = (unsigned)__cvta_generic_to_shared(to);
    const int bytes = valid * (int)sizeof(real);
    if constexpr (BYTES == 16)  // not through the first-level cache, where nobody looks for it again
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(BYTES), "r"(bytes) : "memory");
}

// Addresses that follow from this one are constants away from it, where the compiler would keep each in a register.
template <class T>
__device__ __forceinline__ void count_from(T*& address) { asm("" : "+l"(address)); }

__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the latest NEWER groups have arrived.
template <int NEWER>
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(NEWER) : "memory"); }

#endif
