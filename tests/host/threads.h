// The threads of a block as real threads, for the sanitizers. Barriers order what is before and after them
// and nothing else does, so that ThreadSanitizer finds a missing one. A barrier that not all reach is a hang.
#pragma once

namespace host {

static thread_local Thread current;

inline Thread& self() { return current; }

[[noreturn]] static void fail(const char* message) {
    std::fprintf(stderr, "%s\n", message);
    std::abort();
}

// Those who wait for one another: member n waits for the members that `wanted` selects.
class Barrier {
  public:
    void start(unsigned members) {
        waits_.assign(members, {});
        gone_.assign(members, false);
    }

    template <class Wanted>
    void wait(unsigned member, unsigned key, const Wanted& wanted) {
        std::unique_lock lock(mutex_);
        waits_[member] = {true, key};
        release(key, wanted);
        released_.wait(lock, [&] { return !waits_[member].waits; });
    }

    template <class WantedBy>
    void leave(unsigned member, const WantedBy& wanted_by) {
        std::unique_lock lock(mutex_);
        gone_[member] = true;
        for (unsigned n = 0; n < waits_.size(); n++)
            if (waits_[n].waits) release(waits_[n].key, wanted_by(waits_[n].key));
    }

    bool is_gone(unsigned member) {
        std::unique_lock lock(mutex_);
        return member >= gone_.size() || gone_[member];
    }

  private:
    struct Wait { bool waits = false; unsigned key = 0; };

    template <class Wanted>
    void release(unsigned key, const Wanted& wanted) {
        for (unsigned n = 0; n < waits_.size(); n++)
            if (wanted(n) && !gone_[n] && !(waits_[n].waits && waits_[n].key == key)) return;
        for (unsigned n = 0; n < waits_.size(); n++)
            if (wanted(n)) waits_[n].waits = false;
        released_.notify_all();
    }

    std::mutex mutex_;
    std::condition_variable released_;
    std::vector<Wait> waits_;
    std::vector<char> gone_;
};

static Barrier block_barrier, warp_barriers[MOST_THREADS / 32];

inline auto every_thread(unsigned) {
    return [](unsigned) { return true; };
}
inline auto lanes_of(unsigned mask) {
    return [mask](unsigned lane) { return (mask >> lane & 1) != 0; };
}

inline void yield() { std::this_thread::yield(); }

inline void wait_for_block() { block_barrier.wait(current.number, 0, every_thread(0)); }

inline void wait_for_lanes(unsigned mask) {
    if (!(mask >> current.lane & 1)) fail("a lane synchronises lanes that it isn't one of");
    warp_barriers[current.warp].wait(current.lane, mask, lanes_of(mask));
}

inline bool is_running(unsigned warp, unsigned lane) { return !warp_barriers[warp].is_gone(lane); }

static const char* run_block(void (*function)(void*), void* argument) {
    const unsigned count = threads_of_block();
    block_barrier.start(count);
    for (unsigned first = 0; first < count; first += 32)
        warp_barriers[first / 32].start(count - first < 32 ? count - first : 32);
    std::vector<std::thread> threads;
    for (unsigned n = 0; n < count; n++)
        threads.emplace_back([=] {
            current = thread_of(n);
            function(argument);
            warp_barriers[current.warp].leave(current.lane, lanes_of);
            block_barrier.leave(current.number, every_thread);
        });
    for (std::thread& thread : threads) thread.join();
    return nullptr;
}

}  // namespace host
