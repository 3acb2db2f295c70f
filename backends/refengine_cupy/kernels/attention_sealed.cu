// Attention of single queries over a sealed cache: a query reads the first block and its own exactly, others as sealed.
//
// The host names the formats KEYS and VALUES, EXACT for exact copies, and EVEN: whether blocks have whole runs of
// positions, heads whole chunks, and everything lies where it can be read by words.
#include "attention_queries.h"
#include "sealed.h"

struct Slot {
    int block, offset;
};

struct Sealed {
    const Attention &a;
    const int *exact_table, *sealed_table;
    int own, head; // own: where the query's block begins
    Block shape;

    INLINE Sealed(const Attention &a, int sequence, int position, int head)
        : a(a), exact_table(a.tables + (long)sequence * a.blocks), sealed_table(a.sealed_tables + (long)sequence * a.blocks),
          own(position - position % a.block_size), head(head), shape{a.block_size, a.kv_heads, a.size} {}

    INLINE bool exact(int position) const { return position < a.block_size || position >= own; }
    INLINE Slot slot(int position) const {
        const int block = position / a.block_size;
        return {(exact(position) ? exact_table : sealed_table)[block], position - block * a.block_size};
    }
    INLINE const u8 *exact_row(const u8 *layer, Slot slot) const {
        return layer + (u64)slot.block * a.block_bytes + FloatParts<EXACT>{shape}.numbers(slot.offset, head);
    }
    INLINE const u8 *sealed(const u8 *layer, Slot slot) const { return layer + (u64)slot.block * a.sealed_block_bytes; }
};

#if EVEN

struct Shared {
    Slot runs[RUNS]; // of the first positions of runs
    u32 scales[VALUES::integers ? PARTITION * MOST_GROUPS : 1];
};

// Values of a run have a scale at each position.
struct RunScales {
    const u32 *scales; // of the first position
    int groups;
    INLINE RunScales from(int i) const { return {scales + i * groups, groups}; }
    template <class F> INLINE float number(const F &chunk, int k, int e) const {
        return chunk.at(e, unpacked_scale(scales[k * groups]));
    }
};

struct Reader : Sealed {
    typedef Shared Memory;
    Memory &memory;
    u32 steps[MOST_GROUPS / 4], centres[MOST_GROUPS / 4]; // of a value at the thread's position

    INLINE Reader(const Attention &a, Memory &memory, int sequence, int position, int head)
        : Sealed(a, sequence, position, head), memory(memory) {}

    INLINE void find(const Query &query, int position) {
        const Slot found = slot(position);
        const int inside = position % RUN;
        if (inside == 0 || position == query.first)
            memory.runs[position % PARTITION / RUN] = {found.block, found.offset - inside};
        if constexpr (VALUES::integers) {
            if (exact(position)) return;
            const ValueParts<VALUES> parts = {shape};
            const u8 *block = sealed(a.sealed_values, found);
            const u8 *s = block + parts.steps(found.offset, head), *c = block + parts.centres(found.offset, head);
            const int groups = shape.groups();
#pragma unroll
            for (int i = 0; i < MOST_GROUPS / 4; i++) {
                if (groups % 4 == 0) {
                    if (4 * i < groups) steps[i] = *(const u32 *)(s + 4 * i), centres[i] = *(const u32 *)(c + 4 * i);
                    continue;
                }
                steps[i] = centres[i] = 0;
#pragma unroll
                for (int k = 0; k < 4; k++)
                    if (4 * i + k < groups) steps[i] |= (u32)s[4 * i + k] << 8 * k, centres[i] |= (u32)c[4 * i + k] << 8 * k;
            }
        }
    }
    // What find() has begun to read is kept for the threads that use it.
    INLINE void settle(int position) {
        if constexpr (VALUES::integers) {
            if (exact(position)) return;
            const int groups = shape.groups();
#pragma unroll
            for (int g = 0; g < MOST_GROUPS; g++)
                if (g < groups) {
                    const u32 step = steps[g / 4] >> 8 * (g % 4) & 255;
                    const int centre = (signed char)(centres[g / 4] >> 8 * (g % 4));
                    memory.scales[position % PARTITION * groups + g] = packed_scale<VALUES>(step, centre);
                }
        }
    }

    template <class C, int COUNT, class B>
    INLINE void read_floats(const Query &query, const u8 *row, int start, int run, int chunk, const B &body) const {
        const int stride = a.kv_heads * a.size * C::bytes;
        for (int i = 0; i < RUN; i += COUNT) {
            C numbers[COUNT];
#pragma unroll
            for (int k = 0; k < COUNT; k++) {
                if (!query.sees(start + run * RUN + i + k)) continue;
                numbers[k].load(row + (u64)((i + k) * stride) + chunk * CHUNK * C::bytes, CHUNK, true);
            }
            body(numbers, AsTheyAre{}, run * RUN + i);
        }
    }
    template <class F, class O, class B>
    INLINE void read_codes(const u8 *row, const O &opener, int run, int chunk, const B &body) const {
        const int stride = a.kv_heads * F::row_bytes(a.size);
#pragma unroll 1
        for (int i = 0; i < RUN; i += LOADS) {
            F codes[LOADS];
#pragma unroll
            for (int k = 0; k < LOADS; k++) codes[k].load(row + (i + k) * stride, a.size, chunk);
            body(codes, opener.from(i), run * RUN + i);
        }
    }
    INLINE bool unseen(const Query &query, int first) const { return first > query.last || first + RUN <= query.first; }

    // Of a run in one block. Exact copies and floats come by 16 bytes, as many positions as registers have room for.
    template <class F, class B>
    INLINE void keys_of_block(const Query &query, int start, int run, int chunk, const B &body) const {
        const Slot slot = memory.runs[run];
        const u8 *block = sealed(a.sealed_keys, slot);
        if constexpr (F::integers) {
            const KeyParts<F> parts = {shape};
            ChannelScales<F> scales;
            scales.load(block + parts.steps(head) + chunk * CHUNK, block + parts.centres(head) + chunk * CHUNK);
            read_codes<F>(block + parts.codes(slot.offset, head), scales, run, chunk, body);
        } else {
            const u8 *row = block + FloatParts<F>{shape}.numbers(slot.offset, head);
            read_floats<F, 16 / F::bytes>(query, row, start, run, chunk, body);
        }
    }
    template <class F, class B>
    INLINE void values_of_block(const Query &query, int start, int run, int chunk, const B &body) const {
        const Slot slot = memory.runs[run];
        const u8 *block = sealed(a.sealed_values, slot);
        if constexpr (F::integers) {
            const int groups = shape.groups();
            const RunScales scales = {memory.scales + run * RUN * groups + chunk * CHUNK / VALUE_GROUP, groups};
            read_codes<F>(block + ValueParts<F>{shape}.codes(slot.offset, head), scales, run, chunk, body);
        } else {
            const u8 *row = block + FloatParts<F>{shape}.numbers(slot.offset, head);
            read_floats<F, 16 / F::bytes>(query, row, start, run, chunk, body);
        }
    }

    template <class B> INLINE void keys(const Query &query, int start, int run, int chunk, const B &body) const {
        if (unseen(query, start + run * RUN)) return;
        if (exact(start + run * RUN))
            read_floats<EXACT, 16 / EXACT::bytes>(query, exact_row(a.keys, memory.runs[run]), start, run, chunk, body);
        else
            keys_of_block<KEYS>(query, start, run, chunk, body);
    }
    template <class B> INLINE void values(const Query &query, int start, int run, int chunk, const B &body) const {
        if (unseen(query, start + run * RUN)) return;
        if (exact(start + run * RUN))
            read_floats<EXACT, 16 / EXACT::bytes>(query, exact_row(a.values, memory.runs[run]), start, run, chunk, body);
        else
            values_of_block<VALUES>(query, start, run, chunk, body);
    }
};

#else

struct Shared {
    Slot slots[PARTITION];
};

// Position by position, and number by number: for blocks and heads of any size.
struct Reader : Sealed {
    typedef Shared Memory;
    Memory &memory;

    INLINE Reader(const Attention &a, Memory &memory, int sequence, int position, int head)
        : Sealed(a, sequence, position, head), memory(memory) {}

    INLINE void find(const Query &query, int position) { memory.slots[position % PARTITION] = slot(position); }
    INLINE void settle(int position) {}

    template <class P, class B>
    INLINE void read(
        const Query &query, const P &parts, const u8 *exact_layer, const u8 *sealed_layer, int start, int run, int chunk,
        const B &body
    ) const {
#pragma unroll 1
        for (int k = 0; k < RUN; k++) {
            const int place = run * RUN + k, count = query.count(chunk);
            if (!query.sees(start + place)) continue;
            const Slot slot = memory.slots[place];
            const bool as_written = exact(start + place);
            const u8 *block = as_written ? exact_layer + (u64)slot.block * a.block_bytes : sealed(sealed_layer, slot);
            FloatChunk numbers[1];
#pragma unroll
            for (int i = 0; i < CHUNK; i++) {
                const int e = chunk * CHUNK + i;
                numbers[0].v[i] = 0.0f;
                if (i >= count) continue;
                numbers[0].v[i] = as_written ? FloatParts<EXACT>{shape}.number(block, slot.offset, head, e)
                                             : parts.number(block, slot.offset, head, e);
            }
            body(numbers, AsTheyAre{}, place);
        }
    }
    template <class B> INLINE void keys(const Query &query, int start, int run, int chunk, const B &body) const {
        read(query, PartsOf<KEYS, KeyParts<KEYS>>{shape}, a.keys, a.sealed_keys, start, run, chunk, body);
    }
    template <class B> INLINE void values(const Query &query, int start, int run, int chunk, const B &body) const {
        read(query, PartsOf<VALUES, ValueParts<VALUES>>{shape}, a.values, a.sealed_values, start, run, chunk, body);
    }
};

#endif

KERNEL(attention_sealed, Attention, PARTITION) { attend<Reader, false, MOST_AT_ONCE>(a); }
KERNEL(attention_sealed_split, Attention, PARTITION) { attend<Reader, true, MOST_AT_ONCE>(a); }
KERNEL_IN_COMPANY(attention_sealed_1, Attention, PARTITION, 4) { attend<Reader, false, 1>(a); }
KERNEL_IN_COMPANY(attention_sealed_1_split, Attention, PARTITION, 4) { attend<Reader, true, 1>(a); }
