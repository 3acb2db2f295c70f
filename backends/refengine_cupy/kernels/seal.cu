// Sealing of blocks that a step fills, from their exact copies: the least steps and the nearest codes.
//
// Quotients go in float32. What decides is whether x / step lies below, at or above the middle of two codes, or a step;
// such a limit times a step has at most 17 bits, so float32 holds it, and its neighbours are farther away than one part
// in 2^24: none of their quotients rounds to the limit.
#include "sealed.h"

#define SEALING 128
#define NOWHERE 1048576.0f // beyond all codes and centres

struct Seal {
    const u8 *exact_keys, *exact_values; // of one layer in block 0
    u8 *keys, *values;
    const int *exact_tables, *tables, *sequences, *positions;
    u64 exact_block_bytes, block_bytes;
    int tokens, blocks; // blocks: columns of the tables
    int kv_heads, size, block_size;
    int stretch; // tokens that a block of threads looks at
};

// Numbers of a block's exact copy.
struct Copies {
    const u8 *data;
    Block block;
    int head;
    INLINE float at(int offset, int e) const { return FloatParts<EXACT>{block}.number(data, offset, head, e); }
};

struct Range {
    float low, high;
    int size; // the bits of the largest, without signs: those of NaN are above those of infinity
    INLINE void add(float x) {
        const int bits = (int)(bits_of(x) & 0x7FFFFFFFu);
        low = fminf(low, x), high = fmaxf(high, x), size = bits > size ? bits : size;
    }
};
INLINE Range nothing() { return {float_of_bits(0x7F800000u), float_of_bits(0xFF800000u), 0}; }

INLINE int clamp(int x, int least, int most) { return x < least ? least : x > most ? most : x; }

// The byte of the least step of which so many reach a size; 255 where there is none: the quotient, rounded up to four
// significant bits. The bytes that name steps are a part of their bits.
INLINE int least_step(float size, int multiple) {
    const int bits = (int)(bits_of(size / (float)multiple) & 0x7FFFFFFFu);
    return clamp(((bits + 0xFFFFF) >> 20) - 856, 0, 255);
}

INLINE int nearest(float x, float step) {
    const float quotient = rintf(x / step);
    return quotient < NOWHERE ? (int)quotient : (int)-NOWHERE;
}

template <class F> INLINE void write_scale(const Range &range, u8 *step, u8 *centre) {
    const int spread = least_step(range.high - range.low, 2 * F::half - F::unit);
    const int reach = least_step(float_of_bits((u32)range.size), 127 * F::unit + F::half - 1);
    const int byte = spread > reach ? spread : reach;
    const int counted = nearest(range.low, step_of((u32)byte)) + F::half;
    *step = (u8)byte;
    *centre = (u8)clamp(F::unit == 16 ? counted >> 4 : counted, -128, 127);
}

template <class F> INLINE u32 code_of(float x, u8 step, u8 centre) {
    const int code = nearest(x, step_of(step)) - F::unit * (int)(signed char)centre;
    return (u32)clamp(code, -F::half, F::half - 1);
}

template <class F> INLINE void write_scales(const Copies &from, const KeyParts<F> &parts, u8 *to) {
    for (int e = threadIdx.x; e < from.block.size; e += SEALING) {
        Range range = nothing();
        for (int offset = 0; offset < from.block.positions; offset++) range.add(from.at(offset, e));
        write_scale<F>(range, to + parts.steps(from.head) + e, to + parts.centres(from.head) + e);
    }
}

// LANES threads have a group.
template <class F> INLINE void write_scales(const Copies &from, const ValueParts<F> &parts, u8 *to) {
    const int lane = threadIdx.x % LANES, groups = from.block.groups();
    for (int item = threadIdx.x / LANES; item < from.block.positions * groups; item += SEALING / LANES) {
        const int offset = item / groups, group = item % groups, e = group * VALUE_GROUP + lane;
        Range range = nothing();
        if (e < from.block.size) range.add(from.at(offset, e));
        for (int mask = 16; mask > 0; mask /= 2) {
            const int size = shuffle_xor(range.size, mask);
            range.low = fminf(range.low, shuffle_xor(range.low, mask));
            range.high = fmaxf(range.high, shuffle_xor(range.high, mask));
            range.size = size > range.size ? size : range.size;
        }
        if (lane > 0) continue;
        write_scale<F>(range, to + parts.steps(offset, from.head) + group, to + parts.centres(offset, from.head) + group);
    }
}

template <class F> INLINE u32 code_at(const Copies &from, const KeyParts<F> &parts, const u8 *to, int offset, int e) {
    return code_of<F>(from.at(offset, e), to[parts.steps(from.head) + e], to[parts.centres(from.head) + e]);
}
template <class F> INLINE u32 code_at(const Copies &from, const ValueParts<F> &parts, const u8 *to, int offset, int e) {
    const int group = e / VALUE_GROUP;
    const u8 step = to[parts.steps(offset, from.head) + group], centre = to[parts.centres(offset, from.head) + group];
    return code_of<F>(from.at(offset, e), step, centre);
}

template <class F, class P> INLINE void seal_integers(const Copies &from, const P &parts, u8 *to) {
    write_scales<F>(from, parts, to);
    __syncthreads();
    const int row = F::row_bytes(from.block.size);
    for (int item = threadIdx.x; item < from.block.positions * row; item += SEALING) {
        const int offset = item / row, e = item % row;
        u32 codes = code_at<F>(from, parts, to, offset, e);
        if (F::unit == 1) {
            codes = codes + 8;
            if (e + row < from.block.size) codes |= (code_at<F>(from, parts, to, offset, e + row) + 8) << 4;
        }
        to[parts.codes(offset, from.head) + e] = (u8)codes;
    }
    __syncthreads();
}

// The bits of a sealed float; what overflows is NaN.
template <class C> INLINE u32 sealed_bits(float x) {
    if (C::bytes == 2) {
        const u16 half = float_to_half(x);
        return (half & 0x7FFF) == 0x7C00 ? 0x7E00 : half;
    }
    return (bits_of(x) & 0x7FFFFFFFu) == 0x7F800000u ? 0x7FC00000u : bits_of(x);
}

template <class C> INLINE void seal_floats(const Copies &from, const ScatteredParts<C> &parts, u8 *to) {
    for (int item = threadIdx.x; item < from.block.positions * from.block.size; item += SEALING) {
        const int offset = item / from.block.size, e = item % from.block.size;
        parts.store(to, offset, from.head, e, sealed_bits<C>(from.at(offset, e)));
    }
}

template <class K, class V> INLINE void seal(const Copies &from, u8 *to, bool keys) {
    if (keys) {
        if constexpr (K::integers)
            seal_integers<K>(from, KeyParts<K>{from.block}, to);
        else
            seal_floats(from, ScatteredParts<K>{from.block}, to);
    } else {
        if constexpr (V::integers)
            seal_integers<V>(from, ValueParts<V>{from.block}, to);
        else
            seal_floats(from, ScatteredParts<V>{from.block}, to);
    }
}

// A block of threads seals one head's keys, or values, of all blocks that a stretch of the step's tokens fills.
KERNEL(kv_seal, Seal, SEALING) {
    wait_for_producer();
    let_consumer_start();
    const int head = blockIdx.y;
    const bool keys = blockIdx.z == 0;
    for (int i = 0; i < a.stretch; i++) {
        const int token = blockIdx.x * a.stretch + i;
        if (token >= a.tokens) return;
        const int next = a.positions[token] + 1;
        if (next % a.block_size != 0) continue;
        const long entry = (long)a.sequences[token] * a.blocks + next / a.block_size - 1;
        const u8 *from = (keys ? a.exact_keys : a.exact_values) + (u64)a.exact_tables[entry] * a.exact_block_bytes;
        u8 *to = (keys ? a.keys : a.values) + (u64)a.tables[entry] * a.block_bytes;
        seal<KEYS, VALUES>({from, {a.block_size, a.kv_heads, a.size}, head}, to, keys);
    }
}
