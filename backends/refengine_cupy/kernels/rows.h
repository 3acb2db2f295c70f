// A row that a block of threads normalises, or rounds to float16.
#pragma once
#include "halves.h"

// Where the row is the one of a step: what kernels of linear_a16_one.cu and linear_a8.cu do with it, others do in the
// same order.
#define TOKEN_THREADS 256
#define TOKEN_FOURS 8

// Of the first THREADS of ALL threads of a block.
template <int THREADS, int ALL = THREADS> INLINE float block_sum(float sum) {
    SHARED float parts[ALL / LANES];
    sum = sum_of_lanes(sum);
    if (threadIdx.x % LANES == 0) parts[threadIdx.x / LANES] = sum;
    __syncthreads();
    sum = threadIdx.x % LANES < THREADS / LANES ? parts[threadIdx.x % LANES] : 0.0f;
    return sum_of_lanes(sum);
}

template <int THREADS> INLINE u32 block_largest(u32 largest) {
    SHARED u32 parts[THREADS / LANES];
    for (int mask = 16; mask > 0; mask /= 2) {
        const u32 other = (u32)shuffle_xor((int)largest, mask);
        largest = other > largest ? other : largest;
    }
    if (threadIdx.x % LANES == 0) parts[threadIdx.x / LANES] = largest;
    __syncthreads();
    for (int i = 0; i < THREADS / LANES; i++) largest = parts[i] > largest ? parts[i] : largest;
    return largest;
}

INLINE u32 larger(u32 largest, float x) {
    const u32 bits = bits_of(x) & 0x7FFFFFFFu;
    return bits > largest ? bits : largest;
}
INLINE u32 larger(u32 largest, const float4 &x) { return larger(larger(larger(larger(largest, x.x), x.y), x.z), x.w); }

INLINE float4 load_four(const float *x, int column, int columns) {
    if (columns % 4 == 0 && column < columns) return load_float4(x + column);
    float four[4];
#pragma unroll
    for (int i = 0; i < 4; i++) four[i] = column + i < columns ? x[column + i] : 0.0f;
    return make_float4(four[0], four[1], four[2], four[3]);
}

// rms_norm of a row of whole groups of 32 columns, held in registers: a thread has up to FOURS times four.
template <int THREADS, int FOURS> struct NormedRow {
    float4 x[FOURS], weight[FOURS];

    static INLINE int column(int k) { return (k * THREADS + (int)threadIdx.x) * 4; }

    INLINE void load_weights(const float *from, int columns) {
#pragma unroll
        for (int k = 0; k < FOURS; k++)
            if (column(k) < columns) weight[k] = load_float4(from + column(k));
    }
    INLINE void normalise(const float *from, int columns, float epsilon) {
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < FOURS; k++) {
            if (column(k) >= columns) continue;
            x[k] = load_float4(from + column(k));
            sum = fmaf(x[k].x, x[k].x, sum);
            sum = fmaf(x[k].y, x[k].y, sum);
            sum = fmaf(x[k].z, x[k].z, sum);
            sum = fmaf(x[k].w, x[k].w, sum);
        }
        sum = THREADS == LANES ? sum_of_lanes(sum) : block_sum<THREADS>(sum);
        const float factor = 1.0f / sqrtf(sum / (float)columns + epsilon);
#pragma unroll
        for (int k = 0; k < FOURS; k++) {
            if (column(k) >= columns) continue;
            x[k].x = x[k].x * factor * weight[k].x, x[k].y = x[k].y * factor * weight[k].y;
            x[k].z = x[k].z * factor * weight[k].z, x[k].w = x[k].w * factor * weight[k].w;
        }
    }
    // As bits, without the sign.
    INLINE u32 largest(int columns) const {
        u32 most = 0;
#pragma unroll
        for (int k = 0; k < FOURS; k++)
            if (column(k) < columns) most = larger(most, x[k]);
        return most;
    }
    INLINE void store(const HalfRow &row, int columns, float power) const {
#pragma unroll
        for (int k = 0; k < FOURS; k++)
            if (column(k) < columns) row.store(column(k), x[k], row_factor(power));
    }
};

// Zeros behind a row, up to the end of its last step.
INLINE void fill_step(const HalfRow &row, int columns, int threads) {
    const float4 zero = {};
    for (int i = (columns + 3) / 4 * 4 + threadIdx.x * 4; i < steps_of(columns) * STEP; i += threads * 4) row.store(i, zero, 1.0f);
}

// Calls what is given with each four of a thread's columns, and their numbers: loads go together, FOURS at a time, for
// each waits as long as all.
template <int THREADS, int FOURS, class L, class F> INLINE void for_fours(int columns, const L &load, const F &body) {
    for (int start = threadIdx.x * 4; start < columns; start += FOURS * THREADS * 4) {
        typename L::Loaded loaded[FOURS];
#pragma unroll
        for (int k = 0; k < FOURS; k++)
            if (start + k * THREADS * 4 < columns) loaded[k] = load(start + k * THREADS * 4);
#pragma unroll
        for (int k = 0; k < FOURS; k++)
            if (start + k * THREADS * 4 < columns) body(start + k * THREADS * 4, load.opened(loaded[k]));
    }
}

struct Numbers {
    typedef float4 Loaded;
    const float *x;
    int columns;
    INLINE Loaded operator()(int i) const { return load_four(x, i, columns); }
    INLINE float4 opened(const Loaded &four) const { return four; }
};

struct NormedNumbers {
    struct Loaded {
        float4 x, weight;
    };
    const float *x, *weight;
    float factor;
    INLINE Loaded operator()(int i) const { return {load_float4(x + i), load_float4(weight + i)}; }
    INLINE float4 opened(const Loaded &four) const {
        return make_float4(
            four.x.x * factor * four.weight.x, four.x.y * factor * four.weight.y, four.x.z * factor * four.weight.z,
            four.x.w * factor * four.weight.w
        );
    }
};

// A row of any length as float16, with zeros behind it; gives its power.
template <int THREADS, int FOURS, class L> INLINE float store_row(const HalfRow &row, int columns, const L &load) {
    u32 largest = 0;
    for_fours<THREADS, FOURS>(columns, load, [&](int i, const float4 &x) {
        largest = larger(largest, x);
        row.store(i, x, 1.0f);
    });
    const float power = row_power(block_largest<THREADS>(largest));
    if (power != 1.0f) for_fours<THREADS, 1>(columns, load, [&](int i, const float4 &x) { row.store(i, x, row_factor(power)); });
    fill_step(row, columns, THREADS);
    return power;
}
template <int THREADS, int FOURS> INLINE float round_row(const float *x, const HalfRow &row, int columns) {
    return store_row<THREADS, FOURS>(row, columns, Numbers{x, columns});
}

// What a row is multiplied with in NormedRow, for threads that have no registers for it: the first THREADS of ALL.
template <int THREADS, int ALL = THREADS> INLINE float norm_factor(const float *x, int columns, float epsilon) {
    float sum = 0.0f;
    if (THREADS == ALL || threadIdx.x < THREADS) {
        for_fours<THREADS, 4>(columns, Numbers{x, columns}, [&](int, const float4 &four) {
            sum = fmaf(four.x, four.x, sum);
            sum = fmaf(four.y, four.y, sum);
            sum = fmaf(four.z, four.z, sum);
            sum = fmaf(four.w, four.w, sum);
        });
    }
    return 1.0f / sqrtf(block_sum<THREADS, ALL>(sum) / (float)columns + epsilon);
}

// The numbers of NormedRow, as float16.
template <int THREADS> INLINE float normed_row(const float *x, const float *weight, const HalfRow &row, int columns, float epsilon) {
    const float factor = norm_factor<THREADS>(x, columns, epsilon);
    return store_row<THREADS, 4>(row, columns, NormedNumbers{x, weight, factor});
}
