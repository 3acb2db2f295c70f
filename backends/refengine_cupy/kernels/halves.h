// Activations as float16: rows scaled where they are too large, and rounded (spec: MIX-9, MIX-10).
//
// A row's columns are cut into steps of 128, the last one filled up with zeros. A step has four groups of 32 columns,
// of which four neighbouring threads of a matrix unit have one each: eight columns of the first group, eight of the
// second, the third and the fourth; then the next eight of each. So a thread reads 16 bytes at a time, beside those
// of its neighbours.
#pragma once
#include "vendor.h"

#define STEP 128 // columns
#define STEP_GROUPS 4

INLINE int steps_of(int columns) { return (columns + STEP - 1) / STEP; }

// Where a column is in its row.
INLINE int half_place(int column) {
    const int group = column / 32 % STEP_GROUPS, eight = column % 32 / 8;
    return column / STEP * STEP + (eight * STEP_GROUPS + group) * 8 + column % 8;
}

// The power of two by which a row is divided, whose largest absolute value has these bits: 1 up to 2^15, and where the
// row holds infinity or NaN.
INLINE float row_power(u32 largest) {
    if (largest <= 0x47000000u || largest >= 0x7F800000u) return 1.0f;
    const u32 above = (largest >> 23) - 141 - ((largest & 0x7FFFFFu) == 0 ? 1 : 0);
    return float_of_bits((127 + above) << 23);
}
// 1 / power, which is exact.
INLINE float row_factor(float power) { return float_of_bits((254u << 23) - bits_of(power)); }
