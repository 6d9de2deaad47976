// What a row's four lanes say of it, where a warp's tensor cores have 16 rows: lane l has numbers of rows l / 4 and l / 4 + 8.
#pragma once

// 1 for each of this lane's two rows, if one of the row's lanes says anything but 0 of it.
__device__ __forceinline__ void vote_by_row(unsigned first, unsigned second, unsigned (&found)[2]) {
    const unsigned lanes = 15u << (threadIdx.x & 28);
    found[0] = (__ballot_sync(0xffffffffu, first) & lanes) != 0;
    found[1] = (__ballot_sync(0xffffffffu, second) & lanes) != 0;
}
