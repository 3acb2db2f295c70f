// Sealed keys and values: blocks of steps, centres and codes (spec: chapter Sealed keys and values), and their numbers.
//
// A number is step * (code + unit * centre), which float32 holds exactly. With u the code made unsigned and
// base = -step * (32768 + half - unit * centre), of at most 20 bits, it is step * (32768 + u) + base: the bits of
// 32768 + u are those of 32768 with u as their second byte, so a number takes a permutation and one fmaf.
#pragma once
#include "attention.h"

#define VALUE_GROUP 32  // elements of a value that share a step
#define MOST_GROUPS 8   // of a head
#define BASE 32768.0f
#define BASE_BITS 0x47000000u

struct Scale {
    float step, base;
};

INLINE float step_of(u32 byte) { return byte == 255 ? float_of_bits(0x7FC00000) : float_of_bits((byte + 856) << 20); }

template <int BITS> struct Integers {
    static constexpr bool integers = true;
    static constexpr int half = 1 << (BITS - 1), unit = 1 << (BITS - 4);
    u32 v[2];

    static INLINE int row_bytes(int size) { return BITS == 8 ? size : (size + 1) / 2; }

    static INLINE int code(const u8 *row, int size, int e) {
        if (BITS == 8) return (int)(signed char)row[e];
        const int below = row_bytes(size);
        return (e < below ? row[e] & 15 : row[e - below] >> 4) - half;
    }
    static INLINE float number(u32 step, int centre, int code) { return step_of(step) * (float)(code + unit * centre); }

    // What lies at a step's byte and a centre's, of which the latter counts from -128.
    static INLINE Scale scale_of(u32 step, float centre) {
        const float d = step_of(step);
        return {d, d * fmaf((float)unit, centre, -(float)(unit * 128 + half) - BASE)};
    }

    // A chunk as unsigned codes: where everything lies at multiples of 8 bytes, and the halves of a row are whole chunks.
    INLINE void load(const u8 *row, int size, int chunk) {
        const int below = row_bytes(size), at = chunk * CHUNK;
        const bool upper = BITS == 4 && at >= below;
        const uint2 x = *(const uint2 *)(row + (upper ? at - below : at));
        if (BITS == 8)
            v[0] = x.x ^ 0x80808080u, v[1] = x.y ^ 0x80808080u;
        else
            v[0] = x.x >> (upper ? 4 : 0) & 0x0F0F0F0Fu, v[1] = x.y >> (upper ? 4 : 0) & 0x0F0F0F0Fu;
    }
    INLINE float at(int e, Scale scale) const {
        const float u = float_of_bits(pick_bytes(v[e / 4], BASE_BITS, 0x7404 | e % 4 << 4));
        return fmaf(u, scale.step, scale.base);
    }
};

template <class C> struct Floats : C {
    static constexpr bool integers = false;
};

typedef Integers<8> Int8;
typedef Integers<4> Int4;
typedef Floats<HalfChunk> Float16;
typedef Floats<FloatChunk> Float32;

struct Block {
    int positions, kv_heads, size;

    INLINE u64 row(int offset, int head) const { return (u64)(offset * kv_heads + head); }
    INLINE int groups() const { return (size + VALUE_GROUP - 1) / VALUE_GROUP; }
};

// Where the parts of a sealed block lie, from where it begins.
template <class F> struct KeyParts {
    Block block;
    INLINE int steps(int head) const { return head * block.size; }
    INLINE int centres(int head) const { return (block.kv_heads + head) * block.size; }
    INLINE u64 codes(int offset, int head) const {
        return (u64)(2 * block.kv_heads * block.size) + block.row(offset, head) * F::row_bytes(block.size);
    }
    INLINE float number(const u8 *data, int offset, int head, int e) const {
        const int code = F::code(data + codes(offset, head), block.size, e);
        return F::number(data[steps(head) + e], (signed char)data[centres(head) + e], code);
    }
};

template <class F> struct ValueParts {
    Block block;
    INLINE u64 steps(int offset, int head) const { return block.row(offset, head) * block.groups(); }
    INLINE u64 centres(int offset, int head) const { return block.row(block.positions + offset, head) * block.groups(); }
    INLINE u64 codes(int offset, int head) const {
        return block.row(2 * block.positions, 0) * block.groups() + block.row(offset, head) * F::row_bytes(block.size);
    }
    INLINE float number(const u8 *data, int offset, int head, int e) const {
        const int code = F::code(data + codes(offset, head), block.size, e), group = e / VALUE_GROUP;
        return F::number(data[steps(offset, head) + group], (signed char)data[centres(offset, head) + group], code);
    }
};

// Exact copies; and sealed ones that are floats, where everything lies at multiples of 16 bytes.
template <class C> struct FloatParts {
    Block block;
    INLINE u64 numbers(int offset, int head) const { return block.row(offset, head) * block.size * C::bytes; }
    INLINE float number(const u8 *data, int offset, int head, int e) const {
        C one;
        one.load(data + numbers(offset, head) + e * C::bytes, 1, false);
        return one.at(0);
    }
};

// Sealed floats that may begin at any byte, as the codes before them may have any number of bytes.
template <class C> struct ScatteredParts : FloatParts<C> {
    INLINE void store(u8 *data, int offset, int head, int e, u32 bits) const {
        u8 *to = data + this->numbers(offset, head) + e * C::bytes;
        for (int i = 0; i < C::bytes; i++) to[i] = (u8)(bits >> 8 * i);
    }
    INLINE float number(const u8 *data, int offset, int head, int e) const {
        const u8 *from = data + this->numbers(offset, head) + e * C::bytes;
        u32 bits = 0;
        for (int i = 0; i < C::bytes; i++) bits |= (u32)from[i] << 8 * i;
        return C::bytes == 2 ? half_to_float((u16)bits) : float_of_bits(bits);
    }
};

template <bool> struct Choice {
    template <class A, class B> using Of = A;
};
template <> struct Choice<false> {
    template <class A, class B> using Of = B;
};
template <class F, class P> using PartsOf = typename Choice<F::integers>::template Of<P, ScatteredParts<F>>;

// Scales of a chunk's channels, from eight steps and eight centres.
template <class F> struct ChannelScales {
    Scale scales[CHUNK];
    INLINE void load(const u8 *steps, const u8 *centres) {
        const uint2 s = *(const uint2 *)steps, c = *(const uint2 *)centres;
#pragma unroll
        for (int e = 0; e < CHUNK; e++) {
            const u32 step = (e < 4 ? s.x : s.y) >> 8 * (e % 4) & 255;
            const u32 centre = (e < 4 ? c.x : c.y) ^ 0x80808080u;
            scales[e] = F::scale_of(step, float_of_bits(pick_bytes(centre, BASE_BITS, 0x7404 | e % 4 << 4)) - BASE);
        }
    }
    INLINE const ChannelScales &from(int i) const { return *this; }
    INLINE float number(const F &chunk, int k, int e) const { return chunk.at(e, scales[e]); }
};

// Of a chunk of values at each of some positions; `stride` from the scales of one to those of the next.
template <class F, int COUNT> struct PositionScales {
    Scale scales[COUNT];
    INLINE void load(const u8 *steps, const u8 *centres, int stride) {
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            const float centre = (float)(signed char)centres[k * stride] + 128.0f;
            scales[k] = F::scale_of(steps[k * stride], centre);
        }
    }
    INLINE float number(const F &chunk, int k, int e) const { return chunk.at(e, scales[k]); }
};

// A value's scale as one word: a step has four significant bits, and a base is a step times at most 17.
template <class F> INLINE u32 packed_scale(u32 step, int centre) {
    return (bits_of(step_of(step)) & 0xFFFF0000u) | (u32)(32768 + F::half - F::unit * centre);
}
INLINE Scale unpacked_scale(u32 word) {
    const float step = float_of_bits(word & 0xFFFF0000u);
    return {step, -(float)(word & 0xFFFF) * step};
}
