// One launch as a program of its own, for sanitizers, which a library within Python can't have.
//
// Reads a file (see host_kernels.py), launches, and writes back all that pointers lead to. Each buffer is
// an allocation of its own, so that AddressSanitizer finds what goes beyond it.
#pragma once

#include <string>

namespace host {

struct Entry {
    const char* name;
    const char* (*launch)(const unsigned*, const unsigned*, unsigned, void**);
};

inline void read_exactly(std::FILE* file, void* to, std::size_t bytes) {
    if (std::fread(to, 1, bytes, file) != bytes) std::exit(3);
}

inline int run(std::initializer_list<Entry> entries, const std::string& name, const char* path) {
    constexpr std::uint64_t NULL_POINTER = ~std::uint64_t{0};
    constexpr unsigned MOST_ARGUMENTS = 64;
    struct { unsigned grid[3], block[3], shared, count; } head;
    struct Argument { std::uint64_t is_pointer, bytes; } of[MOST_ARGUMENTS];
    void* data[MOST_ARGUMENTS];
    void* arguments[MOST_ARGUMENTS];
    std::FILE* in = std::fopen(path, "rb");
    if (!in) return 3;
    read_exactly(in, &head, sizeof head);
    if (head.count > MOST_ARGUMENTS) return 3;
    for (unsigned n = 0; n < head.count; n++) {
        read_exactly(in, &of[n], sizeof of[n]);
        const bool is_null = of[n].bytes == NULL_POINTER;
        data[n] = is_null ? nullptr : std::malloc(of[n].bytes);
        if (!is_null) read_exactly(in, data[n], of[n].bytes);
        arguments[n] = of[n].is_pointer ? static_cast<void*>(&data[n]) : data[n];
    }
    std::fclose(in);
    for (const Entry& entry : entries)
        if (name == entry.name)
            if (const char* failure = entry.launch(head.grid, head.block, head.shared, arguments)) {
                std::fprintf(stderr, "%s\n", failure);
                return 4;
            }
    std::FILE* out = std::fopen(path, "wb");
    if (!out) return 3;
    for (unsigned n = 0; n < head.count; n++) {
        if (of[n].is_pointer && data[n]) std::fwrite(data[n], 1, of[n].bytes, out);
        std::free(data[n]);
    }
    return std::fclose(out) == 0 ? 0 : 3;
}

}  // namespace host
