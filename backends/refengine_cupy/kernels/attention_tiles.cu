// Attention by tiles of queries over keys and values as they were written.
#include "attention_tile.h"

template <class C> struct PlainTile : QueryTile<C, PlainTile<C>> {
    typedef QueryTile<C, PlainTile<C>> Base;
    using Base::a, Base::shared, Base::head, Base::position, Base::count, Base::chunks;
    const int *table;

    // Where positions of a partition are that some query of the tile sees.
    INLINE void find_slots(int start) {
        const int key = start + (int)threadIdx.x;
        if (threadIdx.x < PARTITION && key >= this->seen_from(0) && key < position + count)
            shared.slots[threadIdx.x] = slot_of(a, table, key, head / (a.heads / a.kv_heads), C::bytes);
    }

    // Keys or values of a partition; zeros where no query of the tile sees them.
    INLINE void load(const u8 *layer, int start) {
        const int last = position + count - 1, from = this->seen_from(0);
        for (int i = threadIdx.x; i < PARTITION * chunks; i += THREADS) {
            const int row = i / chunks, chunk = i % chunks, key = start + row;
            u8 *to = shared.numbers + row * TileMemory<C>::stride + chunk * CHUNK * C::bytes;
            if (key >= from && key <= last) {
                const u8 *at = layer + shared.slots[row] + chunk * CHUNK * C::bytes;
                for (int k = 0; k < CHUNK * C::bytes; k += 16) *(uint4 *)(to + k) = *(const uint4 *)(at + k);
            } else {
                const uint4 zero = {0, 0, 0, 0};
                for (int k = 0; k < CHUNK * C::bytes; k += 16) *(uint4 *)(to + k) = zero;
            }
        }
    }

    INLINE void read_keys(int start, float (&scores)[MINE][KEYS_EACH]) {
        find_slots(start);
        __syncthreads();
        load(a.keys, start);
        __syncthreads();
        this->multiply_keys(scores);
    }

    INLINE void read_values(int start, bool whole, float (&sums)[MINE][CHUNK]) {
        load(a.values, start);
        this->add_weights();
        __syncthreads();
        if ((int)threadIdx.x % ACROSS < chunks) {
            if (whole)
                this->template add_values<true>(start, sums);
            else
                this->template add_values<false>(start, sums);
        }
    }
};

template <class C> INLINE void attend_tile(const Attention &a) {
    SHARED_BYTES(bytes);
    wait_for_producer();
    let_consumer_start();
    const int first = a.query_tiles[blockIdx.x], sequence = a.sequences[first];
    const int left = a.query_starts[sequence + 1] - first;
    PlainTile<C> tile = {
        {a, *(TileMemory<C> *)bytes, (int)blockIdx.y, first, left < QUERIES ? left : QUERIES, a.positions[first], a.size / CHUNK},
        a.tables + (long)sequence * a.blocks
    };
    tile.run();
}

KERNEL_IN_COMPANY(attention_tiles, Attention, THREADS, 1) { attend_tile<FloatChunk>(a); }
