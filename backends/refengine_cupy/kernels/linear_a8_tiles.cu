// linear_a8 for many tokens: matrix units multiply tiles of weights with tiles of codes, a group of 32 at a time.
//
// A product of a group is exact, so nothing depends on how tiles are cut; what follows it goes from left to right,
// one group after the other, in the thread that has the element. The units add to what they are given: 1.5 * 2^23, less
// the encoding's zero times the sum of the codes. So the integer they give is a float's bits, and that float is
// 1.5 * 2^23 and the exact product: no conversion is needed. Where each group of a row has a zero of its own, it is
// taken off after them.
#include "codes.h"
#include "product.h"

#if defined(HAS_MATRIX_UNITS)

#define GROUPS 4 // of a stage
#define MAGIC 0x4B400000
#define MAGIC_FLOAT 12582912.0f

template <class E, int WARPS_M, int WARPS_N, int MT, int NT, int STAGES, int AHEAD> struct Tiles {
    static constexpr int rows = WARPS_M * MT, tokens = WARPS_N * NT * 8, threads = WARPS_M * WARPS_N * LANES;
    static constexpr int fields = E::factors ? 3 : E::offset ? 3 : 2;

    // rows counts tiles of 16.
    struct Stage {
        u8 codes[rows * GROUPS * TILE * E::code_bytes];
        u8 high[rows * GROUPS * TILE * (E::high_bytes ? E::high_bytes : 1)];
        u8 scales[rows * GROUPS / E::scale_groups * TILE * E::scale_bytes];
        u8 blocks[rows * TILE * (E::block_bytes ? E::block_bytes : 1)];
        u8 x_codes[GROUPS * tokens * 32];
        u32 x_fields[fields][GROUPS][tokens]; // scale, sum, and scaled sum or sum of the second 16
    };

    const Product &a;
    Part part;
    Stage *stages;
    int first_tile, tiles, first_token, groups;

    // 16 bytes at a time: of each tile of rows, `bytes` that lie together.
    template <int BYTES> INLINE void copy_rows(u8 *to, const u8 *from, int start, int all) {
        for (int i = threadIdx.x * 16; i < rows * BYTES; i += threads * 16) {
            const int row = i / BYTES, tile = first_tile + row < tiles ? first_tile + row : tiles - 1;
            const long at = (long)tile * all + start + i % BYTES;
            copy16(to + i, from + (start + i % BYTES < all ? at : 0));
        }
    }

    // How many of `count` copies a thread makes.
    static INLINE constexpr int share(int count) { return (count + threads - 1) / threads; }
    static constexpr int code_copies = rows * GROUPS * TILE * E::code_bytes / 16;
    static constexpr int high_copies = rows * GROUPS * TILE * E::high_bytes / 16;
    static constexpr int scale_copies = rows * GROUPS / E::scale_groups * TILE * E::scale_bytes / 16;
    static constexpr int x_copies = GROUPS * tokens * 2, field_copies = GROUPS * tokens;

    // Where a thread's copies come from, at the stage to be loaded next.
    u32 code_from[share(code_copies)], high_from[share(high_copies) + 1], scale_from[share(scale_copies)];
    u32 x_from[share(x_copies)], field_from[share(field_copies)];

    // Of a plane that has BYTES for what SHARING groups of a row have in common.
    template <int BYTES, int COUNT, int SHARING = 1> INLINE void begin_rows(u32 *from) {
        constexpr int stage = GROUPS / SHARING * TILE * BYTES;
#pragma unroll
        for (int k = 0; k < share(COUNT); k++) {
            const int i = (threadIdx.x + k * threads) * 16, row = i / stage;
            const int tile = first_tile + row < tiles ? first_tile + row : tiles - 1;
            from[k] = (u32)tile * (groups / SHARING * TILE * BYTES) + i % stage;
        }
    }

    INLINE void begin() {
        begin_rows<E::code_bytes, code_copies>(code_from);
        if (E::high_bytes) begin_rows<E::high_bytes, high_copies>(high_from);
        begin_rows<E::scale_bytes, scale_copies, E::scale_groups>(scale_from);
#pragma unroll
        for (int k = 0; k < share(x_copies); k++) {
            const int i = threadIdx.x + k * threads;
            x_from[k] = (u32)record(i / 2 / GROUPS, i / 2 % GROUPS) * 32 + i % 2 * 16;
        }
#pragma unroll
        for (int k = 0; k < share(field_copies); k++) {
            const int i = threadIdx.x + k * threads;
            field_from[k] = (u32)record(i / GROUPS, i % GROUPS) * 16;
        }
    }

    template <int BYTES, int COUNT, int SHARING = 1> INLINE void copy_planes(u8 *to, const u8 *plane, u32 *from) {
#pragma unroll
        for (int k = 0; k < share(COUNT); k++) {
            const int i = threadIdx.x + k * threads;
            if (COUNT % threads == 0 || i < COUNT) copy16(to + i * 16, plane + from[k]);
            from[k] += GROUPS / SHARING * TILE * BYTES;
        }
    }

    // A stage all of whose groups there are.
    INLINE void load_whole(int stage, int start) {
        Stage &to = stages[stage];
        copy_planes<E::code_bytes, code_copies>(to.codes, part.weight.codes, code_from);
        if (E::high_bytes) copy_planes<E::high_bytes, high_copies>(to.high, part.weight.high, high_from);
        copy_planes<E::scale_bytes, scale_copies, E::scale_groups>(to.scales, part.weight.scales, scale_from);
        if (E::block_bytes)
            copy_rows<TILE * E::block_bytes>(to.blocks, part.weight.blocks, start / 8 * TILE * E::block_bytes, groups / 8 * TILE * E::block_bytes);
#pragma unroll
        for (int k = 0; k < share(x_copies); k++) {
            const int i = threadIdx.x + k * threads, group = i / 2 % GROUPS, token = i / 2 / GROUPS;
            if (x_copies % threads == 0 || i < x_copies)
                copy16(to.x_codes + (group * tokens + token) * 32 + i % 2 * 16, a.x_codes + x_from[k]);
            x_from[k] += GROUPS * 32;
        }
#pragma unroll
        for (int k = 0; k < share(field_copies); k++) {
            const int i = threadIdx.x + k * threads, group = i % GROUPS, token = i / GROUPS;
            const u8 *x = a.x_scalars + field_from[k];
            field_from[k] += GROUPS * 16;
            if (field_copies % threads != 0 && i >= field_copies) continue;
            copy4(&to.x_fields[0][group][token], x);
            copy4(&to.x_fields[1][group][token], x + 8);
            if (E::offset) copy4(&to.x_fields[2 % fields][group][token], x + 4);
            if (E::factors) copy4(&to.x_fields[2 % fields][group][token], x + 12);
        }
    }

    INLINE void load(int stage, int start) {
        if (start + GROUPS <= groups)
            load_whole(stage, start);
        else
            load_last(stage, start);
    }

    INLINE void load_last(int stage, int start) {
        Stage &to = stages[stage];
        copy_rows<GROUPS * TILE * E::code_bytes>(to.codes, part.weight.codes, start * TILE * E::code_bytes, groups * TILE * E::code_bytes);
        if (E::high_bytes)
            copy_rows<GROUPS * TILE * E::high_bytes>(to.high, part.weight.high, start * TILE * E::high_bytes, groups * TILE * E::high_bytes);
        constexpr int sharing = E::scale_groups;
        copy_rows<GROUPS / sharing * TILE * E::scale_bytes>(
            to.scales, part.weight.scales, start / sharing * TILE * E::scale_bytes, groups / sharing * TILE * E::scale_bytes);
        if (E::block_bytes)
            copy_rows<TILE * E::block_bytes>(to.blocks, part.weight.blocks, start / 8 * TILE * E::block_bytes, groups / 8 * TILE * E::block_bytes);
        for (int i = threadIdx.x; i < GROUPS * tokens * 2; i += threads) {
            const int half = i % 2, group = i / 2 % GROUPS, token = i / 2 / GROUPS;
            copy16(to.x_codes + (group * tokens + token) * 32 + half * 16, a.x_codes + record(token, start + group) * 32 + half * 16);
        }
        for (int i = threadIdx.x; i < GROUPS * tokens; i += threads) {
            const int group = i % GROUPS, token = i / GROUPS;
            const Scalars *x = (const Scalars *)a.x_scalars + record(token, start + group);
            copy4(&to.x_fields[0][group][token], &x->scale);
            copy4(&to.x_fields[1][group][token], &x->sum);
            if (E::offset) copy4(&to.x_fields[2 % fields][group][token], &x->scaled_sum);
            if (E::factors) copy4(&to.x_fields[2 % fields][group][token], &x->second);
        }
    }

    // What lies outside is replaced by what lies inside: its products are not stored.
    INLINE long record(int token, int group) {
        const int row = first_token + token < a.tokens ? first_token + token : a.tokens - 1;
        return (long)row * groups + (group < groups ? group : groups - 1);
    }

    INLINE void multiply(const Stage &from, int group, float (&sums)[MT][NT][4]) {
        const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
        const int row = lane / 4, word = lane % 4, warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
        u32 w[MT][4];
        Scale scales[MT][2];
#pragma unroll
        for (int m = 0; m < MT; m++) {
            const int tile = warp_m * MT + m, item = (tile * GROUPS + group) * TILE + row;
            E::pair(from.codes, from.high, item, word, w[m][0], w[m][2]);
            E::pair(from.codes, from.high, item + 8, word, w[m][1], w[m][3]);
            E stored;
            stored.take(from.scales, from.blocks, item, tile * TILE + row);
            scales[m][0] = stored.scale();
            stored.take(from.scales, from.blocks, item + 8, tile * TILE + row + 8);
            scales[m][1] = stored.scale();
        }
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const int tile = (warp_n * NT + n) * 8;
            const uint2 x = *(const uint2 *)(from.x_codes + (group * tokens + tile + row) * 32 + word * 8);
            const float2 scale = *(const float2 *)&from.x_fields[0][group][tile + 2 * word];
            const uint2 sum = *(const uint2 *)&from.x_fields[1][group][tile + 2 * word];
            const uint2 third = *(const uint2 *)&from.x_fields[2 % fields][group][tile + 2 * word];
#pragma unroll
            for (int m = 0; m < MT; m++) {
                float integers[4];
                if (E::factors) {
                    int low[4], up[4];
                    multiply_bytes_16(low, w[m][0], w[m][1], x.x, -E::zero * (int)(sum.x - third.x), -E::zero * (int)(sum.y - third.y));
                    multiply_bytes_16(up, w[m][2], w[m][3], x.y, -E::zero * (int)third.x, -E::zero * (int)third.y);
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        integers[i] = (float)(scales[m][i / 2].low * low[i] + scales[m][i / 2].high * up[i]);
                } else {
                    int y[4];
                    multiply_bytes_32(y, w[m], x.x, x.y, MAGIC - E::zero * (int)sum.x, MAGIC - E::zero * (int)sum.y);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        if (E::zeros) y[i] -= scales[m][i / 2].zero * (int)(i % 2 ? sum.y : sum.x);
                        integers[i] = float_of_bits((u32)y[i]) - MAGIC_FLOAT;
                    }
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const Scale &d = scales[m][i / 2];
                    sums[m][n][i] = fmaf(d.d * (i % 2 ? scale.y : scale.x), integers[i], sums[m][n][i]);
                    if (E::offset) sums[m][n][i] = fmaf(d.m, float_of_bits(i % 2 ? third.y : third.x), sums[m][n][i]);
                }
            }
        }
    }

    INLINE void store(const float (&sums)[MT][NT][4]) {
        const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
        const int warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int row = (first_tile + warp_m * MT + m) * TILE + lane / 4 + i / 2 * 8;
                    const int token = first_token + (warp_n * NT + n) * 8 + lane % 4 * 2 + i % 2;
                    if (row >= part.rows || token >= a.tokens) continue;
                    const long at = (long)token * part.rows + row;
                    const float sum = part.bias ? sums[m][n][i] + part.bias[row] : sums[m][n][i];
                    part.y[at] = a.residual ? a.residual[at] + sum : sum;
                }
    }

    INLINE void run() {
        float sums[MT][NT][4] = {};
        const int count = (groups + GROUPS - 1) / GROUPS;
        begin();
        for (int i = 0; i < STAGES - 1; i++) {
            if (i < count) load(i, i * GROUPS);
            copies_issued();
        }
        for (int i = 0; i < count; i++) {
            copies_done<STAGES - 2>();
            __syncthreads();
            if (i + STAGES - 1 < count) load((i + STAGES - 1) % STAGES, (i + STAGES - 1) * GROUPS);
            copies_issued();
            const Stage &stage = stages[i % STAGES];
            const int left = groups - i * GROUPS < GROUPS ? groups - i * GROUPS : GROUPS;
            if (left == GROUPS) {
#pragma unroll AHEAD
                for (int group = 0; group < GROUPS; group++) multiply(stage, group, sums);
            } else {
#pragma unroll 1
                for (int group = 0; group < left; group++) multiply(stage, group, sums);
            }
        }
        store(sums);
    }
};

// blockIdx.x counts tiles of rows, of all parts; blockIdx.y tiles of tokens.
template <class T> INLINE void multiply_tiles(const Product &a) {
    SHARED_BYTES(bytes);
    int at = blockIdx.x, number = 0;
    for (; number < 2; number++) {
        const int rows = number == 0 ? a.rows_0 : a.rows_1;
        const int blocks = (rows + T::rows * TILE - 1) / (T::rows * TILE);
        if (at < blocks) break;
        at -= blocks;
    }
    const Part part = part_of(a, number);
    wait_for_producer();
    let_consumer_start();
    T tiles = {a, part, (typename T::Stage *)bytes, at * T::rows, (part.rows + TILE - 1) / TILE, (int)blockIdx.y * T::tokens, a.columns / 32};
    tiles.run();
}

// Which tiles are best depends on how many tokens there are.
#define X(name, E)                                                                                     \
    KERNEL_IN_COMPANY(tiles_16_##name, Product, 64, 4) { multiply_tiles<Tiles<E, 2, 1, 1, 2, 6, 4>>(a); } \
    KERNEL_IN_COMPANY(tiles_64_##name, Product, 128, 2) { multiply_tiles<Tiles<E, 2, 2, 1, 4, 5, 4>>(a); } \
    KERNEL_IN_COMPANY(tiles_128_##name, Product, 256, 2) { multiply_tiles<Tiles<E, 4, 2, 2, 4, 3, 2>>(a); }
FOR_ENCODINGS(X)
#undef X

#endif
