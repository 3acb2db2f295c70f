// Paged attention of many queries of a sequence: the arithmetic of attention.h, in its order, for 64 queries at once.
//
// A block of threads has a tile of queries and a head. A thread has four queries; of scores, every 16th key; of results,
// CHUNK elements: so heads have at most 16 * CHUNK elements, a multiple of CHUNK.
//
// Keys and values come into shared memory by what derives from QueryTile.
#pragma once
#include "attention.h"

#define QUERIES 64
#define THREADS 256
#define MINE 4 // queries of a thread
#define ACROSS 16
#define KEYS_EACH (PARTITION / ACROSS)
#define MOST_SIZE (ACROSS * CHUNK)

template <class C> struct TileMemory {
    static constexpr int stride = MOST_SIZE * C::bytes + 16; // bytes of a key: apart, so that neighbours share no bank
    float q[QUERIES][MOST_SIZE + 4];
    float weights[QUERIES][PARTITION + 4];
    float run_sums[QUERIES][RUNS + 1];
    u64 slots[PARTITION];
    u8 numbers[PARTITION * stride];
};

template <class C, class D> struct QueryTile {
    const Attention &a;
    TileMemory<C> &shared;
    int head, first, count, position, chunks;

    INLINE int seen_from(int query) const {
        const int p = position + query;
        return a.window > 0 && p + 1 > a.window ? p + 1 - a.window : 0;
    }
    INLINE bool sees(int query, int key) const { return key <= position + query && key >= seen_from(query); }

    INLINE void load_queries() {
        for (int i = threadIdx.x; i < QUERIES * a.size; i += THREADS) {
            const int query = i / a.size, e = i % a.size;
            shared.q[query][e] = query < count ? a.q[((long)(first + query) * a.heads + head) * a.size + e] : 0.0f;
        }
    }

    INLINE void multiply_keys(float (&scores)[MINE][KEYS_EACH]) {
        const int mine = threadIdx.x / ACROSS * MINE, across = threadIdx.x % ACROSS;
        for (int chunk = 0; chunk < chunks; chunk++) {
            float q[MINE][CHUNK];
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                const float4 low = load_float4(&shared.q[mine + i][chunk * CHUNK]);
                const float4 up = load_float4(&shared.q[mine + i][chunk * CHUNK + 4]);
                q[i][0] = low.x, q[i][1] = low.y, q[i][2] = low.z, q[i][3] = low.w;
                q[i][4] = up.x, q[i][5] = up.y, q[i][6] = up.z, q[i][7] = up.w;
            }
#pragma unroll
            for (int k = 0; k < KEYS_EACH; k++) {
                C key;
                key.load(shared.numbers + (across + ACROSS * k) * TileMemory<C>::stride + chunk * CHUNK * C::bytes, CHUNK, true);
                float sums[MINE] = {};
#pragma unroll
                for (int e = 0; e < CHUNK; e++) {
                    const float x = key.at(e);
#pragma unroll
                    for (int i = 0; i < MINE; i++) sums[i] = fmaf(q[i][e], x, sums[i]);
                }
#pragma unroll
                for (int i = 0; i < MINE; i++) scores[i][k] = chunk == 0 ? sums[i] : scores[i][k] + sums[i];
            }
        }
    }

    template <bool WHOLE> INLINE void add_values(int start, float (&sums)[MINE][CHUNK]) {
        const int mine = threadIdx.x / ACROSS * MINE, across = threadIdx.x % ACROSS;
#pragma unroll 1
        for (int run = 0; run < RUNS; run++) {
            float part[MINE][CHUNK] = {};
#pragma unroll 4
            for (int j = 0; j < RUN; j++) {
                const int place = run * RUN + j;
                C value;
                value.load(shared.numbers + place * TileMemory<C>::stride + across * CHUNK * C::bytes, CHUNK, true);
#pragma unroll
                for (int i = 0; i < MINE; i++) {
                    if (!WHOLE && !sees(mine + i, start + place)) continue;
                    const float weight = shared.weights[mine + i][place];
#pragma unroll
                    for (int e = 0; e < CHUNK; e++) part[i][e] = fmaf(weight, value.at(e), part[i][e]);
                }
            }
#pragma unroll
            for (int i = 0; i < MINE; i++)
#pragma unroll
                for (int e = 0; e < CHUNK; e++) sums[i][e] = run == 0 ? part[i][e] : sums[i][e] + part[i][e];
        }
    }

    // Sums of weights by runs.
    INLINE void add_weights() {
        for (int item = threadIdx.x; item < QUERIES * RUNS; item += THREADS) {
            const int query = item % QUERIES, run = item / QUERIES;
            float sum = 0.0f;
            for (int j = 0; j < RUN; j++) sum = sum + shared.weights[query][run * RUN + j];
            shared.run_sums[query][run] = sum;
        }
    }

    INLINE void run() {
        const int mine = threadIdx.x / ACROSS * MINE, across = threadIdx.x % ACROSS;
        const int last = position + count - 1;
        float m[MINE], l[MINE], results[MINE][CHUNK] = {};
        for (int i = 0; i < MINE; i++) m[i] = LOWEST, l[i] = 0.0f;
        load_queries();
        for (int partition = seen_from(0) / PARTITION; partition <= last / PARTITION; partition++) {
            const int start = partition * PARTITION;
            const bool whole = start + PARTITION - 1 <= position && start >= seen_from(QUERIES - 1);
            float scores[MINE][KEYS_EACH], most[MINE];
            __syncthreads();
            ((D *)this)->read_keys(start, scores);
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                most[i] = LOWEST;
#pragma unroll
                for (int k = 0; k < KEYS_EACH; k++) {
                    const bool seen = whole || sees(mine + i, start + across + ACROSS * k);
                    scores[i][k] = seen ? bend(a, scores[i][k]) : LOWEST;
                    most[i] = fmaxf(most[i], scores[i][k]);
                }
                for (int mask = ACROSS / 2; mask > 0; mask /= 2) most[i] = fmaxf(most[i], shuffle_xor(most[i], mask));
#pragma unroll
                for (int k = 0; k < KEYS_EACH; k++) {
                    const bool seen = whole || sees(mine + i, start + across + ACROSS * k);
                    shared.weights[mine + i][across + ACROSS * k] = seen ? expf(scores[i][k] - most[i]) : 0.0f;
                }
            }
            __syncthreads();
            float sums[MINE][CHUNK];
            ((D *)this)->read_values(start, whole, sums);
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                float kept, added, total = shared.run_sums[mine + i][0];
                for (int run = 1; run < RUNS; run++) total = total + shared.run_sums[mine + i][run];
                join_factors(m[i], most[i], kept, added);
                l[i] = join(l[i], kept, total, added);
                if (across < chunks)
#pragma unroll
                    for (int e = 0; e < CHUNK; e++) results[i][e] = join(results[i][e], kept, sums[i][e], added);
            }
        }
        if (across >= chunks) return;
        for (int i = 0; i < MINE; i++) {
            if (mine + i >= count) break;
            float *y = a.y + ((long)(first + mine + i) * a.heads + head) * a.size + across * CHUNK;
            for (int e = 0; e < CHUNK; e++) y[e] = results[i][e] / l[i];
        }
    }
};
