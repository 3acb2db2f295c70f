// Attention by matrix units, one token at a time: for few queries, or short contexts.
//
// A block of threads has a token, a key head and its query heads, and of the context's partitions every gridDim.x-th: in
// SPLIT what they find is left in memory, and the block that comes last joins it; else the block is alone and joins what
// it finds on its way. Of a partition, a warp has 32 keys and a quarter of the values' elements. It has fetched
// its keys by itself, up to three halves of a partition (keys, or values) ahead, and a quarter of the positions of values:
// warps wait for each other only where the largest score is found, and where the weights are.
//
// A matrix unit's 16 rows are eight query heads' first pieces, then the same heads' second pieces; see attention_halves.h.
//
// TURNING: each token is its sequence's only one in the step. Then queries are turned here, and so is the token's key,
// which is stored, as its value is, by the block that has the last partition: no other reads it.
//
// The kernel ahead writes no keys and values but those of the step's tokens, and those before it have ended: so others are
// fetched before that one ends.
#include "attention_halves.h"
#include "rope.h"

#define WARPS 4
#define THREADS (WARPS * LANES)
#define HEADS 8 // query heads at once
#define WARP_KEYS (PARTITION / WARPS)
#define KEY_TILES (WARP_KEYS / 8)
#define STAGES 3
#define MOST_FACTORS 512

template <int CHUNKS> struct FewMemory {
    u8 stages[STAGES][WARPS][WARP_KEYS * CHUNKS * 32]; // of a warp: its keys, or its elements of all values
    uint4 weights[SIXTEENS][LANES];
    float most[WARPS][HEADS], sums[WARPS][HEADS];
    u64 slots[WARPS][PARTITION];
    u16 fresh[2][CHUNKS * SIXTEEN]; // the token's key and value
};

template <int CHUNKS, bool SPLIT, bool TURNING> struct Few {
    static constexpr int mine = CHUNKS / WARPS; // chunks of values of a warp
    static constexpr int units = 2 * mine;      // the same, in 16 bytes of a position

    const Attention &a;
    FewMemory<CHUNKS> &shared;
    const int token, head; // of keys
    const int *table;
    const Sight sight;
    const int first, last, step; // partitions of the block; its first, the context's last
    const u64 reciprocal;        // 2^32 / block_size, rounded up
    const bool even;             // whether heads are filled, and everything lies where it can be copied by 16 bytes

    INLINE int lane() const { return threadIdx.x % LANES; }
    INLINE int warp() const { return threadIdx.x / LANES; }
    // The places of a partition that are seen; of these, those that can be fetched.
    INLINE int first_place(int start) const { return sight.first > start ? sight.first - start : 0; }
    INLINE int end_place(int start) const { return sight.last - start < PARTITION - 1 ? sight.last - start + 1 : PARTITION; }
    INLINE int fetched_end(int start) const {
        return TURNING && sight.last - start < PARTITION ? sight.last - start : end_place(start);
    }
    INLINE u8 *stage(int number) { return shared.stages[number % STAGES][warp()]; }

    // Which block of a sequence has a position: exact, where position times block_size is below 2^32.
    INLINE int block_of(int position) const { return (int)((u64)(u32)position * reciprocal >> 32); }
    // Blocks of the four positions of a partition that a thread looks up; then where they lie, for its warp.
    INLINE void look_up(int start, int (&blocks)[WARPS]) const {
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            const int key = start + i * LANES + lane();
            blocks[i] = sight.of(key) ? table[block_of(key)] : 0;
        }
    }
    INLINE void keep_slots(int start, const int (&blocks)[WARPS]) {
        wait_for_lanes();
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            const int key = start + i * LANES + lane(), offset = key - block_of(key) * a.block_size;
            const u32 within = (u32)((offset * a.kv_heads + head) * a.size * HalfChunk::bytes);
            shared.slots[warp()][i * LANES + lane()] = (u64)(u32)blocks[i] * a.block_bytes + within;
        }
        wait_for_lanes();
    }

    // 16 bytes of a position: WIDE, in the background. Zeros behind its last element.
    template <bool WIDE> INLINE void put(u8 *to, const u8 *from, int unit) const {
        const int count = a.size - unit * 8;
        if (WIDE && count > 0) {
            copy16(to, from + unit * 16);
            return;
        }
        HalfChunk numbers = {};
        if (!WIDE && count > 0) numbers.load(from + unit * 16, count, false);
        const uint4 words = {numbers.v[0], numbers.v[1], numbers.v[2], numbers.v[3]};
        *(uint4 *)to = words;
    }
    INLINE bool wide(const u8 *layer) const { return a.size % 8 == 0 && (((u64)layer | a.block_bytes) & 15) == 0; }

    template <bool WIDE> INLINE void fetch_keys(u8 *to, int start) const {
        const int row = lane() / 4, unit = lane() % 4, from = first_place(start), until = fetched_end(start);
#pragma unroll(WIDE ? KEY_TILES : 1)
        for (int i = 0; i < KEY_TILES; i++) {
            const int place = warp() * WARP_KEYS + i * 8 + row;
            if (place < from || place >= until) continue;
            const u8 *slot = a.keys + shared.slots[warp()][place];
#pragma unroll(WIDE ? CHUNKS / 2 : 1)
            for (int j = 0; j < CHUNKS / 2; j++) put<WIDE>(to + place_of<CHUNKS>(i * 8 + row, unit + 4 * j), slot, unit + 4 * j);
        }
    }
    // A partition that is there whole: what is looked up comes first, as each waits as long as all.
    INLINE bool full(int start) const { return even && first_place(start) == 0 && fetched_end(start) == PARTITION; }
    INLINE void fetch_all_keys(u8 *to) const {
        for_whole_rows([&](int row, int unit, u64 slot) {
            copy16(to + place_of<CHUNKS>(row, unit), a.keys + slot + unit * 16);
        });
    }
    // The warp's 32 positions, those that go together side by side, as memory is fast with.
    template <class F> INLINE void for_whole_rows(const F &body) const {
        constexpr int rows = LANES / (2 * CHUNKS), at_once = 8;
        const int row = lane() / (2 * CHUNKS), unit = lane() % (2 * CHUNKS);
#pragma unroll
        for (int from = 0; from < WARP_KEYS; from += rows * at_once) {
            u64 slots[at_once];
#pragma unroll
            for (int i = 0; i < at_once; i++) slots[i] = shared.slots[warp()][warp() * WARP_KEYS + from + i * rows + row];
#pragma unroll
            for (int i = 0; i < at_once; i++) body(from + i * rows + row, unit, slots[i]);
        }
    }
    INLINE void fetch_keys(int number, int start) {
        if (full(start))
            fetch_all_keys(stage(number));
        else if (wide(a.keys))
            fetch_keys<true>(stage(number), start);
        else
            fetch_keys<false>(stage(number), start);
    }

    // Where 16 bytes of the warp's elements lie: those of eight neighbours in different banks.
    INLINE int value_place(int row, int unit) const {
        return (row * units + (unit ^ (units == 4 ? row / 2 % 4 : row / 4 % 2))) * 16;
    }
    // By 16 positions: those among them that are not seen have zeros.
    template <bool WIDE> INLINE void fetch_values(u8 *to, int start) const {
        constexpr int rows = LANES / units;
        const int row = lane() / units, unit = lane() % units;
        const int from = first_place(start), end = end_place(start), until = fetched_end(start);
#pragma unroll(WIDE ? 4 : 1)
        for (int i = from / SIXTEEN * SIXTEEN; i < (end + SIXTEEN - 1) / SIXTEEN * SIXTEEN; i += rows) {
            const int place = i + row;
            u8 *at = to + value_place(place, unit);
            if (place >= from && place < until)
                put<WIDE>(at, a.values + shared.slots[warp()][place], warp() * units + unit);
            else
                *(uint4 *)at = {0, 0, 0, 0};
        }
    }
    // A warp fetches some positions for all warps, which meet before they read them: a position's elements lie together.
    INLINE void fetch_all_values(int number) const {
        u8(&stage)[WARPS][WARP_KEYS * CHUNKS * 32] = shared.stages[number % STAGES];
        for_whole_rows([&](int row, int unit, u64 slot) {
            copy16(stage[unit / units] + value_place(warp() * WARP_KEYS + row, unit % units), a.values + slot + unit * 16);
        });
    }
    INLINE void fetch_values(int number, int start) {
        if (full(start))
            fetch_all_values(number);
        else if (wide(a.values))
            fetch_values<true>(stage(number), start);
        else
            fetch_values<false>(stage(number), start);
    }

    // Queries, padded with zeros, where weights will be, in an order that keeps a thread's banks apart; a thread has an
    // element. The token's key and value, where the block needs them: to shared memory, and where they are kept.
    INLINE float *query(int h, int e) { return (float *)shared.weights + h * CHUNKS * SIXTEEN + (e ^ h * 8); }
    INLINE void prepare(long row, int heads, int slot) {
        const int e = threadIdx.x;
        if (e >= CHUNKS * SIXTEEN) return;
        const bool real = e < a.size;
        const ElementTurn turn(a.turns + (long)token * a.dims, e, TURNING && real ? a.dims : 0, a.halves);
        if (TURNING && (last - first) % step == 0) {
            const long at = ((long)token * a.kv_heads + head) * a.size;
            const float key = real ? a.new_keys[at + e] : 0.0f, other = real ? a.new_keys[at + turn.other] : 0.0f;
            const float value = real ? a.new_values[at + e] : 0.0f;
            const u16 halves[2] = {HalfSlots::of(turn.of(key, other)), HalfSlots::of(value)};
            shared.fresh[0][e] = halves[0], shared.fresh[1][e] = halves[1];
            if (real) {
                const u64 block = (u64)block_of(slot) * a.block_bytes;
                const long within = ((long)(slot - block_of(slot) * a.block_size) * a.kv_heads + head) * a.size + e;
                ((u16 *)(a.keys + block))[within] = halves[0], ((u16 *)(a.values + block))[within] = halves[1];
            }
        }
        const float *q = a.q + row * a.size;
#pragma unroll 1
        for (int h = 0; h < heads; h++, q += a.size) *query(h, e) = real ? turn.of(q[e], q[turn.other]) : 0.0f;
    }

    // The thread's part of the queries, in pieces; their factor's inverse.
    INLINE float load_queries(int heads, u32 (&pieces)[CHUNKS][4]) {
        const int h = lane() / 4;
        float2 x[CHUNKS][2];
        u32 largest = 0;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                x[chunk][i] = {0.0f, 0.0f};
                if (h < heads) x[chunk][i] = *(const float2 *)query(h, chunk * SIXTEEN + i * 8 + lane() % 4 * 2);
                const u32 one = bits_of(x[chunk][i].x) & 0x7FFFFFFFu, two = bits_of(x[chunk][i].y) & 0x7FFFFFFFu;
                largest = largest > one ? largest : one, largest = largest > two ? largest : two;
            }
#pragma unroll
        for (int mask = 1; mask < 4; mask *= 2) {
            const u32 other = (u32)shuffle_xor((int)largest, mask);
            largest = largest > other ? largest : other;
        }
        const int exponent = row_exponent(largest);
        const float factor = power_of_two(exponent);
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                split(x[chunk][i].x * factor, x[chunk][i].y * factor, pieces[chunk][2 * i], pieces[chunk][2 * i + 1]);
        return power_of_two(-exponent);
    }

    // Scores of the warp's keys.
    INLINE void multiply_keys(const u8 *keys, const u32 (&q)[CHUNKS][4], float undo, int key, float (&scores)[KEY_TILES][2]) const {
        float sums[KEY_TILES][4] = {};
        const int tile = lane() / 8;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
            for (int n = 0; n < KEY_TILES; n += 2) {
                u32 b[4];
                load_tiles(b, keys + place_of<CHUNKS>(n * 8 + tile / 2 * 8 + lane() % 8, 2 * chunk + tile % 2));
                multiply_tile_halves(sums[n], q[chunk], b[0], b[1]);
                multiply_tile_halves(sums[n + 1], q[chunk], b[2], b[3]);
            }
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) scores[n][i] = joined(sums[n][i], sums[n][2 + i]) * undo;
        bend_all(scores);
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) scores[n][i] = sight.of(key + key_of(n, i)) ? scores[n][i] : LOWEST;
    }
    // The first in turn becomes the last, so that the hyperbolic tangent is there but once.
    INLINE void bend_all(float (&scores)[KEY_TILES][2]) const {
        if (a.softcap > 0.0f) {
#pragma unroll 1
            for (int i = 0; i < 2 * KEY_TILES; i++) {
                const float bent = bend(a, scores[0][0]);
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++)
                    scores[n][0] = scores[n][1], scores[n][1] = n + 1 < KEY_TILES ? scores[(n + 1) % KEY_TILES][0] : bent;
            }
            return;
        }
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++) scores[n][0] = scores[n][0] * a.scale, scores[n][1] = scores[n][1] * a.scale;
    }

    // Weights of the warp's keys, for all warps to see.
    INLINE void leave_weights(int key, float most, float (&scores)[KEY_TILES][2]) {
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) scores[n][i] = sight.of(key + key_of(n, i)) ? expf(scores[n][i] - most) : 0.0f;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++) sum = sum + scores[n][0], sum = sum + scores[n][1];
        sum = sum_of_row(sum);
        if (lane() % 4 == 0) shared.sums[warp()][lane() / 4] = sum;
#pragma unroll
        for (int n = 0; n < KEY_TILES; n += 2) {
            u32 pieces[4];
#pragma unroll
            for (int i = 0; i < 2; i++)
                split(scores[n + i][0] * WEIGHT_FACTOR, scores[n + i][1] * WEIGHT_FACTOR, pieces[2 * i], pieces[2 * i + 1]);
            shared.weights[(warp() * KEY_TILES + n) / 2][lane()] = {pieces[0], pieces[1], pieces[2], pieces[3]};
        }
    }

    // Values of 16 positions, weighed: the warp's elements.
    INLINE void add_values(const u8 *values, int k, float (&sums)[units][4]) const {
        const uint4 weights = shared.weights[k][lane()];
        const u32 pieces[4] = {weights.x, weights.y, weights.z, weights.w};
        const int tile = lane() / 8;
#pragma unroll
        for (int c = 0; c < mine; c++) {
            u32 b[4];
            load_tiles_turned(b, values + value_place(k * SIXTEEN + tile % 2 * 8 + lane() % 8, 2 * c + tile / 2));
            multiply_tile_halves(sums[2 * c], pieces, b[0], b[1]);
            multiply_tile_halves(sums[2 * c + 1], pieces, b[2], b[3]);
        }
    }
    INLINE void multiply_values(const u8 *values, int start, float (&weighed)[units][2]) const {
        const int from = first_place(start) / SIXTEEN, until = (end_place(start) + SIXTEEN - 1) / SIXTEEN;
        float sums[units][4] = {};
        if (until - from == SIXTEENS) {
#pragma unroll
            for (int k = 0; k < SIXTEENS; k++) add_values(values, k, sums);
        } else {
#pragma unroll 1
            for (int k = from; k < until; k++) add_values(values, k, sums);
        }
#pragma unroll
        for (int n = 0; n < units; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) weighed[n][i] = joined(sums[n][i], sums[n][2 + i]) * (1.0f / WEIGHT_FACTOR);
    }

    // The token's key and value, of which the warp has a part, into a partition.
    INLINE void add_fresh_key(u8 *keys, int place) const {
        if (place / WARP_KEYS == warp() && lane() < 2 * CHUNKS)
            *(uint4 *)(keys + place_of<CHUNKS>(place % WARP_KEYS, lane())) = ((const uint4 *)shared.fresh[0])[lane()];
    }
    INLINE void add_fresh_value(u8 *values, int place) const {
        if (lane() < units)
            *(uint4 *)(values + value_place(place, lane())) = ((const uint4 *)shared.fresh[1])[warp() * units + lane()];
    }

    // The element of a result, in its head.
    INLINE int element(int n, int i) const { return warp() * mine * SIXTEEN + key_of(n, i); }

    // Up to 8 query heads, from `done` on; `begins` is where the context's first partition is.
    INLINE void run(int done, int begins, bool early, int slot) {
        const int group = a.heads / a.kv_heads, heads = group - done < HEADS ? group - done : HEADS;
        const long row = (long)token * a.heads + head * group + done;
        int blocks[WARPS], next_blocks[WARPS];
        look_up(first * PARTITION, blocks);
        look_up((first + step) * PARTITION, next_blocks);
        keep_slots(first * PARTITION, blocks);
        fetch_keys(0, first * PARTITION);
        copies_issued();
        fetch_values(1, first * PARTITION);
        copies_issued();
        if (first + step <= last) {
            keep_slots((first + step) * PARTITION, next_blocks);
            fetch_keys(2, (first + step) * PARTITION);
        }
        copies_issued();
        if (done == 0 && early) {
            wait_for_producer();
            let_consumer_start();
        }
        prepare(row, heads, slot);
        __syncthreads();
        u32 q[CHUNKS][4];
        const float undo = load_queries(heads, q);
        const int at = lane() / 4;
        float m = LOWEST, l = 0.0f, results[units][2] = {};
        int number = 0;
#pragma unroll 1
        for (int partition = first; partition <= last; partition += step, number += 2) {
            const int start = partition * PARTITION, next = start + step * PARTITION, key = start + warp() * WARP_KEYS;
            const bool active = sight.last >= key && sight.first < key + WARP_KEYS, freshly = TURNING && partition == last;
            float scores[KEY_TILES][2] = {}, most = LOWEST;
            look_up(next + step * PARTITION, blocks);
            copies_done<2>();
            if (freshly) add_fresh_key(stage(number), sight.last - start);
            wait_for_lanes();
            if (active) {
                multiply_keys(stage(number), q, undo, key, scores);
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++) most = fmaxf(fmaxf(most, scores[n][0]), scores[n][1]);
                most = largest_of_row(most);
            }
            if (lane() % 4 == 0) shared.most[warp()][at] = most;
            __syncthreads();
            if (next <= sight.last) fetch_values(number + 3, next);
            copies_issued();
            most = shared.most[0][at];
#pragma unroll
            for (int i = 1; i < WARPS; i++) most = fmaxf(most, shared.most[i][at]);
            if (active)
                leave_weights(key, most, scores);
            else if (lane() % 4 == 0)
                shared.sums[warp()][at] = 0.0f;
            copies_done<2>();
            if (freshly) add_fresh_value(stage(number + 1), sight.last - start);
            __syncthreads();
            float weighed[units][2], sum = shared.sums[0][at];
#pragma unroll
            for (int i = 1; i < WARPS; i++) sum = sum + shared.sums[i][at];
            multiply_values(stage(number + 1), start, weighed);
            if (SPLIT) {
                float *partial = a.partials + ((row + at) * a.partitions + partition - begins) * (a.size + 2);
                if (at < heads) {
#pragma unroll
                    for (int n = 0; n < units; n++)
#pragma unroll
                        for (int i = 0; i < 2; i++)
                            if (element(n, i) < a.size) partial[element(n, i)] = weighed[n][i];
                    if (warp() == 0 && lane() % 4 == 0) partial[a.size] = most, partial[a.size + 1] = sum;
                }
            } else {
                float kept, added;
                join_factors(m, most, kept, added);
                l = join(l, kept, sum, added);
#pragma unroll
                for (int n = 0; n < units; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) results[n][i] = join(results[n][i], kept, weighed[n][i], added);
            }
            if (next + step * PARTITION <= sight.last) {
                keep_slots(next + step * PARTITION, blocks);
                fetch_keys(number + 4, next + step * PARTITION);
            }
            copies_issued();
        }
        if (!SPLIT && at < heads) {
#pragma unroll
            for (int n = 0; n < units; n++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    if (element(n, i) < a.size) a.y[(row + at) * a.size + element(n, i)] = results[n][i] / l;
        }
    }

    // What all partitions have left, joined in order, as join() does, by the block that comes last: of as many heads at
    // once as there is room for, and of at most PARTITION partitions.
    INLINE void join_all(u32 count) {
        SHARED u32 finished;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            u32 *counter = a.counters + (long)token * a.kv_heads + head;
            finished = count_up(counter) == (count < gridDim.x ? count : gridDim.x) - 1;
            if (finished) *counter = 0;
        }
        __syncthreads();
        if (!finished) return;
        __threadfence();
        float *const left = (float *)shared.stages;
        float2 *const factors = (float2 *)shared.weights;
        const u32 group = a.heads / a.kv_heads, width = a.size + 2, most = count < PARTITION ? count : PARTITION;
        u32 batch = sizeof(shared.stages) / 4 / (most * width + 3);
        if (batch > MOST_FACTORS / most) batch = MOST_FACTORS / most;
        if (batch > group) batch = group;
        if (count > PARTITION) batch = 1;
        for (u32 begin = 0; begin < group; begin += batch) {
            const u32 heads = group - begin < batch ? group - begin : batch;
            const long row = (long)token * a.heads + head * group + begin;
            float m = LOWEST, l = 0.0f, sum = 0.0f;
            for (u32 from = 0; from < count; from += PARTITION) {
                const u32 some = count - from < PARTITION ? count - from : PARTITION, numbers = some * width;
                const u32 apart = (numbers + 3) / 4 * 4;
                for (u32 h = 0; h < heads; h++)
                    fetch_partials(left + h * apart, a.partials + ((row + h) * a.partitions + from) * width, numbers);
                copies_issued();
                copies_done<0>();
                __syncthreads();
                for (u32 i = threadIdx.x; i < heads * some; i += THREADS) {
                    const u32 h = i / some, p = i - h * some;
                    const float *of = left + h * apart + a.size;
                    float before = m, kept, added;
#pragma unroll 8
                    for (u32 k = 0; k < p; k++) before = fmaxf(before, of[k * width]);
                    join_factors(before, of[p * width], kept, added);
                    factors[i] = {kept, added};
                }
                __syncthreads();
                for (u32 h = 0; h < heads; h++) {
                    const float *of = left + h * apart;
                    if (from == 0) m = LOWEST, l = 0.0f, sum = 0.0f;
                    const u32 e = threadIdx.x < (u32)a.size ? threadIdx.x : 0;
#pragma unroll 8
                    for (u32 p = 0; p < some; p++) {
                        const float2 factor = factors[h * some + p];
                        m = fmaxf(m, of[p * width + a.size]);
                        l = join(l, factor.x, of[p * width + a.size + 1], factor.y);
                        sum = join(sum, factor.x, of[p * width + e], factor.y);
                    }
                    if (from + some == count && threadIdx.x < (u32)a.size) a.y[(row + h) * a.size + threadIdx.x] = sum / l;
                }
                __syncthreads();
            }
        }
    }
    INLINE void fetch_partials(float *to, const float *from, u32 numbers) const {
        const u32 fours = ((u64)from & 15) == 0 ? numbers / 4 : 0;
#pragma unroll 4
        for (u32 i = threadIdx.x; i < fours; i += THREADS) copy16(to + 4 * i, from + 4 * i);
#pragma unroll 1
        for (u32 i = 4 * fours + threadIdx.x; i < numbers; i += THREADS) to[i] = from[i];
    }
};

template <int CHUNKS, bool SPLIT, bool TURNING> INLINE void attend(const Attention &a) {
    SHARED_BYTES(bytes);
    const int token = blockIdx.z, position = a.positions[token], sequence = a.sequences[token];
    const int slot = TURNING ? a.slots[token] : 0;
    const int seen_from = a.window > 0 && position + 1 > a.window ? position + 1 - a.window : 0;
    const int begins = seen_from / PARTITION, last = position / PARTITION;
    const int first = begins + (SPLIT ? (int)blockIdx.x : 0), step = SPLIT ? (int)gridDim.x : 1;
    if (first > last) return;
    Few<CHUNKS, SPLIT, TURNING> few = {
        a, *(FewMemory<CHUNKS> *)bytes, token, (int)blockIdx.y, a.tables + (long)sequence * a.blocks, {seen_from, position},
        first, last, step, (u64)(0xFFFFFFFFu / (u32)a.block_size) + 1,
        a.size == CHUNKS * SIXTEEN && (((u64)a.keys | (u64)a.values | a.block_bytes) & 15) == 0
    };
    // Whether what is fetched first was there before the step.
    const bool early = TURNING || (first + step + 1) * PARTITION <= a.positions[a.query_starts[sequence]];
    if (!early) {
        wait_for_producer();
        let_consumer_start();
    }
    for (int done = 0; done < a.heads / a.kv_heads; done += HEADS) {
        if (done > 0) __syncthreads();
        few.run(done, begins, early, slot);
    }
    if (SPLIT) few.join_all(last - begins + 1);
}

#define VERSIONS(size, chunks)                                                                                          \
    KERNEL_IN_COMPANY(attention_halves_##size, Attention, THREADS, 2) { attend<chunks, false, false>(a); }              \
    KERNEL_IN_COMPANY(attention_halves_split_##size, Attention, THREADS, 2) { attend<chunks, true, false>(a); }         \
    KERNEL_IN_COMPANY(attention_halves_turning_##size, Attention, THREADS, 2) { attend<chunks, false, true>(a); }       \
    KERNEL_IN_COMPANY(attention_halves_turning_split_##size, Attention, THREADS, 2) { attend<chunks, true, true>(a); }
VERSIONS(64, 4)
VERSIONS(128, 8)
