// The threads of a block as fibers: each runs until it has to wait for others.
//
// Their turns go up the block and down again in alternation. So where a barrier is missing some thread
// reads before another has written, or writes before another has read, and the result is wrong each time.
// A barrier that not all threads reach is an error and not a deadlock.
#pragma once

namespace host {

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
    Thread thread;
    State state;
    unsigned mask;  // of the lanes waited for
    bool started;
    ucontext_t start;
    jmp_buf resume;
};

static Fiber fibers[MOST_THREADS];
static Fiber* current;
static jmp_buf scheduler;
static const char* failure;
static char* stacks;
static void (*body)(void*);
static void* body_argument;

inline Thread& self() { return current->thread; }

__attribute__((noinline)) static void wait(State state) {
    current->state = state;
    if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

[[noreturn]] __attribute__((noinline)) static void fail(const char* message) {
    failure = message;
    _longjmp(scheduler, 1);
}

inline void yield() { wait(State::ready); }

inline void wait_for_block() { wait(State::at_block_barrier); }

inline void wait_for_lanes(unsigned mask) {
    if (!(mask >> current->thread.lane & 1)) fail("a lane synchronises lanes that it isn't one of");
    current->mask = mask;
    wait(State::at_warp_barrier);
}

inline bool is_running(unsigned warp, unsigned lane) {
    const unsigned number = 32 * warp + lane;
    return number < threads_of_block() && fibers[number].state != State::done;
}

static void start_fiber() {
    body(body_argument);
    current->state = State::done;
    _longjmp(scheduler, 1);
}

__attribute__((noinline)) static void run(Fiber& fiber) {
    current = &fiber;
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

// Lets those go on who have all arrived. Returns whether there are any.
static bool release(unsigned threads) {
    unsigned waiting = 0, done = 0;
    for (unsigned n = 0; n < threads; n++) {
        waiting += fibers[n].state == State::at_block_barrier;
        done += fibers[n].state == State::done;
    }
    bool released = false;
    if (waiting && waiting + done == threads) {
        for (unsigned n = 0; n < threads; n++)
            if (fibers[n].state == State::at_block_barrier) fibers[n].state = State::ready;
        released = true;
    }
    for (unsigned n = 0; n < threads; n++) {
        if (fibers[n].state != State::at_warp_barrier) continue;
        const unsigned first = n / 32 * 32, mask = fibers[n].mask;
        bool all = true;
        for (unsigned lane = 0; lane < 32; lane++) {
            const Fiber& other = fibers[first + lane];
            if (!(mask >> lane & 1) || first + lane >= threads || other.state == State::done) continue;
            all = all && other.state == State::at_warp_barrier && other.mask == mask;
        }
        if (!all) continue;
        for (unsigned lane = 0; lane < 32; lane++)
            if ((mask >> lane & 1) && first + lane < threads && fibers[first + lane].state == State::at_warp_barrier)
                fibers[first + lane].state = State::ready;
        released = true;
    }
    return released;
}

static const char* run_block(void (*function)(void*), void* argument) {
    const unsigned threads = threads_of_block();
    if (!stacks) stacks = static_cast<char*>(std::malloc(STACK * MOST_THREADS));  // pages come when they are used
    body = function, body_argument = argument, failure = nullptr;
    for (unsigned n = 0; n < threads; n++) {
        Fiber& fiber = fibers[n];
        fiber.thread = thread_of(n), fiber.state = State::ready, fiber.started = false;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = stacks + STACK * n;
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, start_fiber, 0);
    }
    unsigned left = threads;
    for (bool up = true; left; up = !up) {
        bool ran = false;
        for (unsigned turn = 0; turn < threads; turn++) {
            Fiber& fiber = fibers[up ? turn : threads - 1 - turn];
            if (fiber.state != State::ready) continue;
            run(fiber);
            if (failure) return failure;
            ran = true;
            left -= fiber.state == State::done;
        }
        if (!release(threads) && !ran && left) return "threads wait at a barrier that others never reach";
    }
    return nullptr;
}

}  // namespace host
