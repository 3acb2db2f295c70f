// Attention's arithmetic: what every kernel of it must do in the same order, so that a query's result depends on
// its position and context alone.
//
// - A score is the sum, in order, of the products of CHUNK elements each, which fmaf adds up from zero.
// - Positions are cut into partitions of PARTITION. In one, the largest score m is found; the weights are
//   exp(score - m); they, and the values weighed by them, are added up from zero by runs of RUN positions, and the
//   runs in order. What a query does not see takes part in none of this.
// - Partitions are joined in order, by join().
#pragma once
#include "vendor.h"

#define PARTITION 128
#define CHUNK 8
#define RUN 16
#define RUNS (PARTITION / RUN)
#define LOWEST -3.402823466e38f

struct Attention {
    const float *q;
    const u8 *keys, *values; // of one layer in block 0; of a sealed cache, its exact copies
    const u8 *sealed_keys, *sealed_values;
    const int *tables, *sealed_tables, *sequences, *positions, *query_starts;
    const int *query_tiles; // first queries of tiles that have queries of one sequence each
    float *y;
    float *partials; // [T, heads, partitions, size + 2]
    u32 *counters;   // [T, kv_heads], zero
    u64 block_bytes, sealed_block_bytes;
    int tokens, blocks; // blocks: columns of the tables
    int heads, kv_heads, size, block_size, window, partitions;
    float scale, softcap;
    // Where queries are turned, and a token's key and value stored, on the way; see attention_halves.cu.
    const float *new_keys, *new_values; // [T, kv_heads, size]
    const float *turns;                 // [T, dims]
    const int *slots;
    int dims, halves;
};

struct HalfChunk {
    static constexpr int bytes = 2;
    u32 v[4];
    INLINE void load(const u8 *p, int count, bool wide) {
        if (wide) {
            const uint4 x = *(const uint4 *)p;
            v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
            return;
        }
        v[0] = v[1] = v[2] = v[3] = 0;
#pragma unroll
        for (int e = 0; e < CHUNK; e++)
            if (e < count) v[e / 2] |= (u32)((const u16 *)p)[e] << 16 * (e % 2);
    }
    INLINE float at(int e) const { return half_to_float((u16)(v[e / 2] >> 16 * (e % 2))); }
};

struct FloatChunk {
    static constexpr int bytes = 4;
    float v[8];
    INLINE void load(const u8 *p, int count, bool wide) {
        const float *from = (const float *)p;
        if (wide) {
            const float4 x = load_float4(from), y = load_float4(from + 4);
            v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
            v[4] = y.x, v[5] = y.y, v[6] = y.z, v[7] = y.w;
            return;
        }
#pragma unroll
        for (int e = 0; e < CHUNK; e++) v[e] = e < count ? from[e] : 0.0f;
    }
    INLINE float at(int e) const { return v[e]; }
};

struct AsTheyAre {
    template <class C> INLINE float number(const C &chunk, int k, int e) const { return chunk.at(e); }
};

INLINE float bend(const Attention &a, float sum) {
    const float score = sum * a.scale;
    return a.softcap > 0.0f ? tanhf(score / a.softcap) * a.softcap : score;
}

// Factors of what was found so far (largest score m) and of another partition (largest score other).
INLINE void join_factors(float &m, float other, float &kept, float &added) {
    const float larger = fmaxf(m, other);
    kept = expf(m - larger);
    added = expf(other - larger);
    m = larger;
}
INLINE float join(float x, float kept, float other, float added) { return x * kept + other * added; }

// Where the numbers of a position are, from where they are in block 0: keys or values of one head.
INLINE u64 slot_of(const Attention &a, const int *table, int position, int head, int bytes) {
    const int block = table[position / a.block_size], offset = position % a.block_size;
    return (u64)block * a.block_bytes + (u64)((offset * a.kv_heads + head) * a.size * bytes);
}
