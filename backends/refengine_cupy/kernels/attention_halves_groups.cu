// Attention by warpgroups, for many queries of a sequence: 128 at once, for one head, of which each of two warpgroups has
// 64. What a query comes to has the bits of attention_halves.cu.
//
// A third warpgroup fetches: two of its warps keys, two of them values, each 64 places of a partition, as soon as both
// others have done with what was there before; barriers in shared memory tell who may go on. Queries are read from shared
// memory, too: registers have room for sums, results, and the pieces of weights.
//
// Values that are no numbers spoil the queries that see them, and no other. Where a query of the block does not see all of
// a partition, the warps that fetch values take such numbers for zero, and leave note of them.
#include "attention_halves.h"
#include "warpgroups.h"

#ifdef HAS_WARPGROUPS
#define GROUPS 2
#define GROUP_WARPS (WARPGROUP / LANES)
#define GROUP_QUERIES 64
#define QUERIES (GROUPS * GROUP_QUERIES)
#define THREADS ((GROUPS + 1) * WARPGROUP)
#define STAGES 2
#define FETCHERS 2 // warps, for keys and as many for values
#define FETCHED (PARTITION / FETCHERS)
#define PANEL_CHUNKS (PANEL_COLUMNS / SIXTEEN)
#define PANEL_BYTES (PANEL_ROWS * PANEL_COLUMNS * 2)
#define KEY_TILES (PARTITION / 8)
#define PANEL_TILES (PANEL_COLUMNS / 8)
#define FEW_REGISTERS 40 // where nothing is computed; see the launch bounds
#define MANY_REGISTERS 232

// A block's queries: none, where count is 0.
struct Tile {
    int head, kv_head, sequence, first, count, position;
};

// Panels begin at multiples of 1024 bytes.
template <int CHUNKS> struct GroupMemory {
    static constexpr int panels = CHUNKS / PANEL_CHUNKS;
    u8 keys[STAGES][panels][PANEL_BYTES], values[STAGES][panels][PANEL_BYTES];
    u8 queries[GROUPS][2][panels][PANEL_BYTES / 2]; // high and low pieces, of 64 rows
    uint4 lost[STAGES][PARTITION];                  // a bit for each element of a value: whether it was no number
    u64 slots[2 * FETCHERS][FETCHED];
    u64 keys_there[STAGES], keys_done[STAGES], values_there[STAGES], values_done[STAGES];
    u64 queries_there[GROUPS], begun; // begun: the first scores of the first warpgroup are found
    int lost_from[STAGES][FETCHERS];  // where the last partition begins of which a warp has lost numbers
    Tile tile;
};

// The queries of a block, and the partitions that they see.
struct Queries {
    const Attention &a;
    const int count, position;

    INLINE int seen_from(int query) const {
        const int p = position + query;
        return a.window > 0 && p + 1 > a.window ? p + 1 - a.window : 0;
    }
    INLINE int last() const { return position + count - 1; }
    INLINE int first_start() const { return seen_from(0) / PARTITION * PARTITION; }
    // Whether each of so many queries sees all of a partition.
    INLINE bool whole(int start, int query, int queries) const {
        return start + PARTITION - 1 <= position + query && start >= seen_from(query + queries - 1);
    }
};

// A warp that fetches.
template <int CHUNKS, bool VALUES> struct Fetcher {
    static constexpr int units = 2 * CHUNKS, rows = LANES / units; // at once
    static constexpr int looks = FETCHED / LANES;

    const Queries &queries;
    GroupMemory<CHUNKS> &shared;
    const int warp; // of those that fetch the same

    INLINE int lane() const { return threadIdx.x % LANES; }
    INLINE u64 *slots() const { return shared.slots[(VALUES ? FETCHERS : 0) + warp]; }
    INLINE const u8 *layer() const { return VALUES ? queries.a.values : queries.a.keys; }
    INLINE u64 *there(int stage) const { return VALUES ? shared.values_there + stage : shared.keys_there + stage; }
    INLINE u64 *done(int stage) const { return VALUES ? shared.values_done + stage : shared.keys_done + stage; }
    // A thread's 16 bytes of a position.
    INLINE int unit() const { return lane() % units; }
    INLINE u8 *place(int stage, int row) const {
        u8 *panels = VALUES ? shared.values[stage][0] : shared.keys[stage][0];
        return panels + unit() / 8 * PANEL_BYTES + swizzled(row, unit() % 8);
    }
    INLINE bool seen(int position) const { return position >= queries.seen_from(0) && position <= queries.last(); }

    INLINE bool all_seen(int start) const { return seen(start + warp * FETCHED) && seen(start + warp * FETCHED + FETCHED - 1); }

    // Where positions lie, for the warp to know.
    INLINE void look_up(int start, u64 (&found)[looks]) const {
        const Attention &a = queries.a;
        const int *table = a.tables + (long)shared.tile.sequence * a.blocks;
        // 2^32 / block_size, rounded up: blocks are exact, where position times block_size is below 2^32.
        const u64 reciprocal = (u64)(0xFFFFFFFFu / (u32)kept(a.block_size)) + 1;
#pragma unroll
        for (int i = 0; i < looks; i++) {
            const int position = start + warp * FETCHED + i * LANES + lane();
            const int block = (int)((u64)(u32)position * reciprocal >> 32), offset = position - block * a.block_size;
            const u32 within = (u32)((offset * a.kv_heads + shared.tile.kv_head) * a.size * HalfChunk::bytes);
            found[i] = seen(position) ? (u64)(u32)table[block] * a.block_bytes + within : 0;
        }
    }
    INLINE void keep_slots(const u64 (&found)[looks]) {
        wait_for_lanes();
#pragma unroll
        for (int i = 0; i < looks; i++) slots()[i * LANES + lane()] = found[i];
        wait_for_lanes();
    }

    // All in the background, where every position of the warp is seen, and heads fill the panels.
    INLINE void fetch_all(int stage) const {
        constexpr int apart = 8 / rows; // in eight rows, places are swapped differently
        u8 *to[apart];
#pragma unroll
        for (int i = 0; i < apart; i++) to[i] = place(stage, warp * FETCHED + i * rows + lane() / units);
        const u64 *slot = slots() + lane() / units;
        const u8 *from = layer() + unit() * 16;
#pragma unroll 4
        for (int i = 0; i < FETCHED / rows; i++) copy16(to[i % apart] + i / apart * 8 * PANEL_COLUMNS * 2, from + slot[i * rows]);
    }
    // Zeros behind a head's last element, and in the place of values that no query sees. WIDE: in the background.
    template <bool WIDE> INLINE void fetch(int stage, int start) const {
        const int count = queries.a.size - unit() * 8;
        const u8 *from = layer() + unit() * 16;
#pragma unroll(WIDE ? 4 : 1)
        for (int i = 0; i < FETCHED; i += rows) {
            const int at = i + lane() / units, row = warp * FETCHED + at;
            const bool is_seen = seen(start + row);
            if (!VALUES && !is_seen) continue;
            u8 *to = place(stage, row);
            if (!WIDE && is_seen) {
                const u16 *numbers = (const u16 *)(from + slots()[at]);
#pragma unroll 1
                for (int e = 0; e < 8; e++) ((u16 *)to)[e] = e < count ? numbers[e] : (u16)0;
            } else if (is_seen && count > 0) {
                copy16(to, from + slots()[at]);
            } else {
                *(uint4 *)to = {0, 0, 0, 0};
            }
        }
    }

    // What the thread has fetched that is no number.
    INLINE void lose(int stage, int start) const {
        u32 found = 0;
#pragma unroll 1
        for (int i = lane() / units; i < FETCHED; i += rows) {
            const int row = warp * FETCHED + i;
            uint4 x = *(const uint4 *)place(stage, row);
            u32 words[4] = {x.x, x.y, x.z, x.w}, bits = 0;
#pragma unroll
            for (int w = 0; w < 4; w++) {
                const u32 spoiled = spoiled_halves(words[w]);
                words[w] &= ~spoiled, bits |= ((spoiled & 1) | (spoiled >> 16 & 2)) << 2 * w;
            }
            x = {words[0], words[1], words[2], words[3]};
            if (bits) *(uint4 *)place(stage, row) = x;
            ((u8 *)&shared.lost[stage][row])[unit()] = (u8)bits;
            found |= bits;
        }
        if (found) shared.lost_from[stage][warp] = start; // whichever thread says so
    }

    INLINE void run() {
        const bool wide = queries.a.size % 8 == 0 && (((u64)layer() | queries.a.block_bytes) & 15) == 0;
        u64 found[looks];
        look_up(queries.first_start(), found);
        int number = 0;
#pragma unroll 1
        for (int start = queries.first_start(); start <= queries.last(); start += PARTITION, number++) {
            const int stage = number % STAGES;
            keep_slots(found);
            wait_for_bytes(done(stage), number / STAGES % 2 ^ 1);
            if (wide && queries.a.size == CHUNKS * SIXTEEN && all_seen(start))
                fetch_all(stage);
            else if (wide)
                fetch<true>(stage, start);
            else
                fetch<false>(stage, start);
            copies_issued();
            look_up(start + PARTITION, found);
            copies_done<0>();
            const Queries again = {queries.a, queries.count, kept(queries.position)}; // registers are few
            if (VALUES && !again.whole(start, 0, QUERIES)) lose(stage, start);
            show_to_units();
            arrive(there(stage));
        }
    }
};

// A thread of a warpgroup: numbers of two of its 64 queries.
template <int CHUNKS> struct Group {
    static constexpr int panels = GroupMemory<CHUNKS>::panels;

    const Queries &queries;
    GroupMemory<CHUNKS> &shared;
    const int group;
    float undo[2];

    INLINE const Attention &a() const { return queries.a; }
    INLINE int lane() const { return threadIdx.x % LANES; }
    INLINE int row(int i) const { return (int)threadIdx.x % WARPGROUP / LANES * ROWS + lane() / 4 + 8 * i; }
    INLINE int query(int i) const { return group * GROUP_QUERIES + row(i); }
    // What a row sees, counted from a thread's first key of a partition.
    INLINE Sight sight(int i, int start) const {
        const int from = start + lane() % 4 * 2;
        return {queries.seen_from(query(i)) - from, queries.position + query(i) - from};
    }
    // Of the warp, which has read what was there.
    INLINE void release(u64 *barrier) const {
        wait_for_lanes();
        if (lane() == 0) arrive(barrier);
    }

    INLINE void load_queries() {
        const float *rows[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            rows[i] = nullptr;
            if (query(i) < queries.count)
                rows[i] = a().q + ((long)(shared.tile.first + query(i)) * a().heads + shared.tile.head) * a().size;
        }
        QueryPieces<CHUNKS> q;
        q.load(rows, a().size);
        undo[0] = q.undo[0], undo[1] = q.undo[1];
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int at = swizzled(row(i % 2), chunk % PANEL_CHUNKS * 2 + i / 2) + lane() % 4 * 4;
                *(u32 *)(shared.queries[group][0][chunk / PANEL_CHUNKS] + at) = q.high[chunk][i];
                *(u32 *)(shared.queries[group][1][chunk / PANEL_CHUNKS] + at) = q.low[chunk][i];
            }
        show_to_units();
        arrive(shared.queries_there + group);
        wait_for_bytes(shared.queries_there + group, 0);
    }

    INLINE void multiply_keys(int stage, float (&scores)[KEY_TILES][4]) {
        float high[4 * KEY_TILES], low[4 * KEY_TILES];
        const Panel keys = panel_behind(panel_at(shared.keys[0][0]), stage * panels * PANEL_BYTES);
        const Panel pieces = panel_behind(panel_at(shared.queries[0][0][0]), group * panels * PANEL_BYTES);
        begin_products();
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const int panel = chunk / PANEL_CHUNKS, part = chunk % PANEL_CHUNKS;
            const Panel b = panel_behind(keys, panel * PANEL_BYTES);
            multiply_panels(low, panel_behind(pieces, (panels + panel) * (PANEL_BYTES / 2)), b, part, chunk > 0);
            multiply_panels(high, panel_behind(pieces, panel * (PANEL_BYTES / 2)), b, part, chunk > 0);
        }
        products_issued();
        products_done<0>();
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) scores[n][i] = joined(high[4 * n + i], low[4 * n + i]) * undo[i / 2];
    }
    // Eight at once, which then become the last, so that the hyperbolic tangent is not there for each.
    INLINE void bend_all(float (&scores)[KEY_TILES][4]) const {
        if (a().softcap > 0.0f) {
#pragma unroll 1
            for (int turn = 0; turn < KEY_TILES / 2; turn++) {
                float bent[2][4];
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) bent[n][i] = bend(a(), scores[n][i]);
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) scores[n][i] = n + 2 < KEY_TILES ? scores[(n + 2) % KEY_TILES][i] : bent[n % 2][i];
            }
            return;
        }
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) scores[n][i] = scores[n][i] * a().scale;
    }
    INLINE void hide(int start, float other, float (&numbers)[KEY_TILES][4]) const {
        const Sight sights[2] = {sight(0, start), sight(1, start)};
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) numbers[n][i] = sights[i / 2].of(8 * n + i % 2) ? numbers[n][i] : other;
    }

    // Scores become weights; the largest score of a row, and the sum of its weights.
    INLINE void weigh(int start, bool whole, float (&scores)[KEY_TILES][4], float (&most)[2], float (&sums)[2]) const {
        if (!whole) hide(start, LOWEST, scores);
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
            for (int i = 0; i < 4; i++) scores[n][i] = expf(scores[n][i] - most[i / 2]);
        if (!whole) hide(start, 0.0f, scores);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            sums[i] = sum_of_weights(scores, 0, i);
#pragma unroll
            for (int n = SUM_KEYS / 8; n < KEY_TILES; n += SUM_KEYS / 8) sums[i] = sums[i] + sum_of_weights(scores, n, i);
        }
    }

    // Values of a panel's elements, weighed.
    INLINE void multiply_values(
        int stage, int panel, const u32 (&a_high)[SIXTEENS][4], const u32 (&a_low)[SIXTEENS][4], float (&values)[4 * PANEL_TILES]
    ) const {
        float low[4 * PANEL_TILES];
        const Panel b = panel_behind(panel_at(shared.values[0][panel]), stage * panels * PANEL_BYTES);
        begin_products();
#pragma unroll
        for (int k = 0; k < SIXTEENS; k++) {
            multiply_group_rows(low, a_low[k], b, k, k > 0);
            multiply_group_rows(values, a_high[k], b, k, k > 0);
        }
        products_issued();
        products_done<0>();
#pragma unroll
        for (int i = 0; i < 4 * PANEL_TILES; i++) values[i] = joined(values[i], low[i]) * (1.0f / WEIGHT_FACTOR);
    }

    // What a row has seen that was no number makes its results none.
    INLINE void spoil(int stage, int start, int panel, float (&values)[4 * PANEL_TILES]) const {
        u32 lost[2][2] = {};
#pragma unroll 1
        for (int place = 0; place < PARTITION; place++) {
            const u32 *bits = (const u32 *)&shared.lost[stage][place] + 2 * panel;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int position = queries.position + query(i);
                const Sight seen = {queries.seen_from(query(i)), position};
                if (seen.of(start + place)) lost[i][0] |= bits[0], lost[i][1] |= bits[1];
            }
        }
#pragma unroll
        for (int n = 0; n < PANEL_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (lost[i / 2][n / 4] >> (n % 4 * 8 + lane() % 4 * 2 + i % 2) & 1) values[4 * n + i] = float_of_bits(0x7FFFFFFFu);
    }

    INLINE bool sees_some(int start) const {
        const int first = group * GROUP_QUERIES, end = queries.count < first + GROUP_QUERIES ? queries.count : first + GROUP_QUERIES;
        return start <= queries.position + end - 1 && start + PARTITION > queries.seen_from(first);
    }

    INLINE void run() {
        float m[2] = {LOWEST, LOWEST}, l[2] = {}, results[panels][4 * PANEL_TILES] = {};
        load_queries();
        int number = 0;
        if (group > 0) wait_for_bytes(&shared.begun, 0); // so that one computes weights while the other multiplies
#pragma unroll 1
        for (int start = queries.first_start(); start <= queries.last(); start += PARTITION, number++) {
            const int stage = number % STAGES, parity = number / STAGES % 2;
            wait_for_bytes(shared.keys_there + stage, parity);
            if (!sees_some(start)) {
                release(shared.keys_done + stage);
                wait_for_bytes(shared.values_there + stage, parity);
                release(shared.values_done + stage);
                continue;
            }
            const bool whole = queries.whole(start, group * GROUP_QUERIES, GROUP_QUERIES);
            float most[2], sums[2], kept[2], added[2];
            u32 a_high[SIXTEENS][4], a_low[SIXTEENS][4];
            {
                float scores[KEY_TILES][4];
                multiply_keys(stage, scores);
                release(shared.keys_done + stage);
                if (group == 0 && number == 0) arrive(&shared.begun);
                bend_all(scores);
                weigh(start, whole, scores, most, sums);
#pragma unroll
                for (int k = 0; k < SIXTEENS; k++) weight_pieces(scores, 2 * k, a_high[k], a_low[k]);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                join_factors(m[i], most[i], kept[i], added[i]);
                l[i] = join(l[i], kept[i], sums[i], added[i]);
            }
            wait_for_bytes(shared.values_there + stage, parity);
            bool spoiled = false;
#pragma unroll
            for (int i = 0; i < FETCHERS; i++) spoiled |= shared.lost_from[stage][i] == start;
#pragma unroll
            for (int panel = 0; panel < panels; panel++) {
                float values[4 * PANEL_TILES];
                multiply_values(stage, panel, a_high, a_low, values);
                if (spoiled) spoil(stage, start, panel, values);
#pragma unroll
                for (int i = 0; i < 4 * PANEL_TILES; i++)
                    results[panel][i] = join(results[panel][i], kept[i / 2 % 2], values[i], added[i / 2 % 2]);
            }
            release(shared.values_done + stage);
        }
        const int column = kept(lane() % 4 * 2); // so that elements are not found before
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (query(i / 2) >= queries.count) continue;
            float *y = a().y + ((long)(shared.tile.first + query(i / 2)) * a().heads + shared.tile.head) * a().size;
#pragma unroll
            for (int panel = 0; panel < panels; panel++)
#pragma unroll
                for (int n = 0; n < PANEL_TILES; n++) {
                    const int e = panel * PANEL_COLUMNS + n * 8 + column + i % 2;
                    if (e < a().size) y[e] = results[panel][4 * n + i] / l[i / 2];
                }
        }
    }
};

// A head of the number-th 128 queries, over all sequences: none behind the last.
INLINE Tile find_tile(const Attention &a, int number, int head) {
    const int kv_head = head / (a.heads / a.kv_heads);
    for (int sequence = 0; a.query_starts[sequence] < a.tokens; sequence++) {
        const int start = a.query_starts[sequence], count = a.query_starts[sequence + 1] - start;
        const int tiles = (count + QUERIES - 1) / QUERIES, done = number * QUERIES;
        if (number < tiles) {
            const int left = count - done;
            return {head, kv_head, sequence, start + done, left < QUERIES ? left : QUERIES, a.positions[start + done]};
        }
        number -= tiles;
    }
    return {};
}

// All heads of the tiles that come last, which see most, begin first.
template <int CHUNKS> INLINE void attend_tile(const Attention &a) {
    SHARED_KILOBYTES(bytes);
    GroupMemory<CHUNKS> &shared = *(GroupMemory<CHUNKS> *)bytes;
    wait_for_producer();
    let_consumer_start();
    const int group = threadIdx.x / WARPGROUP;
    if (threadIdx.x == 0) {
        const int block = blockIdx.y * gridDim.x + blockIdx.x;
        const Tile tile = find_tile(a, gridDim.x - 1 - block / gridDim.y, block % gridDim.y);
        const int warps = (tile.count > GROUP_QUERIES ? GROUPS : 1) * GROUP_WARPS;
        for (int i = 0; i < STAGES; i++) {
            begin_barrier(shared.keys_there + i, FETCHERS * LANES), begin_barrier(shared.values_there + i, FETCHERS * LANES);
            begin_barrier(shared.keys_done + i, warps), begin_barrier(shared.values_done + i, warps);
            for (int k = 0; k < FETCHERS; k++) shared.lost_from[i][k] = -1;
        }
        for (int i = 0; i < GROUPS; i++) begin_barrier(shared.queries_there + i, WARPGROUP);
        begin_barrier(&shared.begun, WARPGROUP);
        shared.tile = tile;
    }
    __syncthreads();
    const Tile tile = shared.tile;
    if (tile.count == 0) return;
    const Queries queries = {a, tile.count, tile.position};
    if (group == GROUPS) {
        give_registers<FEW_REGISTERS>();
        const int warp = threadIdx.x % WARPGROUP / LANES;
        if (warp < FETCHERS) {
            Fetcher<CHUNKS, false> keys = {queries, shared, warp};
            keys.run();
        } else {
            Fetcher<CHUNKS, true> values = {queries, shared, warp - FETCHERS};
            values.run();
        }
        return;
    }
    take_registers<MANY_REGISTERS>();
    Group<CHUNKS> mine = {queries, shared, group};
    if (group * GROUP_QUERIES < tile.count) mine.run();
}

KERNEL_IN_COMPANY(attention_halves_groups_64, Attention, THREADS, 1) { attend_tile<4>(a); }
KERNEL_IN_COMPANY(attention_halves_groups_128, Attention, THREADS, 1) { attend_tile<8>(a); }
#endif
