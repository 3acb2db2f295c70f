// Activations as codes: a group of 32 becomes 32 signed bytes and four scalars (spec: quantize_a8).
//
// Codes lie as [T][groups][32], their words in the order 0 4 1 5 2 6 3 7, as matrix units take them;
// scalars as [T][groups]: scale, scale * sum, sum of the codes, sum of the second 16.
#pragma once
#include "vendor.h"

struct Scalars {
    float scale, scaled_sum;
    int sum, second;
};

INLINE int word_place(int word) { return word < 4 ? 2 * word : 2 * word - 7; }

// Four codes as a word, and the scalars, of the group of which each of 8 lanes holds four activations.
INLINE u32 codes_of_lane(const float (&x)[4], Scalars &scalars) {
    int largest = 0; // as integers, the bits of NaN are above those of infinity
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int bits = (int)(bits_of(x[i]) & 0x7FFFFFFFu);
        largest = bits > largest ? bits : largest;
    }
#pragma unroll
    for (int mask = 4; mask > 0; mask /= 2) {
        const int other = shuffle_xor(largest, mask);
        largest = other > largest ? other : largest;
    }
    const float scale = float_of_bits((u32)largest) / 127.0f;
    u32 word = 0;
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int code = 0;
        if (largest >= 0x7F800000)
            code = 1;
        else if (scale != 0.0f)
            code = (int)fminf(fmaxf(rintf(x[i] / scale), -127.0f), 127.0f);
        word |= (u32)(code & 255) << 8 * i;
        sum += code;
    }
    sum = sum + shuffle_xor(sum, 1);
    sum = sum + shuffle_xor(sum, 2);
    const int other = shuffle_xor(sum, 4); // of the other 16
    scalars.scale = scale;
    scalars.sum = sum + other;
    scalars.second = threadIdx.x % 8 < 4 ? other : sum;
    scalars.scaled_sum = scale * (float)scalars.sum;
    return word;
}

// The same, stored where the number of the group tells, if that is inside: all lanes take part.
INLINE void store_codes(u8 *codes, u8 *scalars, long group, const float4 &four, bool inside) {
    const float x[4] = {four.x, four.y, four.z, four.w};
    Scalars found;
    const u32 word = codes_of_lane(x, found);
    if (!inside) return;
    ((u32 *)(codes + group * 32))[word_place(threadIdx.x % 8)] = word;
    if (threadIdx.x % 8 == 0) ((Scalars *)scalars)[group] = found;
}

// One code, and the scalars, of the group of which each of 32 lanes holds one activation: the same figures.
INLINE int code_of_lane(float x, Scalars &scalars) {
    int largest = (int)(bits_of(x) & 0x7FFFFFFFu);
    for (int mask = 16; mask > 0; mask /= 2) {
        const int other = shuffle_xor(largest, mask);
        largest = other > largest ? other : largest;
    }
    const float scale = float_of_bits((u32)largest) / 127.0f;
    int code = 0;
    if (largest >= 0x7F800000)
        code = 1;
    else if (scale != 0.0f)
        code = (int)fminf(fmaxf(rintf(x / scale), -127.0f), 127.0f);
    scalars.scale = scale;
    scalars.sum = sum_of_lanes(code);
    scalars.second = sum_of_lanes(threadIdx.x % LANES < 16 ? 0 : code);
    scalars.scaled_sum = scale * (float)scalars.sum;
    return code;
}
