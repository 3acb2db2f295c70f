// Some tiles of weights in shared memory, for a step of columns: they come there as they are stored.
#pragma once
#include "half_rows.h"

#define ITEMS (STEP_GROUPS * TILE) // of a tile, in a step

// Where 16 bytes of a group lie: threads that read together have rows two by two, of four groups.
INLINE int swapped_row(int group, int row) { return row ^ (2 * group & 7); }

template <class E, int TILES> struct WeightStage {
    u8 codes[TILES * ITEMS * E::code_bytes];
    u8 high[TILES * ITEMS * E::high_bytes + (E::high_bytes ? 0 : 16)];
    u8 scales[TILES * ITEMS / E::scale_groups * E::scale_bytes];
    u8 blocks[TILES * TILE * E::block_bytes + (E::block_bytes ? 0 : 16)];

    // Tiles of a part from one on, for a step of columns, by ALL threads. Tiles behind the part's last are that one again.
    template <int ALL> INLINE void load(const Part &part, int columns, int from_tile, int step) {
        copy_plane<ALL, E::code_bytes, 1>(codes, part.weight.codes, part, columns, from_tile, step);
        if constexpr (E::high_bytes != 0)
            copy_plane<ALL, E::high_bytes, 1>(high, part.weight.high, part, columns, from_tile, step);
        copy_plane<ALL, E::scale_bytes, E::scale_groups>(scales, part.weight.scales, part, columns, from_tile, step);
        if constexpr (E::block_bytes != 0) copy_blocks<ALL>(part, columns, from_tile, step);
    }

    // A thread's two rows of a tile, eight apart, and its group. SWAPPED: whether load() has brought them.
    template <bool SWAPPED> INLINE void take(PackedRow<E> (&held)[2], int tile) const {
        const int lane = threadIdx.x % LANES, group = lane % 4, item = (tile * STEP_GROUPS + group) * TILE;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = lane / 4 + 8 * i;
            held[i].stored.fetch(codes, high, item + row, item + (SWAPPED ? swapped_row(group, row) : row));
            held[i].stored.take(scales, blocks, item + row, tile * TILE + row);
            held[i].open();
        }
    }

    // That are there of a step: the planes'.
    static constexpr u32 bytes = TILES * (ITEMS * (E::code_bytes + E::high_bytes) + ITEMS / E::scale_groups * E::scale_bytes + TILE * E::block_bytes);

  private:
    // From a plane with so many bytes of a row for so many groups: those of 16 rows lie together.
    template <int ALL, int BYTES, int GROUPS>
    static INLINE void copy_plane(u8 *to, const u8 *from, const Part &part, int columns, int from_tile, int step) {
        constexpr int words = TILE * BYTES / 16, count = STEP_GROUPS / GROUPS;
        const int all = columns / 32 / GROUPS, tiles = (part.rows + TILE - 1) / TILE;
        for (int i = threadIdx.x; i < TILES * count * words; i += ALL) {
            const int word = i % words, group = i / words % count, tile = i / words / count;
            const int read_tile = from_tile + tile < tiles ? from_tile + tile : tiles - 1;
            const int read_group = step * count + group < all ? step * count + group : all - 1;
            const int place = BYTES < 16 ? word : word / TILE * TILE + swapped_row(group, word % TILE);
            copy16(to + ((tile * count + group) * words + place) * 16, from + (((long)read_tile * all + read_group) * words + word) * 16);
        }
    }

    template <int ALL>
    INLINE void copy_blocks(const Part &part, int columns, int from_tile, int step) {
        constexpr int words = TILE * E::block_bytes / 16 + (E::block_bytes ? 0 : 1);
        const int all = columns / 256, tiles = (part.rows + TILE - 1) / TILE;
        for (int i = threadIdx.x; i < TILES * words; i += ALL) {
            const int read_tile = from_tile + i / words < tiles ? from_tile + i / words : tiles - 1;
            copy16(blocks + i * 16, part.weight.blocks + ((long)read_tile * all + step / 2) * words * 16 + i % words * 16);
        }
    }
};

// A tile in memory, of which one warp copies step after step. Its bytes of each plane lie one after the other.
template <class E> struct TileSource {
    const u8 *codes, *high, *scales, *blocks; // this thread's first 16 bytes of the step that comes next
    int step, left; // that step, and the groups that are left from it on
    int place;      // of this thread's first 16 bytes of codes, where they go

    static constexpr int code_words = ITEMS * E::code_bytes / 16, high_words = ITEMS * E::high_bytes / 16;
    static constexpr int scale_words = ITEMS / E::scale_groups * E::scale_bytes / 16, block_words = TILE * E::block_bytes / 16;

    INLINE void begin(const Packed &weight, int groups, int tile, int first) {
        const int lane = threadIdx.x % LANES;
        const long items = (long)tile * groups * TILE;
        codes = weight.codes + items * E::code_bytes + (first * code_words + lane) * 16;
        high = weight.high + items * E::high_bytes + (first * high_words + lane) * 16;
        scales = weight.scales + items / E::scale_groups * E::scale_bytes + (first * scale_words + lane) * 16;
        blocks = weight.blocks + items / 8 * E::block_bytes + (first / 2 * block_words + lane) * 16;
        step = first, left = groups - first * STEP_GROUPS;
        place = kept(16 * (lane / TILE * TILE + swapped_row(lane / (TILE * E::code_bytes / 16), lane % TILE)));
    }

    // Where a row ends within a step, groups behind it are replaced by its last: what they are multiplied with is zero.
    INLINE void copy(WeightStage<E, 1> &to) {
        if (left >= STEP_GROUPS)
            copy_planes<false>(to);
        else
            copy_planes<true>(to);
        codes += code_words * 16, high += high_words * 16, scales += scale_words * 16;
        if (block_words != 0 && step % 2 != 0) blocks += block_words * 16;
        step++, left -= STEP_GROUPS;
    }

  private:
    template <bool ENDS> INLINE void copy_planes(WeightStage<E, 1> &to) const {
        constexpr int each = E::code_bytes; // in words of 16 bytes, of a group's rows
#pragma unroll
        for (int k = 0; k < code_words / LANES; k++) // LANES words later the same row is swapped with another
            copy16(to.codes + (place ^ swapped_row(k * LANES / each, 0) * 16) + k * LANES * 16, codes + at<ENDS, each, 1>(k));
        if constexpr (high_words != 0) copy_plane<ENDS, high_words, E::high_bytes, 1>(to.high, high);
        copy_plane<ENDS, scale_words, E::scale_bytes, E::scale_groups>(to.scales, scales);
        if constexpr (block_words != 0) copy_plane<false, block_words, 1, 1>(to.blocks, blocks);
    }

    template <bool ENDS, int WORDS, int BYTES, int GROUPS> INLINE void copy_plane(u8 *to, const u8 *from) const {
        const int lane = threadIdx.x % LANES;
#pragma unroll
        for (int k = 0; k < (WORDS + LANES - 1) / LANES; k++)
            if (WORDS % LANES == 0 || lane + k * LANES < WORDS)
                copy16(to + (lane + k * LANES) * 16, from + at<ENDS, TILE * BYTES / 16, GROUPS>(k));
    }

    // How far the k-th bytes of a thread are from its first; EACH: words of what GROUPS have.
    template <bool ENDS, int EACH, int GROUPS> INLINE int at(int k) const {
        const int behind = ((int)threadIdx.x % LANES + k * LANES) / EACH - (left + GROUPS - 1) / GROUPS + 1;
        return (k * LANES - (ENDS && behind > 0 ? behind * EACH : 0)) * 16;
    }
};
