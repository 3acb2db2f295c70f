// Weights as float16, as matrix units take them: a thread has a group of 32 weights of a row, of which it gives four at
// a time, in the order of halves.h.
#pragma once
#include "product.h"
#include "halves.h"

// A group that is stored as integers. Each weight is its decoded value, rounded once: a product of two float16 is
// that already where nothing is added to it and its factor is a float16 number.
// MASKED: whether halves of bytes are taken out two at a time where they are needed; else all beforehand.
template <class E, bool MASKED = true> struct PackedRow {
    static constexpr int ahead = 4, company = E::high_bytes || E::block_bytes || E::code_bytes > 16 ? 2 : 3; // see linear_a16.cu
    static constexpr bool whole = !E::offset && !E::factors && E::block_bytes == 0;
    static constexpr bool nibbles = MASKED && whole && E::code_bytes == 16 && E::high_bytes == 0;
    E stored;
    u32 words[nibbles ? 1 : 8];
    Scale scale;
    u32 d, zero, high_zero; // twice each, as float16

    // Groups behind the last one are replaced by it: what they are multiplied with is zero.
    INLINE void load(const Part &part, int columns, int row, int group) {
        const int groups = columns / 32, tiles = (part.rows + TILE - 1) / TILE;
        const int tile = row / TILE < tiles ? row / TILE : tiles - 1;
        stored.load(part.weight, ((long)tile * groups + (group < groups ? group : groups - 1)) * TILE + row % TILE, groups);
    }
    INLINE void open() {
        scale = stored.scale();
        if constexpr (!nibbles) stored.words(words);
        if constexpr (whole) {
            d = stored.d * 0x10001u;
            zero = (0x6400u + (u32)shift()) * 0x10001u; // of 1024 + integer
            high_zero = float_to_half(-64.0f - (float)shift()) * 0x10001u; // of 64 + integer, and negative
        }
    }
    // What is taken from an integer: the zero, and what turned a signed byte into an unsigned one.
    INLINE int shift() const { return (E::zeros ? scale.zero : E::zero) + (E::code_bytes == 32 ? 128 : 0); }
    INLINE u32 unsigned_bytes(int word) const { return words[word] ^ (E::code_bytes == 32 ? 0x80808080u : 0u); }

    INLINE float weight(int word, int byte) const {
        const u32 integer = pick_bytes(unsigned_bytes(word), 0x4B000000u, 0x7440u | (u32)byte); // 2^23 + b
        const float factor = !E::factors ? scale.d : scale.d * (float)(word < 4 ? scale.low : scale.high);
        const float product = (float_of_bits(integer) - (8388608.0f + (float)shift())) * factor;
        return E::offset ? product + scale.m : product;
    }
    // Weights 4 * word .. 4 * word + 3: the first and the third, the second and the fourth.
    INLINE void four(int word, u32 &odd, u32 &even) const {
        if constexpr (nibbles) {
            // 1024 + b is a float16 whose last bits are those of b; the upper half of a byte is 16 times as much.
            const u32 packed[4] = {stored.halves.x, stored.halves.y, stored.halves.z, stored.halves.w};
            const u32 bytes = packed[word % 4];
            if (word < 4) {
                odd = subtract_halves(masked(bytes, 0x000F000Fu, 0x64006400u), zero);
                even = subtract_halves(masked(bytes >> 8, 0x000F000Fu, 0x64006400u), zero);
            } else {
                odd = multiply_add_halves(masked(bytes, 0x00F000F0u, 0x64006400u), 0x2C002C00u, high_zero); // a sixteenth
                even = multiply_add_halves(masked(bytes >> 8, 0x00F000F0u, 0x64006400u), 0x2C002C00u, high_zero);
            }
            odd = multiply_halves(odd, d), even = multiply_halves(even, d);
        } else if constexpr (whole) {
            const u32 bytes = unsigned_bytes(word);
            odd = multiply_halves(subtract_halves(pick_bytes(bytes, 0x64646464u, 0x4240u), zero), d);
            even = multiply_halves(subtract_halves(pick_bytes(bytes, 0x64646464u, 0x4341u), zero), d);
        } else {
            odd = halves_of(weight(word, 0), weight(word, 2));
            even = halves_of(weight(word, 1), weight(word, 3));
        }
    }
};

// A group that is stored as numbers.
template <class E> struct PlainRow {
    static constexpr int ahead = 2, company = 2;
    u32 halves[16];

    INLINE void load(const Part &part, int columns, int row, int group) {
        const long start = (long)(row < part.rows ? row : part.rows - 1) * columns;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const int column = group * 32 + i / 2 * 4 + i % 2; // and the next but one
            const float first = column < columns ? E::weight(part.weight.codes, start + column) : 0.0f;
            const float second = column + 2 < columns ? E::weight(part.weight.codes, start + column + 2) : 0.0f;
            halves[i] = halves_of(first, second);
        }
    }
    INLINE void open() {}
    INLINE void four(int word, u32 &odd, u32 &even) const { odd = halves[2 * word], even = halves[2 * word + 1]; }
};

// A thread's part of 16 rows and eight columns of each of four groups, for two products of matrix units: it has two rows,
// eight apart.
template <class Row> INLINE void take_eight(const Row (&held)[2], int eight, u32 (&w)[2][4]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        held[0].four(2 * eight + i, w[i][0], w[i][2]);
        held[1].four(2 * eight + i, w[i][1], w[i][3]);
    }
}
