// linear_a8 for few tokens: codes of activations with the integers of stored weights.
//
// A block of threads has a tile of 16 rows. Its ITEM threads multiply groups, each one row's 16 bytes at a time, and
// leave exact integers and scales in shared memory; threads of one more warp, one per row and token, add them up
// from left to right, as the op is defined. While they add one stretch of groups, the others multiply the next.
//
// The codes of one token every block may make itself, of the row that a norm before the product reads.
#include "codes.h"
#include "encodings.h"
#include "gated.h"
#include "product.h"
#include "rows.h"

// Of Product, and what one token's codes are made of.
struct RowProduct {
    const u8 *x_codes, *x_scalars; // [T][groups]
    const float *x, *norm;         // or, of one token, its row and the weights of its rms_norm, [columns]
    const u8 *codes_0, *high_0, *scales_0, *blocks_0;
    const u8 *codes_1, *high_1, *scales_1, *blocks_1;
    const u8 *codes_2, *high_2, *scales_2, *blocks_2;
    const float *bias_0, *bias_1, *bias_2;
    const float *residual; // [T, rows_0], may be y_0
    float *y_0, *y_1, *y_2;
    u8 *codes, *scalars; // of one gated row, in the place of y_0, where they are not null
    u64 first_token;
    int tokens, columns, rows_0, rows_1, rows_2;
    float epsilon;
};

#define ITEM_THREADS TOKEN_THREADS
#define ADDERS 32
#define GROUPS_AT_ONCE (ITEM_THREADS / TILE)

template <class E> INLINE int exact_sum(const u32 (&w)[8], const Scale &scale, const u8 *codes, const Scalars &x) {
    const uint4 *words = (const uint4 *)codes;
    const uint4 p = words[0], q = words[1]; // words 0 4 1 5, and 2 6 3 7
    int low = dot4(w[0], p.x, 0), high = dot4(w[4], p.y, 0);
    low = dot4(w[1], p.z, low), high = dot4(w[5], p.w, high);
    low = dot4(w[2], q.x, low), high = dot4(w[6], q.y, high);
    low = dot4(w[3], q.z, low), high = dot4(w[7], q.w, high);
    if (!E::factors) return low + high - (E::zeros ? scale.zero : E::zero) * x.sum;
    return scale.low * (low - E::zero * (x.sum - x.second)) + scale.high * (high - E::zero * x.second);
}

// STEPS: groups that an item thread multiplies between two barriers.
template <class E, int TOKENS, int STEPS> struct Stretch {
    static constexpr int groups = STEPS * GROUPS_AT_ONCE;
    float4 products[2][TOKENS][groups / 2][TILE]; // of two groups: scale, integer, scale, integer
    float offsets[2][E::offset ? groups : 1][TILE];
    float sums[2][E::offset ? TOKENS : 1][groups];
};

// GATED: 0 for plain products, 1 for silu(y_0) * y_1, 2 for gelu_tanh.
// A block of threads has every gridDim.x-th tile, and of it one stretch of groups after the other.
template <class E, int TOKENS, int STEPS, int GATED> struct Rows {
    typedef Stretch<E, TOKENS, STEPS> Shared;
    static constexpr int adds = (TOKENS + 1) / 2; // tokens of an adder: every other one

    struct Job {
        int tile, matrix, stretch;
    };

    const RowProduct &a;
    Shared &shared;
    const u8 *x; // of one token, in shared memory: codes, then scalars
    int groups, stretches, tiles;

    INLINE Job after(const Job &job) const {
        if (job.stretch + 1 < stretches) return {job.tile, job.matrix, job.stretch + 1};
        if (GATED && job.matrix == 0) return {job.tile, 1, 0};
        if (!coded()) return {job.tile + (int)gridDim.x, 0, 0};
        return {job.tile % 2 == 0 ? job.tile + 1 : job.tile - 1 + 2 * (int)gridDim.x, 0, 0};
    }

    // Whether results become codes here: then a block has pairs of tiles, which are groups.
    INLINE bool coded() const { return GATED && TOKENS == 1 && a.codes; }

    // The matrix of a job, and its tile there.
    INLINE Part part_at(const Job &job, int &tile) const {
        tile = job.tile;
        if (GATED) return part_of(a, job.matrix);
        const int tiles_0 = (a.rows_0 + TILE - 1) / TILE, tiles_1 = (a.rows_1 + TILE - 1) / TILE;
        if (tile < tiles_0) return part_of(a, 0);
        tile -= tiles_0;
        if (tile < tiles_1) return part_of(a, 1);
        tile -= tiles_1;
        return part_of(a, 2);
    }

    INLINE void load(const Job &job, E (&stored)[STEPS]) const {
        if (job.tile >= tiles) return;
        int tile;
        const Part part = part_at(job, tile);
        const int first = job.stretch * Shared::groups + threadIdx.x / TILE;
        const long item = ((long)tile * groups + first) * TILE + threadIdx.x % TILE;
#pragma unroll
        for (int step = 0; step < STEPS; step++)
            if (first + step * GROUPS_AT_ONCE < groups)
                stored[step].load(part.weight, item + step * GROUPS_AT_ONCE * TILE, groups);
    }

    // Multiplies the groups of one job, and loads those of the next in their places.
    INLINE void multiply(const Job &job, const Job &next, int buffer, E (&stored)[STEPS]) {
        const int row = threadIdx.x % TILE, first = job.stretch * Shared::groups;
        int tile;
        const Packed weight = part_at(next, tile).weight;
        const int next_first = next.tile < tiles ? next.stretch * Shared::groups + threadIdx.x / TILE : groups;
        const long item = ((long)tile * groups + next_first) * TILE + row;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const int place = step * GROUPS_AT_ONCE + threadIdx.x / TILE, group = first + place;
            if (group < groups) multiply_group(stored[step], group, place, buffer);
            if (next_first + step * GROUPS_AT_ONCE < groups) stored[step].load(weight, item + step * GROUPS_AT_ONCE * TILE, groups);
        }
    }

    INLINE void multiply_group(const E &stored, int group, int place, int buffer) {
        const int row = threadIdx.x % TILE;
        const Scale scale = stored.scale();
        u32 words[8];
        stored.words(words);
        if (E::offset) shared.offsets[buffer][place][row] = scale.m;
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            if (TOKENS > 1 && t >= a.tokens) break;
            const long record = ((long)a.first_token + t) * groups + group;
            const u8 *codes = TOKENS == 1 ? x + group * 32 : a.x_codes + record * 32;
            const Scalars scalars = TOKENS == 1 ? ((const Scalars *)(x + groups * 32))[group] : ((const Scalars *)a.x_scalars)[record];
            const int sum = exact_sum<E>(words, scale, codes, scalars);
            float2 *product = (float2 *)&shared.products[buffer][t][place / 2][row];
            product[place % 2] = make_float2(scale.d * scalars.scale, (float)sum);
            if (E::offset && row == 0) shared.sums[buffer][t][place] = scalars.scaled_sum;
        }
    }

    INLINE float add(int buffer, int t, int count, float sum) const {
        const int row = threadIdx.x % TILE;
#pragma unroll 8
        for (int g = 0; g + 1 < count; g += 2) {
            const float4 p = shared.products[buffer][t][g / 2][row];
            sum = fmaf(p.x, p.y, sum);
            if (E::offset) sum = fmaf(shared.offsets[buffer][g][row], shared.sums[buffer][t][g], sum);
            sum = fmaf(p.z, p.w, sum);
            if (E::offset) sum = fmaf(shared.offsets[buffer][g + 1][row], shared.sums[buffer][t][g + 1], sum);
        }
        if (count % 2) {
            const float4 p = shared.products[buffer][t][count / 2][row];
            sum = fmaf(p.x, p.y, sum);
            if (E::offset) sum = fmaf(shared.offsets[buffer][count - 1][row], shared.sums[buffer][t][count - 1], sum);
        }
        return sum;
    }

    // An adder's part of a job: kept are the sums of the gate while those of up are added.
    INLINE void add_job(const Job &job, int buffer, float (&sums)[adds], float (&kept)[adds], float &even) const {
        const int start = job.stretch * Shared::groups;
        const int count = groups - start < Shared::groups ? groups - start : Shared::groups;
        const int lane = threadIdx.x - ITEM_THREADS, row = threadIdx.x % TILE;
        int tile;
        const Part part = part_at(job, tile);
        const int at = tile * TILE + row;
        float result = 0.0f;
#pragma unroll
        for (int i = 0; i < adds; i++) {
            const int t = 2 * i + lane / TILE;
            if (t >= TOKENS || t >= a.tokens) break;
            sums[i] = add(buffer, t, count, job.stretch == 0 ? 0.0f : sums[i]);
            if (job.stretch + 1 < stretches || at >= part.rows) continue;
            float sum = part.bias ? sums[i] + part.bias[at] : sums[i];
            if (GATED && job.matrix == 0) {
                kept[i] = sum;
                continue;
            }
            if (GATED == 1) sum = silu(kept[i]) * sum;
            if (GATED == 2) sum = gelu_tanh(kept[i]) * sum;
            result = sum;
            if (coded()) continue;
            const long place = ((long)a.first_token + t) * part.rows + at;
            (GATED ? a.y_0 : part.y)[place] = a.residual ? a.residual[place] + sum : sum;
        }
        if (coded() && job.matrix == 1 && job.stretch + 1 == stretches) quantize(tile, result, even);
    }

    // The results of an even tile are kept until those of the next make a group of them.
    INLINE void quantize(int tile, float result, float &even) const {
        const float odd = shuffle_xor(result, TILE);
        const int lane = threadIdx.x % LANES;
        if (tile % 2 == 0) {
            even = result;
            return;
        }
        Scalars scalars;
        const int code = code_of_lane(lane < TILE ? even : odd, scalars);
        const int group = tile / 2;
        a.codes[group * 32 + word_place(lane / 4) * 4 + lane % 4] = (u8)code;
        if (lane == 0) ((Scalars *)a.scalars)[group] = scalars;
    }

    INLINE void stage_x(u8 *to) const {
        const uint4 *codes = (const uint4 *)(a.x_codes + (long)a.first_token * groups * 32);
        const uint4 *scalars = (const uint4 *)(a.x_scalars + (long)a.first_token * groups * 16);
        for (int i = threadIdx.x; i < groups * 3; i += ITEM_THREADS + ADDERS)
            ((uint4 *)to)[i] = i < groups * 2 ? codes[i] : scalars[i - groups * 2];
    }

    static INLINE int column(int k) { return (k * ITEM_THREADS + (int)threadIdx.x) * 4; }

    // The norm's weights lie where products will, as far as there is room: fours of each thread.
    static constexpr int kept_fours = sizeof(Shared) / (ITEM_THREADS * 16);
    INLINE float4 *kept_four(int k) const { return (float4 *)&shared + k * ITEM_THREADS + threadIdx.x; }

    INLINE void ask_for_norm() const {
#pragma unroll
        for (int k = 0; k < kept_fours; k++)
            if (column(k) < a.columns) copy16(kept_four(k), a.norm + column(k));
        copies_issued();
    }

    // Has the bits of the norm in elementwise.cu.
    INLINE void norm_x(u8 *to) const {
        const float factor = norm_factor<ITEM_THREADS, ITEM_THREADS + ADDERS>(a.x, a.columns, a.epsilon);
        if (threadIdx.x >= ITEM_THREADS) return;
        copies_done<0>();
#pragma unroll
        for (int k = 0; k < TOKEN_FOURS; k++) {
            if ((k * ITEM_THREADS + (int)threadIdx.x / LANES * LANES) * 4 >= a.columns) break; // all lanes take part where one does
            const bool inside = column(k) < a.columns;
            float4 x = {};
            if (inside) {
                const float4 weight = k < kept_fours ? *kept_four(k) : load_float4(a.norm + column(k));
                x = load_float4(a.x + column(k));
                x.x = x.x * factor * weight.x, x.y = x.y * factor * weight.y;
                x.z = x.z * factor * weight.z, x.w = x.w * factor * weight.w;
            }
            store_codes(to, to + groups * 32, column(k) / 32, x, inside);
        }
    }

    INLINE void run(u8 *x_memory) {
        const bool adder = threadIdx.x >= ITEM_THREADS;
        float sums[adds] = {}, kept[adds] = {}, even = 0.0f;
        E stored[STEPS];
        Job now = {(int)blockIdx.x * (coded() ? 2 : 1), 0, 0}, before = {tiles, 0, 0};
        if (!adder) load(now, stored); // no earlier kernel writes weights
        if (TOKENS == 1 && !adder && a.x) ask_for_norm();
        wait_for_producer();
        let_consumer_start();
        if (TOKENS == 1) {
            if (a.x)
                norm_x(x_memory);
            else
                stage_x(x_memory);
            __syncthreads();
        }
        for (int buffer = 0; now.tile < tiles || before.tile < tiles; buffer ^= 1) {
            const Job next = after(now);
            if (!adder && now.tile < tiles) {
                multiply(now, next, buffer, stored);
            }
            if (adder && before.tile < tiles) add_job(before, buffer ^ 1, sums, kept, even);
            __syncthreads();
            before = now, now = next;
        }
    }
};

template <class E, int TOKENS, int STEPS, int GATED> INLINE void product(const RowProduct &a) {
    typedef Rows<E, TOKENS, STEPS, GATED> R;
    SHARED typename R::Shared shared;
    SHARED_BYTES(x_memory);
    const int groups = a.columns / 32;
    const int others = GATED ? 0 : (a.rows_1 + TILE - 1) / TILE + (a.rows_2 + TILE - 1) / TILE;
    R rows = {a, shared, x_memory, groups, (groups + R::Shared::groups - 1) / R::Shared::groups, (a.rows_0 + TILE - 1) / TILE + others};
    rows.run(x_memory);
}

// What a thread has under way, in registers: no more than it has, as one that is put away must have come first.
#define STEPS_OF(E) (E::offset || E::zeros || E::factors || E::code_bytes > 16 ? 4 : 8)

#define X(name, E)                                                                                     \
    KERNEL_IN_COMPANY(product_1_##name, RowProduct, ITEM_THREADS + ADDERS, 3) { product<E, 1, STEPS_OF(E), 0>(a); } \
    KERNEL(product_4_##name, RowProduct, ITEM_THREADS + ADDERS) { product<E, 4, 2, 0>(a); }               \
    KERNEL_IN_COMPANY(product_1_silu_##name, RowProduct, ITEM_THREADS + ADDERS, 3) { product<E, 1, STEPS_OF(E), 1>(a); } \
    KERNEL(product_4_silu_##name, RowProduct, ITEM_THREADS + ADDERS) { product<E, 4, 2, 1>(a); }          \
    KERNEL_IN_COMPANY(product_1_gelu_tanh_##name, RowProduct, ITEM_THREADS + ADDERS, 3) { product<E, 1, STEPS_OF(E), 2>(a); } \
    KERNEL(product_4_gelu_tanh_##name, RowProduct, ITEM_THREADS + ADDERS) { product<E, 4, 2, 2>(a); }
FOR_ENCODINGS(X)
#undef X
