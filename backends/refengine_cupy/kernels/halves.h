// Activations as float16: rows scaled where they are too large, and rounded (spec: MIX-9, MIX-10).
//
// A row's columns are cut into steps of 128, the last one filled up with zeros. A step has four groups of 32 columns,
// of which four neighbouring threads of a matrix unit have one each, and eight products take four columns of every
// group: of each thread the first and the third, then the second and the fourth, for so they come out of stored integers.
//
// Where few tokens are multiplied, a thread reads what it needs for two products at once, beside its neighbours: eight
// columns of the first group, eight of the second, the third and the fourth; then the next eight of each. A row is by
// itself. For warpgroups, 64 columns of 128 rows lie together, as they will in shared memory (see warpgroups.h): of each
// row product by product, two columns of each group, then the other two of each.
#pragma once
#include "vendor.h"

#define STEP 128 // columns
#define STEP_GROUPS 4

INLINE int steps_of(int columns) { return (columns + STEP - 1) / STEP; }

#define PANEL_ROWS 128
#define PANEL_COLUMNS 64

// Where 16 bytes of a panel's row are.
INLINE int swizzled(int row, int sixteen) { return row * 128 + (sixteen ^ (row & 7)) * 16; }

// A row of float16 as kernels take it: by itself, or in panels.
struct HalfRow {
    u16 *start; // of the row, or of the panels of 128 rows
    int place;  // in panels: which of the rows; else negative

    // Four columns, the first of them a multiple of four.
    INLINE void store(int column, const float4 &x, float factor) const {
        const int group = column / 32 % STEP_GROUPS, eight = column % 32 / 8, four = column / 4 % 2;
        const u32 odd = halves_of(x.x * factor, x.z * factor), even = halves_of(x.y * factor, x.w * factor);
        if (place < 0) {
            const uint2 both = {odd, even};
            *(uint2 *)(start + column / STEP * STEP + (eight * STEP_GROUPS + group) * 8 + four * 4) = both;
            return;
        }
        u8 *panel = (u8 *)(start + (column / STEP * 2 + eight / 2) * PANEL_ROWS * PANEL_COLUMNS) + group * 4;
        const int sixteen = (eight % 2 * 2 + four) * 2;
        *(u32 *)(panel + swizzled(place, sixteen)) = odd, *(u32 *)(panel + swizzled(place, sixteen + 1)) = even;
    }
};

INLINE HalfRow half_row(u16 *halves, long row, int columns, int panels) {
    const long length = (long)steps_of(columns) * STEP;
    if (!panels) return {halves + row * length, -1};
    return {halves + row / PANEL_ROWS * PANEL_ROWS * length, (int)(row % PANEL_ROWS)};
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
