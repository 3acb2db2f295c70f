// Attention by tiles of queries over a sealed cache: its numbers are opened on their way into shared memory.
//
// The host names the formats KEYS, VALUES and EXACT; blocks have whole runs of positions, and everything lies where it
// can be read by words. Blocks that begin before a tile's first query may be some queries' own, and sealed for later
// ones: a partition with such blocks is treated twice, as others read it and as their own queries do.
#include "attention_tile.h"
#include "sealed.h"

#define FOUR 4 // positions that a thread opens at once, all of one block
#define NOWHERE 0x7FFFFFFF

struct SealedTileMemory : TileMemory<FloatChunk> {
    int cuts[QUERIES]; // where a query's own block begins; NOWHERE for the first block, which all read alike
};

struct SealedTile : QueryTile<FloatChunk, SealedTile> {
    const int *exact_table, *sealed_table;
    const int *cuts;
    Block shape;
    int first_cut, last_cut; // of the tile's blocks that some query reads as its own

    INLINE bool has_own(int start) const { return first_cut < start + PARTITION && last_cut != NOWHERE; }
    INLINE bool has_others(int start) const { return start < last_cut; }

    // Whether some query of the tile reads a block: as its own, or as others do, who may not see it any more.
    INLINE bool needed(bool own, int key, int block) const {
        const int last = position + count - 1, end = (block + 1) * a.block_size;
        if (key > last) return false;
        if (own) return key >= first_cut;
        if (block == 0) return a.block_size > seen_from(0);
        const int reader = position > end ? position : end;
        return reader <= last && end > seen_from(reader - position);
    }

    template <class C, class O> INLINE void store(float *to, const C (&numbers)[FOUR], const O &opener) const {
#pragma unroll
        for (int k = 0; k < FOUR; k++) {
            float x[CHUNK];
#pragma unroll
            for (int e = 0; e < CHUNK; e++) x[e] = opener.number(numbers[k], k, e);
            float4 *row = (float4 *)(to + k * (TileMemory<FloatChunk>::stride / 4));
            row[0] = make_float4(x[0], x[1], x[2], x[3]), row[1] = make_float4(x[4], x[5], x[6], x[7]);
        }
    }
    template <class C> INLINE void open_floats(float *to, const u8 *block, int offset, int kv_head, int chunk) const {
        C numbers[FOUR];
        const u8 *row = block + FloatParts<C>{shape}.numbers(offset, kv_head) + chunk * CHUNK * C::bytes;
#pragma unroll
        for (int k = 0; k < FOUR; k++) numbers[k].load(row + k * shape.kv_heads * shape.size * C::bytes, CHUNK, true);
        store(to, numbers, AsTheyAre{});
    }
    template <class F> INLINE void load_codes(F (&codes)[FOUR], const u8 *row, int chunk) const {
#pragma unroll
        for (int k = 0; k < FOUR; k++) codes[k].load(row + k * shape.kv_heads * F::row_bytes(shape.size), shape.size, chunk);
    }
    template <class F> INLINE void open_keys(float *to, const u8 *block, int offset, int kv_head, int chunk) const {
        if constexpr (F::integers) {
            const KeyParts<F> parts = {shape};
            F codes[FOUR];
            ChannelScales<F> scales;
            load_codes(codes, block + parts.codes(offset, kv_head), chunk);
            scales.load(block + parts.steps(kv_head) + chunk * CHUNK, block + parts.centres(kv_head) + chunk * CHUNK);
            store(to, codes, scales);
        } else {
            open_floats<F>(to, block, offset, kv_head, chunk);
        }
    }
    template <class F> INLINE void open_values(float *to, const u8 *block, int offset, int kv_head, int chunk) const {
        if constexpr (F::integers) {
            const ValueParts<F> parts = {shape};
            F codes[FOUR];
            PositionScales<F, FOUR> scales;
            load_codes(codes, block + parts.codes(offset, kv_head), chunk);
            const int stride = shape.kv_heads * shape.groups(), group = chunk * CHUNK / VALUE_GROUP;
            scales.load(block + parts.steps(offset, kv_head) + group, block + parts.centres(offset, kv_head) + group, stride);
            store(to, codes, scales);
        } else {
            open_floats<F>(to, block, offset, kv_head, chunk);
        }
    }

    // Keys or values of a partition as numbers; what no query reads may be anything.
    template <bool OF_KEYS> INLINE void load(int start, bool own) {
        const int kv_head = head / (a.heads / a.kv_heads);
        for (int i = threadIdx.x; i < PARTITION / FOUR * chunks; i += THREADS) {
            const int four = i / chunks * FOUR, chunk = i % chunks, key = start + four;
            const int block = key / a.block_size, offset = key - block * a.block_size;
            if (!needed(own, key, block)) continue;
            float *to = (float *)(shared.numbers + four * TileMemory<FloatChunk>::stride) + chunk * CHUNK;
            if (own || block == 0) {
                const u8 *at = (OF_KEYS ? a.keys : a.values) + (u64)exact_table[block] * a.block_bytes;
                open_floats<EXACT>(to, at, offset, kv_head, chunk);
                continue;
            }
            const u8 *at = (OF_KEYS ? a.sealed_keys : a.sealed_values) + (u64)sealed_table[block] * a.sealed_block_bytes;
            if (OF_KEYS)
                open_keys<KEYS>(to, at, offset, kv_head, chunk);
            else
                open_values<VALUES>(to, at, offset, kv_head, chunk);
        }
    }

    INLINE void read_keys(int start, float (&scores)[MINE][KEYS_EACH]) {
        const int mine = threadIdx.x / ACROSS * MINE, across = threadIdx.x % ACROSS;
        const bool both = has_own(start);
#pragma unroll 1
        for (int own = both; own >= 0; own--) {
            if (!own && both && !has_others(start)) break;
            load<true>(start, own);
            __syncthreads();
            multiply_keys(scores);
            if (!both) break;
            // What queries read of their own blocks waits where its weights will be.
#pragma unroll
            for (int i = 0; i < MINE; i++)
#pragma unroll
                for (int k = 0; k < KEYS_EACH; k++) {
                    const int place = across + ACROSS * k;
                    float &kept = shared.weights[mine + i][place];
                    if (own)
                        kept = scores[i][k];
                    else if (start + place >= cuts[mine + i])
                        scores[i][k] = kept;
                }
            __syncthreads();
        }
    }

    // Values of blocks that are queries' own, or of all others, weighed for these queries.
    INLINE void add_some(int start, bool own, float (&sums)[MINE][CHUNK]) {
        const int mine = threadIdx.x / ACROSS * MINE, across = threadIdx.x % ACROSS;
#pragma unroll 1
        for (int run = 0; run < RUNS; run++) {
            float part[MINE][CHUNK] = {};
            bool taken[MINE];
#pragma unroll
            for (int i = 0; i < MINE; i++) taken[i] = own == (start + run * RUN >= cuts[mine + i]);
#pragma unroll 1
            for (int j = 0; j < RUN; j++) {
                const int place = run * RUN + j;
                FloatChunk value;
                value.load(shared.numbers + place * TileMemory<FloatChunk>::stride + across * CHUNK * 4, CHUNK, true);
#pragma unroll
                for (int i = 0; i < MINE; i++) {
                    if (!taken[i] || !sees(mine + i, start + place)) continue;
                    const float weight = shared.weights[mine + i][place];
#pragma unroll
                    for (int e = 0; e < CHUNK; e++) part[i][e] = fmaf(weight, value.at(e), part[i][e]);
                }
            }
#pragma unroll
            for (int i = 0; i < MINE; i++)
                if (taken[i])
#pragma unroll
                    for (int e = 0; e < CHUNK; e++) sums[i][e] = run == 0 ? part[i][e] : sums[i][e] + part[i][e];
        }
    }

    INLINE void read_values(int start, bool whole, float (&sums)[MINE][CHUNK]) {
        const bool mine = (int)threadIdx.x % ACROSS < chunks;
        add_weights();
        if (!has_own(start)) {
            load<false>(start, false);
            __syncthreads();
            if (!mine) return;
            if (whole)
                add_values<true>(start, sums);
            else
                add_values<false>(start, sums);
            return;
        }
#pragma unroll
        for (int i = 0; i < MINE; i++)
#pragma unroll
            for (int e = 0; e < CHUNK; e++) sums[i][e] = 0.0f;
#pragma unroll 1
        for (int own = !has_others(start); own < 2; own++) {
            load<false>(start, own);
            __syncthreads();
            if (mine) add_some(start, own, sums);
            __syncthreads();
        }
    }
};

KERNEL_IN_COMPANY(attention_sealed_tiles, Attention, THREADS, 1) {
    SHARED_BYTES(bytes);
    wait_for_producer();
    let_consumer_start();
    SealedTileMemory &memory = *(SealedTileMemory *)bytes;
    const int first = a.query_tiles[blockIdx.x], sequence = a.sequences[first], position = a.positions[first];
    const int left = a.query_starts[sequence + 1] - first, count = left < QUERIES ? left : QUERIES;
    for (int query = threadIdx.x; query < QUERIES; query += THREADS) {
        const int cut = (position + query) / a.block_size * a.block_size;
        memory.cuts[query] = cut > 0 ? cut : NOWHERE;
    }
    const int first_own = position / a.block_size * a.block_size;
    const int last_own = (position + count - 1) / a.block_size * a.block_size;
    SealedTile tile = {
        {a, memory, (int)blockIdx.y, first, count, position, a.size / CHUNK},
        a.tables + (long)sequence * a.blocks, a.sealed_tables + (long)sequence * a.blocks, memory.cuts,
        {a.block_size, a.kv_heads, a.size},
        first_own > 0 ? first_own : a.block_size, last_own > 0 ? last_own : NOWHERE
    };
    tile.run();
}
