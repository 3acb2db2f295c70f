// What partitions of a context have left in memory, joined in order: by the block of threads that comes last.
#pragma once
#include "attention.h"

// For a token and the query heads of a key head, of which every partition has left sums of values, the largest score and
// the sum of weights. A block has PARTITION threads; `scratch` is shared memory for four numbers of each, which nobody
// else uses any more once all threads are here.
INLINE void join_partials(const Attention &a, int token, int head, u32 count, float *scratch) {
    SHARED u32 finished;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 *counter = a.counters + (long)token * a.kv_heads + head;
        finished = count_up(counter) == count - 1;
        if (finished) *counter = 0;
    }
    __syncthreads();
    if (!finished) return;
    __threadfence();
    // The factors of join(), of as many partitions as there are threads at a time; then the sums they belong to.
    float *m_of = scratch, *l_of = scratch + PARTITION, *kept_of = scratch + 2 * PARTITION, *added_of = scratch + 3 * PARTITION;
    const int group = a.heads / a.kv_heads;
    for (int h = 0; h < group; h++) {
        const long row = (long)token * a.heads + head * group + h;
        const float *partials = a.partials + row * a.partitions * (a.size + 2);
        float m = LOWEST, l = 0.0f, sums[2] = {};
        for (u32 first = 0; first < count; first += PARTITION) {
            const u32 some = count - first < PARTITION ? count - first : PARTITION;
            __syncthreads();
            if (threadIdx.x < some) {
                const float *partial = partials + (long)(first + threadIdx.x) * (a.size + 2) + a.size;
                m_of[threadIdx.x] = partial[0], l_of[threadIdx.x] = partial[1];
            }
            __syncthreads();
            if (threadIdx.x < some) {
                float before = m;
                for (u32 p = 0; p < threadIdx.x; p++) before = fmaxf(before, m_of[p]);
                join_factors(before, m_of[threadIdx.x], kept_of[threadIdx.x], added_of[threadIdx.x]);
            }
            __syncthreads();
#pragma unroll 16
            for (u32 p = 0; p < some; p++) {
                m = fmaxf(m, m_of[p]);
                l = join(l, kept_of[p], l_of[p], added_of[p]);
                const float *partial = partials + (long)(first + p) * (a.size + 2) + threadIdx.x;
                if (threadIdx.x < (u32)a.size) sums[0] = join(sums[0], kept_of[p], partial[0], added_of[p]);
                if (threadIdx.x + PARTITION < (u32)a.size) sums[1] = join(sums[1], kept_of[p], partial[PARTITION], added_of[p]);
            }
        }
        for (int part = 0; part < 2; part++)
            if (threadIdx.x + part * PARTITION < a.size) a.y[row * a.size + threadIdx.x + part * PARTITION] = sums[part] / l;
    }
}
