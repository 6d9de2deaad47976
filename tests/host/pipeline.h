// kernels/pipeline.cuh on the CPU: copies that take place as late as they may.
//
// A row asked for is NaN until somebody waits for it, so that a wait that is missing shows, and so does a slot
// that is asked for while others still read it. A row that leaves is read when its group is waited for, so
// that a slot that is used again too early shows.
#pragma once

// As the hardware has it: arrivals and bytes that a turn still waits for, and the turn's parity.
struct alignas(8) Barrier {
    unsigned long long state;
};

namespace host {

struct Turn {
    unsigned parity : 1, expected : 11, pending : 12;
    int bytes;
};
static_assert(sizeof(Turn) == sizeof(::Barrier));

struct Copy {
    void* to;
    const void* from;
    unsigned bytes;
    ::Barrier* barrier;  // of a row that comes
    char adds;         // of a row that leaves: 0, or the size of the numbers that are added
};

constexpr unsigned MOST_COPIES = 4096;
static Copy coming[MOST_COPIES];
static unsigned coming_count;
// Of each thread, as its groups are: a list with an end after each group.
struct Leaving {
    Copy copies[64];
    unsigned count = 0, groups[64] = {}, closed = 0;
};
static Leaving leaving[MOST_THREADS];

inline Turn turn_of(::Barrier& b) {
    const unsigned long long state = __atomic_load_n(&b.state, __ATOMIC_ACQUIRE);
    Turn turn;
    std::memcpy(&turn, &state, sizeof turn);
    return turn;
}

template <class Change>
inline void change(::Barrier& b, const Change& change) {
    unsigned long long before = __atomic_load_n(&b.state, __ATOMIC_ACQUIRE), after;
    do {
        Turn turn;
        std::memcpy(&turn, &before, sizeof turn);
        change(turn);
        if (turn.pending == 0 && turn.bytes == 0) turn.parity ^= 1, turn.pending = turn.expected;
        std::memcpy(&after, &turn, sizeof turn);
    } while (!__atomic_compare_exchange_n(&b.state, &before, after, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
}

inline void perform(const Copy& copy) {
    if (copy.adds == 4)
        for (unsigned n = 0; n < copy.bytes / 4; n++) ((float*)copy.to)[n] += ((const float*)copy.from)[n];
    else if (copy.adds == 8)
        for (unsigned n = 0; n < copy.bytes / 8; n++) ((double*)copy.to)[n] += ((const double*)copy.from)[n];
    else
        std::memcpy(copy.to, copy.from, copy.bytes);
}

inline void check(const void* to, const void* from, unsigned bytes) {
    if ((std::uintptr_t)to % 16 || (std::uintptr_t)from % 16 || bytes % 16) fail("a copy isn't of whole 16 bytes");
}

// The rows that a barrier waits for come in: by whoever waits first, the issuing thread's list being its own.
inline void let_in(::Barrier& b) {
    for (unsigned n = 0; n < coming_count; n++)
        if (coming[n].barrier == &b) {
            const Copy copy = coming[n];
            coming[n--] = coming[--coming_count];
            perform(copy);
            change(b, [&](Turn& turn) { turn.bytes -= (int)copy.bytes; });
        }
}

// Fibers take turns; real threads wait for what the others have time for.
inline bool waits_forever(long tries, std::chrono::steady_clock::time_point since) {
    if (!HOST_THREADS) return tries > 10000000;
    return tries % 1024 == 1023 && std::chrono::steady_clock::now() - since > std::chrono::seconds(30);
}

}  // namespace host

inline void barrier_init(::Barrier& b, unsigned arrivals) {
    host::Turn turn = {0, arrivals, arrivals, 0};
    std::memcpy(&b.state, &turn, sizeof turn);
}

inline void fence_for_engines() {}

typedef std::uintptr_t SharedAddress;
inline SharedAddress shared_address(const void* p) { return (SharedAddress)p; }
template <class T>
T* at_address(SharedAddress address) { return (T*)address; }

inline void arrive(::Barrier& b) {
    host::change(b, [](host::Turn& turn) { turn.pending--; });
}

inline void arrive_expecting(::Barrier& b, unsigned bytes) {
    host::change(b, [=](host::Turn& turn) { turn.pending--, turn.bytes += (int)bytes; });
}

// Copies of the thread's own are there at once: that they were waited for shows in those by `copy_in`.
inline void arrive_when_copied(::Barrier& b) {
    host::close_asked();
    host::let_asked_in(0);
    arrive(b);
}

inline bool one_of_warp() { return host::self().number % 32 == 0; }

template <int COUNT>
void take_registers() {}
template <int COUNT>
void leave_registers() {}

inline void copy_in(void* to, const void* from, unsigned bytes, ::Barrier& b) {
    host::check(to, from, bytes);
    if (HOST_THREADS) {  // a list that all threads take from would order what the barriers must order
        std::memcpy(to, from, bytes);
        host::change(b, [=](host::Turn& turn) { turn.bytes -= (int)bytes; });
        return;
    }
    if (host::coming_count == host::MOST_COPIES) host::fail("too many copies are on their way");
    std::memset(to, 0xff, bytes);
    host::coming[host::coming_count++] = {to, from, bytes, &b, 0};
}

inline void copy_in_once(void* to, const void* from, unsigned bytes, ::Barrier& b) { copy_in(to, from, bytes, b); }

inline void wait(::Barrier& b, unsigned parity) {
    const auto since = std::chrono::steady_clock::now();
    for (long tries = 0; host::turn_of(b).parity == (parity & 1); tries++) {
        if (!HOST_THREADS) host::let_in(b);
        if (host::turn_of(b).parity != (parity & 1)) return;
        if (host::waits_forever(tries, since)) host::fail("a thread waits for a turn that never comes");
        host::yield();
    }
}

namespace host {

inline void leave(void* to, const void* from, unsigned bytes, char adds) {
    check(to, from, bytes);
    Leaving& mine = leaving[self().number];
    if (mine.count == 64) fail("too many rows leave at once");
    mine.copies[mine.count++] = {to, from, bytes, nullptr, adds};
}

}  // namespace host

inline void copy_out(void* to, const void* from, unsigned bytes) { host::leave(to, from, bytes, 0); }
inline void copy_out_once(void* to, const void* from, unsigned bytes) { copy_out(to, from, bytes); }
inline void add_out(float* to, const float* from, unsigned bytes) { host::leave(to, from, bytes, 4); }
inline void add_out(double* to, const double* from, unsigned bytes) { host::leave(to, from, bytes, 8); }

inline void close_group() {
    host::Leaving& mine = host::leaving[host::self().number];
    mine.groups[mine.closed++] = mine.count;
}

template <int NEWER>
void wait_for_groups() {
    host::Leaving& mine = host::leaving[host::self().number];
    if ((int)mine.closed <= NEWER) return;
    const unsigned groups = mine.closed - NEWER, copies = mine.groups[groups - 1];
    for (unsigned n = 0; n < copies; n++) host::perform(mine.copies[n]);
    for (unsigned n = copies; n < mine.count; n++) mine.copies[n - copies] = mine.copies[n];
    for (unsigned n = groups; n < mine.closed; n++) mine.groups[n - groups] = mine.groups[n] - copies;
    mine.count -= copies, mine.closed -= groups;
}
