// What kernels of linear_a8 take: codes of activations, and up to three matrices that are multiplied with them.
#pragma once
#include "encodings.h"

struct Product {
    const u8 *x_codes, *x_scalars; // [T][groups]
    const u8 *codes_0, *high_0, *scales_0, *blocks_0;
    const u8 *codes_1, *high_1, *scales_1, *blocks_1;
    const u8 *codes_2, *high_2, *scales_2, *blocks_2;
    const float *bias_0, *bias_1, *bias_2;
    const float *residual; // [T, rows_0], may be y_0
    float *y_0, *y_1, *y_2;
    u8 *codes, *scalars; // of one gated row, in the place of y_0, where they are not null
    u64 first_token;
    int tokens, columns, rows_0, rows_1, rows_2;
};

struct Part {
    Packed weight;
    const float *bias;
    float *y;
    int rows;
};

template <class A> INLINE Part part_of(const A &a, int number) {
    if (number == 0) return {{a.codes_0, a.high_0, a.scales_0, a.blocks_0}, a.bias_0, a.y_0, a.rows_0};
    if (number == 1) return {{a.codes_1, a.high_1, a.scales_1, a.blocks_1}, a.bias_1, a.y_1, a.rows_1};
    return {{a.codes_2, a.high_2, a.scales_2, a.blocks_2}, a.bias_2, a.y_2, a.rows_2};
}
