// linear in float32: y[t, n] = sum over k of weight[n, k] * x[t, k], and a bias.
//
// 32 lanes have one row of weights and up to TOKENS rows of x. Each lane adds up, in order, every 32nd group (or
// weight, where rows are stored plainly), and the lanes' sums are added pairwise. So a result's order depends on
// the number of columns and the encoding alone.
#include "encodings.h"

#define TOKENS 8
#define ROWS 8 // of weights in a block of threads

struct Linear {
    const float *x;
    const u8 *codes, *high, *scales, *blocks;
    const float *bias;
    float *y;
    int tokens, rows, columns;
};

INLINE void store_sums(const Linear &a, float (&sums)[TOKENS], int row, int first) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const float sum = sum_of_lanes(sums[t]);
        if (threadIdx.x % LANES == 0 && first + t < a.tokens)
            a.y[(long)(first + t) * a.rows + row] = a.bias ? sum + a.bias[row] : sum;
    }
}

template <class E> INLINE void multiply_packed(const Linear &a) {
    wait_for_producer();
    let_consumer_start();
    const int row = blockIdx.x * ROWS + threadIdx.x / LANES, first = blockIdx.y * TOKENS;
    if (row >= a.rows) return;
    const int groups = a.columns / 32;
    float sums[TOKENS] = {};
    for (int group = threadIdx.x % LANES; group < groups; group += LANES) {
        const long item = ((long)(row / TILE) * groups + group) * TILE + row % TILE;
        float weights[32];
        decode_group<E>({a.codes, a.high, a.scales, a.blocks}, item, groups, weights);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            if (first + t >= a.tokens) break;
            const float *x = a.x + (long)(first + t) * a.columns + group * 32;
#pragma unroll
            for (int i = 0; i < 32; i += 4) {
                const float4 four = load_float4(x + i);
                sums[t] = fmaf(weights[i], four.x, sums[t]);
                sums[t] = fmaf(weights[i + 1], four.y, sums[t]);
                sums[t] = fmaf(weights[i + 2], four.z, sums[t]);
                sums[t] = fmaf(weights[i + 3], four.w, sums[t]);
            }
        }
    }
    store_sums(a, sums, row, first);
}

template <class E> INLINE void multiply_plain(const Linear &a) {
    wait_for_producer();
    let_consumer_start();
    const int row = blockIdx.x * ROWS + threadIdx.x / LANES, first = blockIdx.y * TOKENS;
    if (row >= a.rows) return;
    float sums[TOKENS] = {};
    for (int k = threadIdx.x % LANES; k < a.columns; k += LANES) {
        const float weight = E::weight(a.codes, (long)row * a.columns + k);
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            if (first + t < a.tokens) sums[t] = fmaf(weight, a.x[(long)(first + t) * a.columns + k], sums[t]);
    }
    store_sums(a, sums, row, first);
}

#define X(name, E) KERNEL(linear_##name, Linear, 256) { multiply_packed<E>(a); }
FOR_ENCODINGS(X)
#undef X
#define X(name, E) KERNEL(linear_##name, Linear, 256) { multiply_plain<E>(a); }
FOR_PLAIN(X)
#undef X
