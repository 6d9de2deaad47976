// Barriers, shuffles, votes, atomics, loads and arithmetic under CUDA's names.
#pragma once

inline void __syncthreads() { host::wait_for_block(); }
inline int __syncthreads_or(int mine) {
    static int any;
    host::wait_for_block();
    if (host::self().number == 0) any = 0;
    host::wait_for_block();
    if (mine) __atomic_store_n(&any, 1, __ATOMIC_RELAXED);
    host::wait_for_block();
    return __atomic_load_n(&any, __ATOMIC_RELAXED);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { host::wait_for_lanes(mask); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __threadfence(); }
[[noreturn]] inline void __trap() { host::fail("__trap"); }

namespace host {

// Gives a value to the other lanes and takes that of lane `from`.
template <class T>
T exchange(unsigned mask, T value, unsigned from) {
    static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
    const Thread me = self();
    Exchange& lanes = exchanges[me.warp];
    std::memcpy(lanes.value[me.lane], &value, sizeof(T));
    wait_for_lanes(mask);
    if (!(mask >> from & 1) || !is_running(me.warp, from)) fail("a lane reads from a lane that takes no part");
    std::memcpy(&value, lanes.value[from], sizeof(T));
    wait_for_lanes(mask);
    return value;
}

// The bits of those lanes of the mask whose condition holds.
inline unsigned vote(unsigned mask, bool condition) {
    const Thread me = self();
    unsigned found = 0;
    std::memcpy(exchanges[me.warp].value[me.lane], &condition, 1);
    wait_for_lanes(mask);
    for (unsigned lane = 0; lane < 32; lane++)
        if ((mask >> lane & 1) && is_running(me.warp, lane)) found |= unsigned{exchanges[me.warp].value[lane][0]} << lane;
    wait_for_lanes(mask);
    return found;
}

// The lanes of the mask that have the same value.
template <class T>
unsigned match(unsigned mask, T value) {
    const Thread me = self();
    Exchange& lanes = exchanges[me.warp];
    std::memcpy(lanes.value[me.lane], &value, sizeof(T));
    wait_for_lanes(mask);
    unsigned found = 0;
    for (unsigned lane = 0; lane < 32; lane++)
        if ((mask >> lane & 1) && is_running(me.warp, lane) && !std::memcmp(lanes.value[lane], &value, sizeof(T)))
            found |= 1u << lane;
    wait_for_lanes(mask);
    return found;
}

}  // namespace host

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    const int lane = host::self().lane;
    return host::exchange(mask, value, (lane & ~(width - 1)) | (from & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int step, int width = 32) {
    const int lane = host::self().lane, from = lane ^ step;
    return host::exchange(mask, value, from / width > lane / width ? lane : from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned step, int width = 32) {
    const int lane = host::self().lane, from = lane + step;
    return host::exchange(mask, value, from / width == lane / width ? from : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned step, int width = 32) {
    const int lane = host::self().lane, from = lane - int(step);
    return host::exchange(mask, value, from >= lane / width * width ? from : lane);
}
template <class T> unsigned __match_any_sync(unsigned mask, T value) { return host::match(mask, value); }
// The larger of each of two numbers of 16 bits.
inline unsigned __vmaxu2(unsigned a, unsigned b) {
    const unsigned upper = 0xffff0000u, lower = 0xffffu;
    return std::max(a & upper, b & upper) | std::max(a & lower, b & lower);
}
inline unsigned __ballot_sync(unsigned mask, bool condition) { return host::vote(mask, condition); }
inline int __any_sync(unsigned mask, bool condition) { return host::vote(mask, condition) != 0; }
inline int __all_sync(unsigned mask, bool condition) { return host::vote(mask, !condition) == 0; }

// Loads and stores that differ from plain ones in caching alone.
template <class T> T __ldg(const T* at) { return *at; }
template <class T> T __ldcs(const T* at) { return *at; }
template <class T> T __ldcg(const T* at) { return *at; }
template <class T> T __ldca(const T* at) { return *at; }
template <class T> void __stcs(T* at, T value) { *at = value; }
template <class T> void __stcg(T* at, T value) { *at = value; }

// Blocks run one after another and fibers change at barriers alone, but threads.h has real threads.
template <class T, class Change>
T atomic_change(T* at, Change change) {
    T before, after;
    __atomic_load(at, &before, __ATOMIC_RELAXED);
    do after = change(before);
    while (!__atomic_compare_exchange(at, &before, &after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return before;
}
template <class T> T atomicAdd(T* at, std::type_identity_t<T> value) {
    return atomic_change(at, [=](T old) { return T(old + value); });
}
template <class T> T atomicMax(T* at, std::type_identity_t<T> value) {
    return atomic_change(at, [=](T old) { return old < value ? value : old; });
}
template <class T> T atomicMin(T* at, std::type_identity_t<T> value) {
    return atomic_change(at, [=](T old) { return value < old ? value : old; });
}
template <class T> T atomicOr(T* at, std::type_identity_t<T> value) {
    return atomic_change(at, [=](T old) { return old | value; });
}
template <class T> T atomicExch(T* at, std::type_identity_t<T> value) {
    return atomic_change(at, [=](T) { return value; });
}
template <class T> T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
    return atomic_change(at, [=](T old) { return old == expected ? value : old; });
}

template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    return T(a) < T(b) ? T(b) : T(a);
}

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }

// Vectors, with the alignment that lets a GPU load one at once.
#define HOST_VECTORS(T, NAME, ALIGN2, ALIGN4)                                             \
    struct alignas(ALIGN2) NAME##2 { T x, y; };                                           \
    struct alignas(ALIGN4) NAME##4 { T x, y, z, w; };                                     \
    inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                            \
    inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
HOST_VECTORS(float, float, 8, 16)
HOST_VECTORS(double, double, 16, 16)
HOST_VECTORS(int, int, 8, 16)
HOST_VECTORS(unsigned, uint, 8, 16)
#undef HOST_VECTORS
