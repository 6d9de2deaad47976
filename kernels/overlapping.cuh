// A kernel that begins before the end of the last one, which is in front of it in its stream (programmatic dependent launch, sm_90 and newer).
//
// The last one says from when on the next may begin: once all of its blocks have, or have ended, the next one's blocks take what room there
// is. These wait for its end before they read what it writes, and before they write anything themselves: in each kernel some thread of a
// block, even where it needs nothing of it, or the one after the next could begin too early as well. What is read so is no `const __restrict__`: the
// compiler may move such reads to where they are too early. Launched in the usual way, no kernel is early, and there is nothing to wait for.
#pragma once

#ifndef E3NN_ACCEL_HOST  // where kernels are tested without a GPU, the last one ends when it is waited for
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_end_of_last() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
__device__ __forceinline__ void let_next_begin() {}
__device__ __forceinline__ void wait_for_end_of_last() {}
#endif
#endif
