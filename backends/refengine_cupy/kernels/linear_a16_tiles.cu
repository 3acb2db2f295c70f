// linear_a16 for many tokens: blocks of 128 rows and 128 tokens, through shared memory.
//
// Weights come to shared memory as they are stored and become float16 in registers; the order of a row's sums is that
// of linear_a16.cu.
#include "half_rows.h"
#include "segments.h"

#define ROW_TILES 8
#define TOKENS 128
#define THREADS 256
#define STAGES 2
#define MT 2 // tiles of a warp: of 16 rows, and of 8 tokens
#define NT 8
#define ITEMS (STEP_GROUPS * TILE) // of a tile, in a step

// Where 16 bytes of a group lie in shared memory: threads that read together have rows two by two, of four groups, and
// tokens two by two.
INLINE int swapped_row(int group, int row) { return row ^ (2 * group & 7); }
INLINE int swapped_eight(int token, int eight) { return eight ^ (token & 1); }

template <class E> struct Stage {
    u8 codes[ROW_TILES * ITEMS * E::code_bytes];
    u8 high[ROW_TILES * ITEMS * E::high_bytes + (E::high_bytes ? 0 : 16)];
    u8 scales[ROW_TILES * ITEMS / E::scale_groups * E::scale_bytes];
    u8 blocks[ROW_TILES * TILE * E::block_bytes + (E::block_bytes ? 0 : 16)];
    u8 x[TOKENS * STEP * 2];
};

template <class E> struct ManyTokens {
    const Product &a;
    const Part part;
    Stage<E> *stages;
    int first_tile, first_token;

    // From a plane with so many bytes of a row for so many groups: those of 16 rows lie together.
    template <int BYTES, int GROUPS> INLINE void copy_plane(u8 *to, const u8 *from, int step) const {
        constexpr int words = TILE * BYTES / 16, count = STEP_GROUPS / GROUPS;
        const int all = a.columns / 32 / GROUPS, tiles = (part.rows + TILE - 1) / TILE;
        for (int i = threadIdx.x; i < ROW_TILES * count * words; i += THREADS) {
            const int word = i % words, group = i / words % count, tile = i / words / count;
            const int from_tile = first_tile + tile < tiles ? first_tile + tile : tiles - 1;
            const int from_group = step * count + group < all ? step * count + group : all - 1;
            const int place = BYTES < 16 ? word : word / TILE * TILE + swapped_row(group, word % TILE);
            copy16(to + ((tile * count + group) * words + place) * 16, from + (((long)from_tile * all + from_group) * words + word) * 16);
        }
    }

    INLINE void copy_blocks(u8 *to, int step) const {
        constexpr int words = TILE * E::block_bytes / 16 + (E::block_bytes ? 0 : 1);
        const int blocks = a.columns / 256, tiles = (part.rows + TILE - 1) / TILE;
        for (int i = threadIdx.x; i < ROW_TILES * words; i += THREADS) {
            const int tile = first_tile + i / words < tiles ? first_tile + i / words : tiles - 1;
            copy16(to + i * 16, part.weight.blocks + ((long)tile * blocks + step / 2) * words * 16 + i % words * 16);
        }
    }

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
        copy_plane<E::code_bytes, 1>(to.codes, part.weight.codes, step);
        if (E::high_bytes) copy_plane<E::high_bytes ? E::high_bytes : 1, 1>(to.high, part.weight.high, step);
        copy_plane<E::scale_bytes, E::scale_groups>(to.scales, part.weight.scales, step);
        if (E::block_bytes) copy_blocks(to.blocks, step);
        copy_x(to.x, step);
    }

    INLINE void multiply(const Stage<E> &from, float (&sums)[MT][NT][4]) const {
        const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, group = lane % 4;
        const int warp_tile = warp % (ROW_TILES / MT) * MT, warp_token = warp / (ROW_TILES / MT) * NT * 8;
        PackedRow<E> held[MT][2];
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int tile = warp_tile + m, row = lane / 4 + 8 * i, item = (tile * STEP_GROUPS + group) * TILE;
                held[m][i].stored.fetch(from.codes, from.high, item + row, item + swapped_row(group, row));
                held[m][i].stored.take(from.scales, from.blocks, item + row, tile * TILE + row);
                held[m][i].open();
            }
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
