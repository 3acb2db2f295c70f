// Attention by matrix units, over keys and values that are float16: what both its kernels do alike, so that a query's
// result does not depend on which of them computes it. Heads have at most 128 elements.
//
// Units multiply float16 and add up in float32. So what is float32 comes in two pieces, high + low / FINER, which
// together have its first 23 bits at least: a query, times the power of two that brings its largest number up to
// [2^14, 2^15), which is undone on its scores; and weights times WEIGHT_FACTOR, undone on their sums. Products with high
// pieces are added up from zero, those with low pieces apart from them; then both are added.
//
// - A score is the sum of the products by chunks of 16 elements, in order.
// - A partition's values, weighed, are added up by 16 positions, in order.
// - Its weights, in float32, by 32 positions, in order: of these, a thread has two of each eight; it adds them up in
//   order; then neighbours add theirs, and neighbours of neighbours.
// - What a query does not see has weight 0 and is multiplied with a number: zero, or what other queries see there.
//
// Rows are queries, or query heads; a group of 32 threads has 16, a thread numbers of two of them, eight apart.
#pragma once
#include "attention.h"

#define ROWS 16
#define SIXTEEN 16
#define SIXTEENS (PARTITION / SIXTEEN)
#define FINER 2048.0f
#define WEIGHT_FACTOR 32768.0f
#define SUM_KEYS 32 // whose weights are added up first

INLINE void split(float x, float y, u32 &high, u32 &low) {
    high = halves_of(x, y);
    const float x_left = x - half_to_float((u16)high), y_left = y - half_to_float((u16)(high >> 16));
    low = halves_of(x_left * FINER, y_left * FINER);
}
INLINE float joined(float high, float low) { return fmaf(low, 1.0f / FINER, high); }

// What a row sees; nothing, where last < first.
struct Sight {
    int first, last;
    INLINE bool of(int key) const { return key >= first && key <= last; }
};

// The exponent of the power of two by which a row is multiplied, whose largest absolute value has these bits: 0 where it
// holds infinity or NaN, so that all its scores are NaN.
INLINE int row_exponent(u32 largest) {
    const int exponent = (int)(largest >> 23);
    if (exponent == 255) return 0;
    return exponent < 15 ? 126 : 141 - exponent;
}
INLINE float power_of_two(int exponent) { return float_of_bits((u32)(127 + exponent) << 23); }

// A thread's part of 16 rows of queries, as a matrix unit takes them: pieces of four words for each chunk.
template <int CHUNKS> struct QueryPieces {
    u32 high[CHUNKS][4], low[CHUNKS][4];
    float undo[2]; // of both rows: their factor's inverse

    // A row that is null has zeros.
    INLINE void load(const float *const (&rows)[2], int size) {
        float x[CHUNKS][4][2];
        u32 largest[2] = {0, 0};
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const int e = chunk * SIXTEEN + i / 2 * 8 + (int)threadIdx.x % 4 * 2 + k;
                    x[chunk][i][k] = rows[i % 2] && e < size ? rows[i % 2][e] : 0.0f;
                    const u32 bits = bits_of(x[chunk][i][k]) & 0x7FFFFFFFu;
                    largest[i % 2] = largest[i % 2] > bits ? largest[i % 2] : bits;
                }
        float factors[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int mask = 1; mask < 4; mask *= 2) {
                const u32 other = (u32)shuffle_xor((int)largest[i], mask);
                largest[i] = largest[i] > other ? largest[i] : other;
            }
            const int exponent = row_exponent(largest[i]);
            factors[i] = power_of_two(exponent), undo[i] = power_of_two(-exponent);
        }
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                split(x[chunk][i][0] * factors[i % 2], x[chunk][i][1] * factors[i % 2], high[chunk][i], low[chunk][i]);
    }
};

// Where 16 bytes of a position lie in shared memory: those of eight neighbours in different banks.
template <int CHUNKS> INLINE int place_of(int row, int unit) { return (row * 2 * CHUNKS + (unit ^ row % 8)) * 16; }

// Keys or values of a partition's places from first to end to shared memory, in the background where they lie so that
// they can be copied by 16 bytes; zeros behind a head's last element, and where `clear` says so in the other places. Those
// from `fresh` to end are left alone: they are not there yet.
template <int CHUNKS, int THREADS>
INLINE void fetch(const Attention &a, u8 *to, const u8 *layer, const u64 *slots, int first, int end, int fresh, bool clear) {
    const int chunks = (a.size + SIXTEEN - 1) / SIXTEEN;
    const bool wide = a.size % 8 == 0 && (((u64)layer | a.block_bytes) & 15) == 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < PARTITION * 2 * CHUNKS; i += THREADS) {
        const int row = i / (2 * CHUNKS), unit = i % (2 * CHUNKS), count = a.size - unit * 8;
        const bool seen = row >= first && row < end;
        if (unit >= 2 * chunks || (seen ? row >= fresh : !clear)) continue;
        u8 *at = to + place_of<CHUNKS>(row, unit);
        if (seen && wide && count > 0) {
            copy16(at, layer + slots[row] + unit * 16);
            continue;
        }
        HalfChunk numbers = {};
        if (seen && count > 0) numbers.load(layer + slots[row] + unit * 16, count, false);
        const uint4 words = {numbers.v[0], numbers.v[1], numbers.v[2], numbers.v[3]};
        *(uint4 *)at = words;
    }
}

// For matrix units: 16 elements of 16 keys; 16 positions of 16 elements of values.
template <int CHUNKS> INLINE void take_keys(u32 (&b)[4], const u8 *keys, int first, int chunk) {
    const int lane = threadIdx.x % LANES, tile = lane / 8;
    load_tiles(b, keys + place_of<CHUNKS>(first + tile / 2 * 8 + lane % 8, 2 * chunk + tile % 2));
}
template <int CHUNKS> INLINE void take_values(u32 (&b)[4], const u8 *values, int first, int chunk) {
    const int lane = threadIdx.x % LANES, tile = lane / 8;
    load_tiles_turned(b, values + place_of<CHUNKS>(first + tile % 2 * 8 + lane % 8, 2 * chunk + tile / 2));
}

// Adds products of both pieces with 16 columns to those of two tiles of eight columns, from the n-th on.
template <int N>
INLINE void add_products(
    float (&high)[N][4], float (&low)[N][4], int n, const u32 (&a_high)[4], const u32 (&a_low)[4], const u32 (&b)[4]
) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        multiply_tile_halves(low[n + i], a_low, b[2 * i], b[2 * i + 1]);
        multiply_tile_halves(high[n + i], a_high, b[2 * i], b[2 * i + 1]);
    }
}

// Of two float16: ones in the place of infinity or NaN, zeros in that of others.
INLINE u32 spoiled_halves(u32 x) {
    return ((x & 0x7C00u) == 0x7C00u ? 0xFFFFu : 0u) | ((x & 0x7C000000u) == 0x7C000000u ? 0xFFFF0000u : 0u);
}

// The key of a number in a tile of eight keys; its row is the i / 2-th of the thread's.
INLINE int key_of(int tile, int i) { return tile * 8 + (int)threadIdx.x % 4 * 2 + i % 2; }

// Over the four threads that share rows.
INLINE float largest_of_row(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}
INLINE float sum_of_row(float x) {
    x = x + shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// Weights of a row's 32 keys, added up: `first` is the first of four tiles.
template <int N> INLINE float sum_of_weights(const float (&weights)[N][4], int first, int row) {
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < 4; n++) sum = sum + weights[first + n][2 * row], sum = sum + weights[first + n][2 * row + 1];
    return sum_of_row(sum);
}

// Weights of 16 keys, of which two tiles have been found, as a matrix unit takes them.
template <int N> INLINE void weight_pieces(const float (&weights)[N][4], int first, u32 (&high)[4], u32 (&low)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float *two = &weights[first + i / 2][i % 2 * 2];
        split(two[0] * WEIGHT_FACTOR, two[1] * WEIGHT_FACTOR, high[i], low[i]);
    }
}
