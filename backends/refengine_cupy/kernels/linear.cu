// linear in float32: y[t, n] = sum over k of weight[n, k] * x[t, k], and a bias.
//
// 32 lanes have one row of weights and up to TOKENS rows of x. Each lane adds up, in order, every 32nd group (or
// weight, where rows are stored plainly), and the lanes' sums are added pairwise. So a result's order depends on
// the number of columns and the encoding alone, and is the same in tiles of rows and tokens.
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

#define SIDE 8 // of a tile: rows, and tokens
#define ROW_TILES 4 // of a block of threads
#define TOKEN_TILES 2

// Tiles of 8 rows and 8 tokens, of which there must be so many: of each of its columns, a lane has 16 numbers for 64
// multiplications. The last tiles lie over those before them, with the same results.
template <class E> struct PlainTile {
    const Linear &a;
    long first_weight, first_x;

    INLINE void load(int k, float (&weights)[SIDE], float (&x)[SIDE]) const {
#pragma unroll
        for (int i = 0; i < SIDE; i++) {
            weights[i] = E::weight(a.codes, first_weight + (long)i * a.columns + k);
            x[i] = a.x[first_x + (long)i * a.columns + k];
        }
    }

    static INLINE void multiply(const float (&weights)[SIDE], const float (&x)[SIDE], float (&sums)[SIDE * SIDE]) {
#pragma unroll
        for (int i = 0; i < SIDE * SIDE; i++) sums[i] = fmaf(weights[i % SIDE], x[i / SIDE], sums[i]);
    }

    INLINE void add_up(float (&sums)[SIDE * SIDE]) const {
        float weights[2][SIDE], x[2][SIDE];
        int k = threadIdx.x % LANES;
        for (; k + LANES < a.columns; k += 2 * LANES) { // the same addresses serve for both loads
            load(k, weights[0], x[0]), load(k + LANES, weights[1], x[1]);
            multiply(weights[0], x[0], sums), multiply(weights[1], x[1], sums);
        }
        if (k >= a.columns) return;
        load(k, weights[0], x[0]);
        multiply(weights[0], x[0], sums);
    }
};

// Of COUNT results whose parts are in 32 lanes, lane l has those from COUNT / 32 * l on at the beginning of `sums`:
// added as by sum_of_lanes, but each sum in one lane.
template <int COUNT, int MASK> INLINE void share_sums(float (&sums)[SIDE * SIDE]) {
    const bool upper = threadIdx.x & MASK;
#pragma unroll
    for (int i = 0; i < COUNT / 2; i++) {
        const float mine = upper ? sums[COUNT / 2 + i] : sums[i], others = upper ? sums[i] : sums[COUNT / 2 + i];
        sums[i] = mine + shuffle_xor(others, MASK);
    }
    if constexpr (MASK > 1) share_sums<COUNT / 2, MASK / 2>(sums);
}

template <class E> INLINE void multiply_plain_tiles(const Linear &a) {
    wait_for_producer();
    let_consumer_start();
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    int token = (blockIdx.x * TOKEN_TILES + warp / ROW_TILES) * SIDE, row = (blockIdx.y * ROW_TILES + warp % ROW_TILES) * SIDE;
    if (row >= a.rows || token >= a.tokens) return;
    token = token < a.tokens - SIDE ? token : a.tokens - SIDE;
    row = row < a.rows - SIDE ? row : a.rows - SIDE;
    const PlainTile<E> tile = {a, (long)row * a.columns, (long)token * a.columns};
    float sums[SIDE * SIDE] = {};
    tile.add_up(sums);
    share_sums<SIDE * SIDE, LANES / 2>(sums);
    token += lane * 2 / SIDE, row += lane * 2 % SIDE;
#pragma unroll
    for (int i = 0; i < 2; i++)
        a.y[(long)token * a.rows + row + i] = a.bias ? sums[i] + a.bias[row + i] : sums[i];
}

#define X(name, E) KERNEL(linear_##name, Linear, 256) { multiply_packed<E>(a); }
FOR_ENCODINGS(X)
#undef X
#define X(name, E)                                                                                     \
    KERNEL(linear_##name, Linear, 256) { multiply_plain<E>(a); }                                       \
    KERNEL_IN_COMPANY(linear_tiles_##name, Linear, 256, 2) { multiply_plain_tiles<E>(a); }
FOR_PLAIN(X)
#undef X
