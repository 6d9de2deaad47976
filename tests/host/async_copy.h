// kernels/async_copy.cuh on the CPU: numbers are NaN until the thread that asked for them waits for their group.
#pragma once

namespace host {

struct Asked {
    void* to;
    const void* from;
    unsigned bytes, valid;
};
// Of each thread, as its groups are: a list with an end after each group.
struct Asking {
    Asked copies[1024];
    unsigned count = 0, groups[64] = {}, closed = 0;
};
static Asking asking[MOST_THREADS];

inline void ask(void* to, const void* from, unsigned bytes, unsigned valid) {
    if ((std::uintptr_t)to % bytes || (std::uintptr_t)from % bytes) fail("a copy isn't aligned to its size");
    if (valid > bytes) fail("more is valid than is copied");
    Asking& mine = asking[self().number];
    if (mine.count == 1024) fail("too many copies are on their way");
    std::memset(to, 0xff, bytes);
    mine.copies[mine.count++] = {to, from, bytes, valid};
}

inline void close_asked() {
    Asking& mine = asking[self().number];
    if (mine.closed == 64) fail("too many groups of copies are on their way");
    mine.groups[mine.closed++] = mine.count;
}

inline void let_asked_in(unsigned newer) {
    Asking& mine = asking[self().number];
    if (mine.closed <= newer) return;
    const unsigned groups = mine.closed - newer, copies = mine.groups[groups - 1];
    for (unsigned n = 0; n < copies; n++) {
        const Asked& copy = mine.copies[n];
        std::memset(copy.to, 0, copy.bytes);
        std::memcpy(copy.to, copy.from, copy.valid);
    }
    for (unsigned n = copies; n < mine.count; n++) mine.copies[n - copies] = mine.copies[n];
    for (unsigned n = groups; n < mine.closed; n++) mine.groups[n - groups] = mine.groups[n] - copies;
    mine.count -= copies, mine.closed -= groups;
}

}  // namespace host

template <int COUNT, class T>
void copy_async(T* to, const T* from, int valid) {
    host::ask(to, from, COUNT * sizeof(T), (unsigned)valid * sizeof(T));
}
template <class T>
void count_from(T*&) {}
inline void close_copies() { host::close_asked(); }
template <int NEWER>
void wait_for_copies() { host::let_asked_in(NEWER); }
