// A launch from outside: the grid, and pointers to the arguments as the driver takes them.
#pragma once

#if !defined(__SANITIZE_ADDRESS__)
extern unsigned char __start_e3nn_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_e3nn_shared[] __attribute__((weak, visibility("hidden")));
#endif

namespace host {

inline void forget_shared(std::size_t dynamic_bytes) {
#if !defined(__SANITIZE_ADDRESS__)
    if (__start_e3nn_shared) std::memset(__start_e3nn_shared, 0xff, __stop_e3nn_shared - __start_e3nn_shared);
#endif
    std::memset(dynamic_shared, 0xff, dynamic_bytes);
}

// A letter for a parameter as in e3nn_accel.launch; for a pointer P and the letter of what it points to.
template <class T>
constexpr char letter() {
    using V = std::remove_cv_t<T>;
    if (std::is_same_v<V, float>) return 'f';
    if (std::is_same_v<V, double>) return 'd';
    if (std::is_integral_v<V>) return sizeof(V) == 8 ? 'q' : sizeof(V) == 4 ? 'i' : 'b';
    return '?';
}

template <class... P>
const char* parameters(void (*)(P...)) {
    static char text[2 * sizeof...(P) + 1];
    char* at = text;
    ((std::is_pointer_v<P> ? (*at++ = 'P', *at++ = letter<std::remove_pointer_t<P>>()) : (*at++ = letter<P>())), ...);
    *at = 0;
    return text;
}

template <class... P, std::size_t... N>
void call(void (*kernel)(P...), void** arguments, std::index_sequence<N...>) {
    kernel(*static_cast<std::remove_cv_t<P>*>(arguments[N])...);
}

// Returns what went wrong, or null.
template <class... P>
const char* launch(void (*kernel)(P...), const unsigned* grid, const unsigned* block, unsigned shared, void** arguments) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    if (threads_of_block() > MOST_THREADS) return "more than 1024 threads in a block";
    if (shared > DYNAMIC_SHARED) return "more dynamic shared memory than any GPU has";
    auto body = [&] { call(kernel, arguments, std::index_sequence_for<P...>{}); };
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                blockIdx = {x, y, z};
                forget_shared(shared);
                forget_written_by_last();
                auto run = [](void* of) { (*static_cast<decltype(body)*>(of))(); };
                if (const char* failure = run_block(run, &body)) return failure;
            }
    return nullptr;
}

}  // namespace host

#define HOST_ENTRY(kernel)                                                                                        \
    extern "C" __attribute__((visibility("default"))) const char* launch_##kernel(                                \
        const unsigned* grid, const unsigned* block, unsigned shared, void** arguments) {                         \
        return host::launch(::kernel, grid, block, shared, arguments);                                              \
    }                                                                                                             \
    extern "C" __attribute__((visibility("default"))) const char* parameters_##kernel() {                         \
        return host::parameters(::kernel);                                                                          \
    }
