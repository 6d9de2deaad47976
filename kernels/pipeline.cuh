// Rows moved between global and shared memory by the copy engine (bulk copies, sm_90 and newer), so
// that threads neither hold them in registers on the way nor spend instructions on addresses.
//
// A ring of slots. `Barrier` counts arrivals and, where a copy reports to it, bytes; a wait names
// the parity of the turn it waits for. Addresses and sizes are multiples of 16 bytes.
#pragma once

// compute-sanitizer's racecheck doesn't see that a warp's reads come before its first lane's arrival, and is shown all lanes'.
#ifndef EVERY_THREAD_ARRIVES
#define EVERY_THREAD_ARRIVES 0
#endif

#ifndef E3NN_ACCEL_HOST  // where kernels are tested without a GPU, copies are made by hand

struct alignas(8) Barrier {
    unsigned long long state;
};

typedef unsigned SharedAddress;

__device__ __forceinline__ SharedAddress shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

template <class T>
__device__ __forceinline__ T* at_address(SharedAddress address) { return static_cast<T*>(__cvta_shared_to_generic(address)); }

__device__ __forceinline__ void barrier_init(Barrier& b, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&b)), "r"(arrivals) : "memory");
}

// Makes initialised barriers and what this thread wrote to shared memory visible to the copy engine, and to a warpgroup's tensor cores.
// And what it reads of a slot has come before the engine fills that again, if this lies between its reads and its arrival: an arrival by
// itself overtakes reads that are on their way (kernels/README.md, linear_staged.cu).
__device__ __forceinline__ void fence_for_engines() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void arrive(Barrier& b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&b)) : "memory");
}

// Arrives, and makes the turn wait for so many bytes besides.
__device__ __forceinline__ void arrive_expecting(Barrier& b, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&b)), "r"(bytes) : "memory");
}

// Arrives when all that this thread has asked for by copy_async (async_copy.cuh) is there.
__device__ __forceinline__ void arrive_when_copied(Barrier& b) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&b)) : "memory");
}

__device__ __forceinline__ void wait(Barrier& b, unsigned parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}\n" ::"r"(shared_address(&b)), "r"(parity) : "memory");
}

// True in one lane of a warp, always the same. A condition on a lane's number does as well, but bulk copies take their addresses from
// registers of the warp, and the compiler then makes a loop over lanes around each.
__device__ __forceinline__ bool one_of_warp() {
    unsigned one;
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(one));
    return one;
}


// Registers of a thread, from here on, of all of a warpgroup's; those that one leaves another can take (sm_90a).
template <int COUNT>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
__device__ __forceinline__ void leave_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }

__device__ __forceinline__ void copy_in(void* to, const void* from, unsigned bytes, Barrier& b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(&b)) : "memory");
}

__device__ __forceinline__ unsigned long long leaves_first() {
    unsigned long long policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// A row that nobody reads again makes room in the second-level cache first.
__device__ __forceinline__ void copy_in_once(void* to, const void* from, unsigned bytes, Barrier& b) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(&b)), "l"(leaves_first()) : "memory");
}

__device__ __forceinline__ void copy_out(void* to, const void* from, unsigned bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_out_once(void* to, const void* from, unsigned bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(to),
                 "r"(shared_address(from)), "r"(bytes), "l"(leaves_first()) : "memory");
}

// Adds a row to one in global memory, atomically for each number.
__device__ __forceinline__ void add_out(float* to, const float* from, unsigned bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void add_out(double* to, const double* from, unsigned bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f64 [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void close_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all but the latest NEWER groups have been read from shared memory.
template <int NEWER>
__device__ __forceinline__ void wait_for_groups() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(NEWER) : "memory"); }

#endif

// What all lanes of a warp have; now the compiler knows, too, and keeps it and what is made of it in registers of the warp.
template <class T>
__device__ __forceinline__ T same_in_warp(T value) { return __shfl_sync(0xffffffffu, value, 0); }

__device__ __forceinline__ int number_of_warp() { return same_in_warp(threadIdx.x / 32); }
