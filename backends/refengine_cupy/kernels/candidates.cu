// The first in rank of each row of logits, and what the row weighs, so that the row need not leave the device.
//
// A row is cut into chunks, which the whole device shares: 512 KB would keep one block of threads busy for longer than
// all others need for a small model. First, every chunk gives its first; then, at once, those of all chunks are put
// together, and every chunk adds up its weights, now that the highest logit is known. Both read the logits once or
// twice, from the cache that they were just written to.
//
// A key is a logit, as an unsigned integer that grows with it, before the complement of its id: so keys differ, the
// greater comes first in rank, and whatever order they are met in, the result is the same. No key is 0.
#include "vendor.h"

#define FIND_THREADS 1024
#define MOST_OF_THREAD 32

struct FindCandidates {
    const float *logits;
    const double *temperatures;
    u64 *keys;
    double *sums;
    float *best;
    int *tokens, *finite;
    int size, chunk, chunks, most;
};

INLINE u64 key_of(float x, u32 id) {
    const u32 bits = x == 0.0f ? 0 : bits_of(x); // zeros of both signs are equal
    return (u64)(bits & 0x80000000u ? ~bits : bits | 0x80000000u) << 32 | (u32)~id;
}
INLINE float logit_of(u64 key) {
    const u32 bits = (u32)(key >> 32);
    return float_of_bits(bits & 0x80000000u ? bits & 0x7FFFFFFFu : ~bits);
}
INLINE u32 id_of(u64 key) { return ~(u32)key; }

// Gives the `most` greatest of `count` keys, or all there are, by put(rank, key); returns no less than there are of these.
//
// As many threads' own greatest keys reach a bound that is found bit by bit; all other keys that do are theirs, and
// few. What reaches it is put down in any order, and its rank is the number of keys above.
template <class At, class Put> INLINE int find_first(int count, int most, At at, Put put) {
    SHARED u64 kept[128 * MOST_OF_THREAD];
    SHARED u32 number;
    if (threadIdx.x == 0) number = 0;
    u64 own = 0, bound = 0;
    for (int i = (int)threadIdx.x; i < count; i += FIND_THREADS) {
        const u64 key = at(i);
        own = key > own ? key : own;
    }
    for (int bit = 63; bit >= 0; bit--) {
        const u64 higher = bound | 1ull << bit;
        const int reaching = threads_where(own >= higher);
        if (reaching >= most) bound = higher;
        if (reaching == most) break;
    }
    for (int i = (int)threadIdx.x; i < count; i += FIND_THREADS) {
        const u64 key = at(i);
        if (key != 0 && key >= bound) kept[count_up(&number)] = key;
    }
    __syncthreads();
    const int found = (int)number;
    for (int i = (int)threadIdx.x; i < found; i += FIND_THREADS) {
        const u64 key = kept[i];
        int rank = 0;
        for (int k = 0; k < found; k++) rank += kept[k] > key;
        if (rank < most) put(rank, key);
    }
    return found;
}

// The first of each chunk; keys[rows, most, chunks]. One block for each chunk (x) of each row (y).
KERNEL(candidates_of_chunks, FindCandidates, FIND_THREADS) {
    wait_for_producer();
    let_consumer_start();
    const int chunk = (int)blockIdx.x, row = (int)blockIdx.y, start = chunk * a.chunk;
    const int count = a.size - start < a.chunk ? a.size - start : a.chunk;
    const float *x = a.logits + (long)row * a.size + start;
    u64 *keys = a.keys + (long)row * a.most * a.chunks + chunk;
    const int found = find_first(
        count, a.most, [=](int i) { return key_of(x[i], (u32)(start + i)); },
        [=](int rank, u64 key) { keys[(long)rank * a.chunks] = key; });
    for (int rank = found + (int)threadIdx.x; rank < a.most; rank += FIND_THREADS) keys[(long)rank * a.chunks] = 0;
    int wrong = 0;
    for (int i = (int)threadIdx.x; i < count; i += FIND_THREADS) wrong |= !(fabsf(x[i]) <= 3.40282347e38f);
    wrong = threads_where(wrong);
    if (threadIdx.x == 0) a.finite[(long)row * a.chunks + chunk] = wrong == 0;
}

// The first of each row, by the last block of a row; and by the others, the sum of exp((l - max l) / temperature) over a
// chunk, each in an order that rests on nothing else.
KERNEL(candidates_of_rows, FindCandidates, FIND_THREADS) {
    wait_for_producer();
    let_consumer_start();
    const int chunk = (int)blockIdx.x, row = (int)blockIdx.y;
    const float *x = a.logits + (long)row * a.size;
    const u64 *keys = a.keys + (long)row * a.most * a.chunks;
    if (chunk == a.chunks) {
        float *best = a.best + (long)row * a.most;
        int *tokens = a.tokens + (long)row * a.most;
        find_first(
            a.most * a.chunks, a.most, [=](int i) { return keys[i]; },
            [=](int rank, u64 key) { tokens[rank] = (int)id_of(key), best[rank] = x[id_of(key)]; });
        return;
    }
    const double temperature = a.temperatures[row];
    double sum = 0.0;
    if (temperature > 0.0) {
        float top = logit_of(keys[0]);
        for (int i = (int)threadIdx.x % LANES; i < a.chunks; i += LANES) top = fmaxf(top, logit_of(keys[i]));
        top = largest_of_lanes(top);
        const int start = chunk * a.chunk, end = a.size - start < a.chunk ? a.size : start + a.chunk;
        for (int i = start + (int)threadIdx.x; i < end; i += FIND_THREADS)
            sum += exp(((double)x[i] - (double)top) / temperature);
    }
    SHARED double parts[FIND_THREADS / LANES];
    for (int mask = LANES / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (threadIdx.x % LANES == 0) parts[threadIdx.x / LANES] = sum;
    __syncthreads();
    sum = parts[threadIdx.x % LANES];
    for (int mask = LANES / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (threadIdx.x == 0) a.sums[(long)row * a.chunks + chunk] = sum;
}
