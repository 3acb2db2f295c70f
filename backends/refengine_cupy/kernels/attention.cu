// Attention of single queries over keys and values as they were written.
#include "attention_queries.h"

template <class C> struct Plain {
    struct Memory {
        u64 slots[PARTITION];
    };
    const Attention &a;
    Memory &memory;
    const int *table;
    int head;

    INLINE Plain(const Attention &a, Memory &memory, int sequence, int position, int head)
        : a(a), memory(memory), table(a.tables + (long)sequence * a.blocks), head(head) {}

    INLINE void find(const Query &query, int position) {
        memory.slots[position % PARTITION] = slot_of(a, table, position, head, C::bytes);
    }
    INLINE void settle(int place) {}

    template <class B> INLINE void read(const u8 *layer, const Query &query, int start, int run, int chunk, const B &body) const {
        for (int i = 0; i < RUN; i += LOADS) {
            C numbers[LOADS];
#pragma unroll
            for (int k = 0; k < LOADS; k++) {
                const int position = start + run * RUN + i + k;
                if (!query.sees(position)) continue;
                const u8 *p = layer + memory.slots[position - start];
                numbers[k].load(p + chunk * CHUNK * C::bytes, query.count(chunk), a.size % CHUNK == 0);
            }
            body(numbers, AsTheyAre{}, run * RUN + i);
        }
    }
    template <class B> INLINE void keys(const Query &query, int start, int run, int chunk, const B &body) const {
        read(a.keys, query, start, run, chunk, body);
    }
    template <class B> INLINE void values(const Query &query, int start, int run, int chunk, const B &body) const {
        read(a.values, query, start, run, chunk, body);
    }
};

// One query head per key head, or several.
KERNEL(attention_f32, Attention, PARTITION) { attend<Plain<FloatChunk>, false, MOST_AT_ONCE>(a); }
KERNEL(attention_f16, Attention, PARTITION) { attend<Plain<HalfChunk>, false, MOST_AT_ONCE>(a); }
KERNEL(attention_split_f32, Attention, PARTITION) { attend<Plain<FloatChunk>, true, MOST_AT_ONCE>(a); }
KERNEL(attention_split_f16, Attention, PARTITION) { attend<Plain<HalfChunk>, true, MOST_AT_ONCE>(a); }
KERNEL_IN_COMPANY(attention_1_f32, Attention, PARTITION, 5) { attend<Plain<FloatChunk>, false, 1>(a); }
KERNEL_IN_COMPANY(attention_1_f16, Attention, PARTITION, 7) { attend<Plain<HalfChunk>, false, 1>(a); }
KERNEL_IN_COMPANY(attention_1_split_f32, Attention, PARTITION, 5) { attend<Plain<FloatChunk>, true, 1>(a); }
KERNEL_IN_COMPANY(attention_1_split_f16, Attention, PARTITION, 7) { attend<Plain<HalfChunk>, true, 1>(a); }
