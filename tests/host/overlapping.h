// kernels/overlapping.cuh on the CPU: what the last kernel wrote may be there as late as when its end is waited for.
//
// A test that says where that lies has it all NaN when a block begins, and there when a thread of it waits.
#pragma once

extern "C" {
__attribute__((visibility("default"))) struct {
    void* to;
    const void* from;
    unsigned long bytes, waits;
} written_by_last;
}

namespace host {

inline void forget_written_by_last() {
    if (written_by_last.bytes) std::memset(written_by_last.to, 0xff, written_by_last.bytes);
}

}  // namespace host

inline void let_next_begin() {}
inline void wait_for_end_of_last() {
    if (!written_by_last.bytes) return;
    std::memcpy(written_by_last.to, written_by_last.from, written_by_last.bytes);
    written_by_last.waits++;
}
