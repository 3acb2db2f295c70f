// Attention by matrix units, for many queries of a sequence: 64 at once, 16 of them in each warp, for one head.
// Devices that have warpgroups take attention_halves_groups.cu instead.
//
// A warp does all of its queries by itself; keys and values come to shared memory for the block, values while scores are
// computed, and the next partition's keys while values are weighed.
#include "attention_halves.h"

#define WARPS 4
#define THREADS (WARPS * LANES)
#define QUERIES (WARPS * ROWS)
#define KEY_TILES (PARTITION / 8)
#define AT_ONCE 8 // tiles of keys: sums of both pieces are held for so many

template <int CHUNKS> struct TileMemory {
    u8 keys[PARTITION * CHUNKS * 32], values[PARTITION * CHUNKS * 32];
    uint4 high[WARPS][CHUNKS][LANES], low[WARPS][CHUNKS][LANES]; // queries
    u64 slots[PARTITION];
};

INLINE void take_words(u32 (&to)[4], const uint4 &from) { to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w; }

template <int CHUNKS> struct Tile {
    const Attention &a;
    TileMemory<CHUNKS> &shared;
    const int head, first, count, position; // of queries
    const int *table;
    int chunks;
    float undo[2];

    INLINE int lane() const { return threadIdx.x % LANES; }
    INLINE int warp() const { return threadIdx.x / LANES; }
    INLINE int query(int i) const { return warp() * ROWS + lane() / 4 + 8 * i; } // of the thread's
    INLINE int seen_from(int query) const {
        const int p = position + query;
        return a.window > 0 && p + 1 > a.window ? p + 1 - a.window : 0;
    }
    INLINE int last() const { return position + count - 1; }
    INLINE bool sees(int i, int key) const { return key <= position + query(i) && key >= seen_from(query(i)); }

    // The places of a partition that some query sees.
    INLINE int first_place(int start) const { return seen_from(0) > start ? seen_from(0) - start : 0; }
    INLINE int end_place(int start) const { return last() - start < PARTITION - 1 ? last() - start + 1 : PARTITION; }

    INLINE void find_slots(int start) {
        const int place = threadIdx.x;
        if (place >= first_place(start) && place < end_place(start))
            shared.slots[place] = slot_of(a, table, start + place, head / (a.heads / a.kv_heads), HalfChunk::bytes);
    }
    INLINE void fetch_keys(int start) {
        fetch<CHUNKS, THREADS>(a, shared.keys, a.keys, shared.slots, first_place(start), end_place(start), PARTITION, false);
    }
    INLINE void fetch_values(int start) {
        fetch<CHUNKS, THREADS>(a, shared.values, a.values, shared.slots, first_place(start), end_place(start), PARTITION, true);
    }

    // The warp's queries, into shared memory: registers have no room for them.
    INLINE void load_queries() {
        const float *rows[2];
#pragma unroll
        for (int i = 0; i < 2; i++)
            rows[i] = query(i) < count ? a.q + ((long)(first + query(i)) * a.heads + head) * a.size : nullptr;
        QueryPieces<CHUNKS> q;
        q.load(rows, a.size);
        undo[0] = q.undo[0], undo[1] = q.undo[1];
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const u32(&high)[4] = q.high[chunk], (&low)[4] = q.low[chunk];
            shared.high[warp()][chunk][lane()] = {high[0], high[1], high[2], high[3]};
            shared.low[warp()][chunk][lane()] = {low[0], low[1], low[2], low[3]};
        }
    }

    INLINE void multiply_keys(int start, bool whole, float (&scores)[KEY_TILES][4]) {
#pragma unroll
        for (int from = 0; from < KEY_TILES; from += AT_ONCE) {
            float high[AT_ONCE][4] = {}, low[AT_ONCE][4] = {};
#pragma unroll 1
            for (int chunk = 0; chunk < chunks; chunk++) {
                u32 a_high[4], a_low[4];
                take_words(a_high, shared.high[warp()][chunk][lane()]);
                take_words(a_low, shared.low[warp()][chunk][lane()]);
#pragma unroll
                for (int n = 0; n < AT_ONCE; n += 2) {
                    u32 b[4];
                    take_keys<CHUNKS>(b, shared.keys, (from + n) * 8, chunk);
                    add_products(high, low, n, a_high, a_low, b);
                }
            }
#pragma unroll
            for (int n = 0; n < AT_ONCE; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const bool seen = whole || sees(i / 2, start + key_of(from + n, i));
                    scores[from + n][i] = seen ? bend(a, joined(high[n][i], low[n][i]) * undo[i / 2]) : LOWEST;
                }
        }
    }

    // Scores become weights; the largest score of a row, and the sum of its weights.
    INLINE void weigh(int start, bool whole, float (&scores)[KEY_TILES][4], float (&most)[2], float (&sums)[2]) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            most[i] = LOWEST;
#pragma unroll
            for (int n = 0; n < KEY_TILES; n++) most[i] = fmaxf(fmaxf(most[i], scores[n][2 * i]), scores[n][2 * i + 1]);
            most[i] = largest_of_row(most[i]);
        }
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const bool seen = whole || sees(i / 2, start + key_of(n, i));
                scores[n][i] = seen ? expf(scores[n][i] - most[i / 2]) : 0.0f;
            }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            sums[i] = sum_of_weights(scores, 0, i);
#pragma unroll
            for (int n = SUM_KEYS / 8; n < KEY_TILES; n += SUM_KEYS / 8) sums[i] = sums[i] + sum_of_weights(scores, n, i);
        }
    }

    // Whether a value that some query sees is no number, for all threads to know.
    INLINE bool spoiled() const {
        u32 found = 0;
        for (int i = threadIdx.x; i < PARTITION * 2 * chunks; i += THREADS) {
            const uint4 x = *(const uint4 *)(shared.values + place_of<CHUNKS>(i / (2 * chunks), i % (2 * chunks)));
            found |= spoiled_halves(x.x) | spoiled_halves(x.y) | spoiled_halves(x.z) | spoiled_halves(x.w);
        }
        return threads_where(found != 0) > 0;
    }

    // Ones where a row sees one of 16 keys, as a matrix unit takes them.
    INLINE void seen_ones(int key, u32 (&ones)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = key + key_of(i / 2, 0);
            ones[i] = (sees(i % 2, at) ? 0x3C00u : 0u) | (sees(i % 2, at + 1) ? 0x3C000000u : 0u);
        }
    }

    // Values of 16 elements, weighed. CAREFUL: what is no number spoils the rows that see it, and no other: it is taken for
    // zero, and counted beside that.
    template <bool CAREFUL>
    INLINE void multiply_values(
        int start, int chunk, const u32 (&a_high)[SIXTEENS][4], const u32 (&a_low)[SIXTEENS][4], float (&values)[2][4]
    ) const {
        float high[2][4] = {}, low[2][4] = {}, lost[2][4] = {};
#pragma unroll
        for (int k = 0; k < SIXTEENS; k++) {
            u32 b[4];
            take_values<CHUNKS>(b, shared.values, k * SIXTEEN, chunk);
            if (CAREFUL) {
                u32 ones[4], spoiled[4];
                seen_ones(start + k * SIXTEEN, ones);
#pragma unroll
                for (int i = 0; i < 4; i++) spoiled[i] = spoiled_halves(b[i]), b[i] &= ~spoiled[i], spoiled[i] &= 0x3C003C00u;
#pragma unroll
                for (int n = 0; n < 2; n++) multiply_tile_halves(lost[n], ones, spoiled[2 * n], spoiled[2 * n + 1]);
            }
            add_products(high, low, 0, a_high[k], a_low[k], b);
        }
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                values[n][i] = joined(high[n][i], low[n][i]) * (1.0f / WEIGHT_FACTOR);
                if (CAREFUL && lost[n][i] > 0.0f) values[n][i] = float_of_bits(0x7FFFFFFFu);
            }
    }

    template <bool CAREFUL>
    INLINE void add_values(
        int start, const u32 (&a_high)[SIXTEENS][4], const u32 (&a_low)[SIXTEENS][4], const float (&kept)[2], const float (&added)[2],
        float (&results)[CHUNKS][2][4]
    ) const {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            if (chunk >= chunks) break;
            float values[2][4];
            multiply_values<CAREFUL>(start, chunk, a_high, a_low, values);
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    results[chunk][n][i] = join(results[chunk][n][i], kept[i / 2], values[n][i], added[i / 2]);
        }
    }

    INLINE void run() {
        const int first_start = seen_from(0) / PARTITION * PARTITION;
        float m[2] = {LOWEST, LOWEST}, l[2] = {}, results[CHUNKS][2][4] = {};
        find_slots(first_start);
        __syncthreads();
        fetch_keys(first_start);
        copies_issued();
        fetch_values(first_start);
        copies_issued();
        load_queries();
#pragma unroll 1
        for (int start = first_start; start <= last(); start += PARTITION) {
            const bool whole = start + PARTITION - 1 <= position && start >= seen_from(QUERIES - 1);
            const bool more = start + PARTITION <= last();
            float most[2], sums[2], kept[2], added[2];
            u32 a_high[SIXTEENS][4], a_low[SIXTEENS][4];
            copies_done<1>();
            __syncthreads();
            if (more) find_slots(start + PARTITION);
            {
                float scores[KEY_TILES][4];
                multiply_keys(start, whole, scores);
                __syncthreads();
                if (more) fetch_keys(start + PARTITION);
                copies_issued();
                weigh(start, whole, scores, most, sums);
#pragma unroll
                for (int k = 0; k < SIXTEENS; k++) weight_pieces(scores, 2 * k, a_high[k], a_low[k]);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                join_factors(m[i], most[i], kept[i], added[i]);
                l[i] = join(l[i], kept[i], sums[i], added[i]);
            }
            copies_done<1>();
            __syncthreads();
            if (!whole && spoiled())
                add_values<true>(start, a_high, a_low, kept, added, results);
            else
                add_values<false>(start, a_high, a_low, kept, added, results);
            __syncthreads();
            if (more) fetch_values(start + PARTITION);
            copies_issued();
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (query(i / 2) >= count) continue;
            float *y = a.y + ((long)(first + query(i / 2)) * a.heads + head) * a.size;
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const int e = chunk * SIXTEEN + key_of(n, i);
                    if (e < a.size) y[e] = results[chunk][n][i] / l[i / 2];
                }
        }
    }
};

// Tiles that come last see most: they begin first.
template <int CHUNKS> INLINE void attend_tile(const Attention &a) {
    SHARED_BYTES(bytes);
    wait_for_producer();
    let_consumer_start();
    const int first = a.query_tiles[gridDim.x - 1 - blockIdx.x], sequence = a.sequences[first];
    const int left = a.query_starts[sequence + 1] - first;
    Tile<CHUNKS> tile = {
        a, *(TileMemory<CHUNKS> *)bytes, (int)blockIdx.y, first, left < QUERIES ? left : QUERIES, a.positions[first],
        a.tables + (long)sequence * a.blocks, (a.size + SIXTEEN - 1) / SIXTEEN
    };
    tile.run();
}

KERNEL_IN_COMPANY(attention_halves_tiles_64, Attention, THREADS, 2) { attend_tile<4>(a); }
KERNEL_IN_COMPANY(attention_halves_tiles_128, Attention, THREADS, 2) { attend_tile<8>(a); }
