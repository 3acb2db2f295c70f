// linear_a16 for many tokens: blocks of 128 rows and 128 tokens, through shared memory.
//
// Weights come to shared memory as they are stored and become float16 in registers; the order of a row's sums is that
// of linear_a16.cu.
#include "segments.h"
#include "weight_stage.h"

#define ROW_TILES 8
#define TOKENS 128
#define THREADS 256
#define STAGES 2
#define MT 2 // tiles of a warp: of 16 rows, and of 8 tokens
#define NT 8

// Where 16 bytes of a token lie: threads that read together have tokens two by two.
INLINE int swapped_eight(int token, int eight) { return eight ^ (token & 1); }

template <class E> struct Stage {
    WeightStage<E, ROW_TILES> weights;
    u8 x[TOKENS * STEP * 2];
};

template <class E> struct ManyTokens {
    const Product &a;
    const Part part;
    Stage<E> *stages;
    int first_tile, first_token;

    INLINE void copy_x(u8 *to, int step) const {
        const long padded = (long)steps_of(a.columns) * STEP;
        for (int i = threadIdx.x; i < TOKENS * 16; i += THREADS) {
            const int token = i / 16, eight = i / 4 % 4, group = i % 4;
            const int from = first_token + token < a.tokens ? first_token + token : a.tokens - 1;
            copy16(to + token * STEP * 2 + (swapped_eight(token, eight) * 4 + group) * 16, (const u16 *)a.x_codes + from * padded + step * STEP + i % 16 * 8);
        }
    }

    INLINE void load(int step) const {
        Stage<E> &to = stages[step % STAGES];
        to.weights.template load<THREADS>(part, a.columns, first_tile, step);
        copy_x(to.x, step);
    }

    INLINE void multiply(const Stage<E> &from, float (&sums)[MT][NT][4]) const {
        const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, group = lane % 4;
        const int warp_tile = warp % (ROW_TILES / MT) * MT, warp_token = warp / (ROW_TILES / MT) * NT * 8;
        PackedRow<E> held[MT][2];
#pragma unroll
        for (int m = 0; m < MT; m++) from.weights.template take<true>(held[m], warp_tile + m);
#pragma unroll
        for (int eight = 0; eight < 4; eight++) {
            u32 w[MT][2][4];
#pragma unroll
            for (int m = 0; m < MT; m++) take_eight(held[m], eight, w[m]);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const int token = warp_token + n * 8 + lane / 4;
                const uint4 v = *(const uint4 *)(from.x + token * STEP * 2 + (swapped_eight(token, eight) * 4 + group) * 16);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    multiply_tile_halves(sums[m][n], w[m][0], v.x, v.y);
                    multiply_tile_halves(sums[m][n], w[m][1], v.z, v.w);
                }
            }
        }
    }

    INLINE void store(const float (&sums)[MT][NT][4]) const {
        const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
        const int warp_tile = warp % (ROW_TILES / MT) * MT, warp_token = warp / (ROW_TILES / MT) * NT * 8;
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int row = (first_tile + warp_tile + m) * TILE + lane / 4 + i / 2 * 8;
                    const int token = first_token + warp_token + n * 8 + lane % 4 * 2 + i % 2;
                    if (row >= part.rows || token >= a.tokens) continue;
                    const long at = (long)token * part.rows + row;
                    float sum = sums[m][n][i] * ((const float *)a.x_scalars)[token];
                    if (part.bias) sum = sum + part.bias[row];
                    part.y[at] = a.residual ? a.residual[at] + sum : sum;
                }
    }

    INLINE void run() const {
        const int steps = steps_of(a.columns), each = steps_each(steps);
        float sums[MT][NT][4] = {}, total[MT][NT][4] = {};
        load(0);
        copies_issued();
        for (int step = 0; step < steps; step++) {
            copies_done<0>();
            __syncthreads();
            if (step + 1 < steps) load(step + 1);
            copies_issued();
            multiply(stages[step % STAGES], sums);
            if ((step + 1) % each != 0 && step + 1 < steps) continue;
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        total[m][n][i] = step < each ? sums[m][n][i] : total[m][n][i] + sums[m][n][i];
                        sums[m][n][i] = 0.0f;
                    }
        }
        store(total);
    }
};

// blockIdx.x counts blocks of rows, of all parts; blockIdx.y blocks of tokens.
template <class E> INLINE void many_tokens(const Product &a) {
    SHARED_BYTES(bytes);
    int at = blockIdx.x;
    const Part part = part_of(a, part_number(a, ROW_TILES * TILE, at));
    wait_for_producer();
    let_consumer_start();
    ManyTokens<E> many = {a, part, (Stage<E> *)bytes, at * ROW_TILES, (int)blockIdx.y * TOKENS};
    many.run();
}

#define X(name, E) KERNEL_IN_COMPANY(many_##name, Product, THREADS, 1) { many_tokens<E>(a); }
FOR_ENCODINGS(X)
#undef X
