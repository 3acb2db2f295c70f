// Stored weights as kernels read them; see packing.py for the layout.
//
// A group is 32 weights of a row. Its place: item = (tile * groups + group) * 16 + row, tiles of 16 rows.
#pragma once
#include "vendor.h"

#define TILE 16

struct Packed {
    const u8 *codes, *high, *scales, *blocks;
};

INLINE u16 load_u16(const u8 *p) { return *(const u16 *)p; }
INLINE u32 load_u32(const u8 *p) { return *(const u32 *)p; }

// What a group's integers are multiplied with: weight = (d * factor) * (integer - zero) + m.
struct Scale {
    float d, m;
    int low, high; // factors of the first and second 16 weights
    int zero;      // of the group, where E::zeros; elsewhere it is E::zero, of all groups
};

// Each encoding is a class of integers and a class of scales.
//   load(): the bytes of a group, nothing done with them yet, so that many loads are under way at once
//   pair(), take(): words i and i + 4 of a group, and its scale, from planes in any memory
//   fetch(): all of a group's integers from there; its codes may lie at another item's place
//   words(): its integers, four to a word; word i has weights 4 i .. 4 i + 3
//   scale(): what they are multiplied with
// In the plane of scales, what scale_groups of a row share has scale_bytes; in that of blocks, what eight share.
struct Nibbles {
    uint4 halves;
    INLINE void load(const Packed &w, long item) { halves = load_once((const uint4 *)(w.codes + item * 16)); }
    INLINE void words(u32 (&out)[8]) const {
        const u32 packed[4] = {halves.x, halves.y, halves.z, halves.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            out[i] = packed[i] & 0x0F0F0F0Fu;
            out[i + 4] = packed[i] >> 4 & 0x0F0F0F0Fu;
        }
    }
    static constexpr int code_bytes = 16, high_bytes = 0;
    static INLINE void pair(const u8 *codes, const u8 *, int item, int word, u32 &low, u32 &up) {
        const u32 both = *(const u32 *)(codes + item * 16 + word * 4);
        low = both & 0x0F0F0F0Fu, up = both >> 4 & 0x0F0F0F0Fu;
    }
    INLINE void fetch(const u8 *codes, const u8 *, int, int place) { halves = *(const uint4 *)(codes + place * 16); }
};

struct Fives : Nibbles {
    u32 fifth;
    INLINE void load(const Packed &w, long item) {
        Nibbles::load(w, item);
        fifth = load_u32(w.high + item * 4);
    }
    INLINE void words(u32 (&out)[8]) const {
        Nibbles::words(out);
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] |= (fifth >> i & 0x01010101u) << 4;
    }
    static constexpr int high_bytes = 4;
    static INLINE void pair(const u8 *codes, const u8 *high, int item, int word, u32 &low, u32 &up) {
        Nibbles::pair(codes, high, item, word, low, up);
        const u32 fifth = *(const u32 *)(high + item * 4);
        low |= (fifth >> word & 0x01010101u) << 4, up |= (fifth >> (word + 4) & 0x01010101u) << 4;
    }
    INLINE void fetch(const u8 *codes, const u8 *high, int item, int place) {
        Nibbles::fetch(codes, high, item, place);
        fifth = load_u32(high + item * 4);
    }
};

struct Sixes : Nibbles {
    uint2 high;
    INLINE void load(const Packed &w, long item) {
        Nibbles::load(w, item);
        high = *(const uint2 *)(w.high + item * 8);
    }
    INLINE void words(u32 (&out)[8]) const {
        Nibbles::words(out);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            out[i] |= (high.x >> 2 * i & 0x03030303u) << 4;
            out[i + 4] |= (high.y >> 2 * i & 0x03030303u) << 4;
        }
    }
    static constexpr int high_bytes = 8;
    static INLINE void pair(const u8 *codes, const u8 *high, int item, int word, u32 &low, u32 &up) {
        Nibbles::pair(codes, high, item, word, low, up);
        const uint2 pairs = *(const uint2 *)(high + item * 8);
        low |= (pairs.x >> 2 * word & 0x03030303u) << 4, up |= (pairs.y >> 2 * word & 0x03030303u) << 4;
    }
    INLINE void fetch(const u8 *codes, const u8 *upper, int item, int place) {
        Nibbles::fetch(codes, upper, item, place);
        high = *(const uint2 *)(upper + item * 8);
    }
};

struct Bytes {
    uint4 first, second;
    INLINE void load(const Packed &w, long item) {
        const uint4 *at = (const uint4 *)(w.codes + (item / TILE * 2 * TILE + item % TILE) * 16);
        first = load_once(at), second = load_once(at + TILE);
    }
    INLINE void words(u32 (&out)[8]) const {
        out[0] = first.x, out[1] = first.y, out[2] = first.z, out[3] = first.w;
        out[4] = second.x, out[5] = second.y, out[6] = second.z, out[7] = second.w;
    }
    static constexpr int code_bytes = 32, high_bytes = 0;
    static INLINE void pair(const u8 *codes, const u8 *, int item, int word, u32 &low, u32 &up) {
        const u8 *at = codes + (item / TILE * 2 * TILE + item % TILE) * 16 + word * 4;
        low = *(const u32 *)at, up = *(const u32 *)(at + TILE * 16);
    }
    INLINE void fetch(const u8 *codes, const u8 *, int, int place) {
        const uint4 *at = (const uint4 *)codes + place / TILE * 2 * TILE + place % TILE;
        first = at[0], second = at[TILE];
    }
};

// A block of 256 weights has eight groups, and a row has whole blocks.
INLINE long block_item(long item) { return (long)((u64)item / (8 * TILE)) * TILE + item % TILE; }

template <class Integers, int ZERO> struct HalfScale : Integers {
    static constexpr int zero = ZERO;
    static constexpr bool offset = false, factors = false, zeros = false;
    u16 d;
    INLINE void load(const Packed &w, long item, int) {
        Integers::load(w, item);
        take(w.scales, w.blocks, item, 0);
    }
    static constexpr int scale_bytes = 2, scale_groups = 1, block_bytes = 0;
    INLINE void take(const u8 *scales, const u8 *, long item, long) { d = load_u16(scales + item * 2); }
    INLINE Scale scale() const { return {half_to_float(d), 0.0f, 1, 1}; }
};

template <class Integers> struct PairScale : Integers {
    static constexpr int zero = 0;
    static constexpr bool offset = true, factors = false, zeros = false;
    u32 both;
    INLINE void load(const Packed &w, long item, int) {
        Integers::load(w, item);
        take(w.scales, w.blocks, item, 0);
    }
    static constexpr int scale_bytes = 4, scale_groups = 1, block_bytes = 0;
    INLINE void take(const u8 *scales, const u8 *, long item, long) { both = load_u32(scales + item * 4); }
    INLINE Scale scale() const { return {half_to_float((u16)both), half_to_float((u16)(both >> 16)), 1, 1}; }
};

template <class Integers> struct SixBitScale : Integers {
    static constexpr int zero = 0;
    static constexpr bool offset = true, factors = false, zeros = false;
    u32 both;
    u16 small;
    INLINE void load(const Packed &w, long item, int groups) {
        Integers::load(w, item);
        take(w.scales, w.blocks, item, block_item(item));
    }
    static constexpr int scale_bytes = 2, scale_groups = 1, block_bytes = 4;
    INLINE void take(const u8 *scales, const u8 *blocks, long item, long block) {
        both = load_u32(blocks + block * 4);
        small = load_u16(scales + item * 2);
    }
    INLINE Scale scale() const {
        const float d = half_to_float((u16)both), least = half_to_float((u16)(both >> 16));
        return {d * (float)(small & 255), -(least * (float)(small >> 8)), 1, 1};
    }
};

template <class Integers> struct FactorScale : Integers {
    static constexpr int zero = 32;
    static constexpr bool offset = false, factors = true, zeros = false;
    u16 d, small;
    INLINE void load(const Packed &w, long item, int groups) {
        Integers::load(w, item);
        take(w.scales, w.blocks, item, block_item(item));
    }
    static constexpr int scale_bytes = 2, scale_groups = 1, block_bytes = 2;
    INLINE void take(const u8 *scales, const u8 *blocks, long item, long block) {
        d = load_u16(blocks + block * 2);
        small = load_u16(scales + item * 2);
    }
    INLINE Scale scale() const {
        return {half_to_float(d), 0.0f, (int)(signed char)(small & 255), (int)(signed char)(small >> 8)};
    }
};

// A scale and a zero that SHARING groups of a row have in common. Those of 16 rows lie together: first the scales,
// then the zeros. Integers are stored less LESS, so that all fit into signed bytes.
template <class Integers, int LESS, int SHARING> struct ZeroScale : Integers {
    static constexpr int zero = 0;
    static constexpr bool offset = false, factors = false, zeros = true;
    u16 d;
    u8 z;
    INLINE void load(const Packed &w, long item, int) {
        Integers::load(w, item);
        take(w.scales, w.blocks, item, 0);
    }
    static constexpr int scale_bytes = 3, scale_groups = SHARING, block_bytes = 0;
    INLINE void take(const u8 *scales, const u8 *, long item, long) {
        const u8 *shared = scales + (u64)item / (TILE * SHARING) * (TILE * scale_bytes);
        const int row = (int)((u64)item % TILE);
        d = load_u16(shared + row * 2);
        z = shared[TILE * 2 + row];
    }
    INLINE Scale scale() const { return {half_to_float(d), 0.0f, 1, 1, (int)z - LESS}; }
};

typedef HalfScale<Nibbles, 8> Q4_0;
typedef PairScale<Nibbles> Q4_1;
typedef HalfScale<Fives, 16> Q5_0;
typedef PairScale<Fives> Q5_1;
typedef HalfScale<Bytes, 0> Q8_0;
typedef SixBitScale<Nibbles> Q4_K;
typedef SixBitScale<Fives> Q5_K;
typedef FactorScale<Sixes> Q6_K;
typedef ZeroScale<Nibbles, 0, 1> INT4_G32;
typedef ZeroScale<Nibbles, 0, 2> INT4_G64;
typedef ZeroScale<Nibbles, 0, 4> INT4_G128;
typedef ZeroScale<Bytes, 128, 1> INT8_G32;
typedef ZeroScale<Bytes, 128, 2> INT8_G64;
typedef ZeroScale<Bytes, 128, 4> INT8_G128;

// The 32 weights of a group as float32: their defined values.
template <class E> INLINE void decode_group(const Packed &w, long item, int groups, float (&out)[32]) {
    E stored;
    u32 words[8];
    stored.load(w, item, groups);
    stored.words(words);
    const Scale scale = stored.scale();
    const float first = E::factors ? scale.d * (float)scale.low : scale.d;
    const float second = E::factors ? scale.d * (float)scale.high : scale.d;
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const int integer = (int)(signed char)(words[i / 4] >> i % 4 * 8) - (E::zeros ? scale.zero : E::zero);
        out[i] = (float)integer * (i < 16 ? first : second);
        if (E::offset) out[i] = out[i] + scale.m;
    }
}

// Encodings whose rows lie as they are stored.
struct F32 {
    static INLINE float weight(const u8 *rows, long index) { return ((const float *)rows)[index]; }
};
struct F16 {
    static INLINE float weight(const u8 *rows, long index) { return half_to_float(((const u16 *)rows)[index]); }
};
struct BF16 {
    static INLINE float weight(const u8 *rows, long index) {
        return float_of_bits((u32)((const u16 *)rows)[index] << 16);
    }
};

#ifndef FOR_ENCODINGS
#define FOR_ENCODINGS(X) X(q4_0, Q4_0) X(q4_1, Q4_1) X(q5_0, Q5_0) X(q5_1, Q5_1) X(q8_0, Q8_0) \
    X(q4_k, Q4_K) X(q5_k, Q5_K) X(q6_k, Q6_K) \
    X(int4_g32, INT4_G32) X(int4_g64, INT4_G64) X(int4_g128, INT4_G128) \
    X(int8_g32, INT8_G32) X(int8_g64, INT8_G64) X(int8_g128, INT8_G128)
#define FOR_PLAIN(X) X(f32, F32) X(f16, F16) X(bf16, BF16)
#endif
