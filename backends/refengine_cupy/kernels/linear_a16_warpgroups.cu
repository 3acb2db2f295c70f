// linear_a16 for many tokens, by warpgroups: a block of threads has 128 tokens and 64 or 128 rows for each of two.
//
// Weights come to shared memory as they are stored and become float16 in registers, for 128 tokens at once; activations are
// read there by the matrix units. The order of a row's sums is that of linear_a16.cu. Sums of earlier segments wait in
// shared memory, each thread's own: registers have no room for them.
#include "gated.h"
#include "segments.h"
#include "warpgroups.h"
#include "weight_stage.h"

#ifdef HAS_WARPGROUPS
#define GROUPS 2
#define THREADS (GROUPS * WARPGROUP)
#define GROUP_TILES 4 // of 16 rows, in 64
#define TOKENS PANEL_ROWS
#define PANEL_BYTES (PANEL_ROWS * PANEL_COLUMNS * 2)
#define WEIGHT_STAGES 2

template <class E, int MT> struct ManyMemory {
    static constexpr int x_stages = MT == 1 ? 6 : 3; // of panels, half a step each: as many as there is room for
    u8 x[x_stages][PANEL_BYTES]; // from a multiple of 1024 bytes on
    float4 totals[MT * 16][THREADS];
    WeightStage<E, GROUPS * MT * GROUP_TILES> weights[WEIGHT_STAGES];
    u64 x_there[x_stages], weights_there[WEIGHT_STAGES];
};

// A tile's plane of so many bytes of a row for so many groups, for a step of columns. Groups behind a row's last are that
// one again.
template <int BYTES, int SHARED_BY>
INLINE void fetch_plane(u8 *to, const u8 *from, int columns, int tile, int step, u64 *barrier) {
    constexpr int count = STEP_GROUPS / SHARED_BY, each = TILE * BYTES;
    const int all = columns / 32 / SHARED_BY, first = step * count;
    const u8 *row = from + (long)tile * all * each;
    if (first + count <= all) {
        copy_bytes(to, row + first * each, count * each, barrier);
        return;
    }
    for (int i = 0; i < count; i++) copy_bytes(to + i * each, row + (first + i < all ? first + i : all - 1) * each, each, barrier);
}

template <class E, int TILES>
INLINE void fetch_tile(WeightStage<E, TILES> &to, int to_tile, const Part &part, int columns, int tile, int step, u64 *barrier) {
    const int tiles = (part.rows + TILE - 1) / TILE, items = to_tile * ITEMS;
    if (tile >= tiles) tile = tiles - 1; // whose results are not stored
    fetch_plane<E::code_bytes, 1>(to.codes + items * E::code_bytes, part.weight.codes, columns, tile, step, barrier);
    if constexpr (E::high_bytes != 0)
        fetch_plane<E::high_bytes, 1>(to.high + items * E::high_bytes, part.weight.high, columns, tile, step, barrier);
    fetch_plane<E::scale_bytes, E::scale_groups>(to.scales + items / E::scale_groups * E::scale_bytes, part.weight.scales, columns, tile, step, barrier);
    if constexpr (E::block_bytes != 0) {
        constexpr int each = TILE * E::block_bytes;
        copy_bytes(to.blocks + to_tile * each, part.weight.blocks + ((long)tile * (columns / 256) + step / 2) * each, each, barrier);
    }
}

// MT: how many times 64 rows a warpgroup has. GATED: 0 for plain products, 1 for silu(y_0) * y_1, 2 for gelu_tanh; then
// its first 64 rows are of the first matrix, the others of the second.
template <class E, int MT, int GATED> struct ManyTokens {
    const Product &a;
    const Part parts[2];
    ManyMemory<E, MT> &shared;
    int first_tile, first_token; // tiles: of the matrix, or of each of both

    static constexpr int x_stages = ManyMemory<E, MT>::x_stages;
    static constexpr int part_tiles = GROUPS * MT * GROUP_TILES / (GATED ? 2 : 1);

    // Tiles of the second matrix lie behind those of the first.
    INLINE int tile_of(int m) const {
        const int group = threadIdx.x / WARPGROUP, warp = threadIdx.x / LANES % GROUP_TILES;
        return (GATED ? m * GROUPS + group : group * MT + m) * GROUP_TILES + warp;
    }

    INLINE void fetch_x(int half) const {
        const int panels = 2 * steps_of(a.columns);
        if (threadIdx.x != 0 || half >= panels) return;
        u64 *there = shared.x_there + half % x_stages;
        expect_bytes(there, PANEL_BYTES);
        const u8 *from = (const u8 *)a.x_codes + ((long)(first_token / TOKENS) * panels + half) * PANEL_BYTES;
        copy_bytes(shared.x[half % x_stages], from, PANEL_BYTES, there);
    }

    // One thread of each warp fetches MT tiles.
    INLINE void fetch_weights(int step) const {
        typedef WeightStage<E, GROUPS * MT * GROUP_TILES> Weights;
        if (threadIdx.x % LANES != 0 || step >= steps_of(a.columns)) return;
        const int warp = threadIdx.x / LANES;
        u64 *there = shared.weights_there + step % WEIGHT_STAGES;
        if (warp == 0) expect_bytes(there, Weights::bytes);
#pragma unroll
        for (int m = 0; m < MT; m++) {
            const int place = (GATED ? m * part_tiles : m * GROUPS * GROUP_TILES) + warp, tile = GATED ? warp : place;
            fetch_tile(shared.weights[step % WEIGHT_STAGES], place, parts[GATED ? m : 0], a.columns, first_tile + tile, step, there);
        }
    }

    INLINE void take(PackedRow<E> (&held)[MT][2], int step) const {
        if (step >= steps_of(a.columns)) return;
        wait_for_bytes(shared.weights_there + step % WEIGHT_STAGES, step / WEIGHT_STAGES % 2);
#pragma unroll
        for (int m = 0; m < MT; m++) shared.weights[step % WEIGHT_STAGES].template take<false>(held[m], tile_of(m));
    }

    // A thread's weights for the product number K of half a step.
    template <int K> INLINE void open(const PackedRow<E> (&held)[MT][2], u32 (&w)[MT][4]) const {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) held[m][i].four(K, w[m][i], w[m][i + 2]);
    }

    INLINE void issue(const u32 (&w)[MT][4], int half, int k, bool adds, float (&sums)[MT][64]) const {
        begin_products();
#pragma unroll
        for (int m = 0; m < MT; m++) multiply_group_halves(sums[m], w[m], shared.x[half % x_stages], k, adds);
        products_issued();
    }

    // Half of a step: two of the four eights that a thread's group of each row is cut into. The first weights are open; while
    // the last products are computed, those of the next half are opened.
    template <int PART>
    INLINE void multiply(PackedRow<E> (&held)[MT][2], u32 (&w)[2][MT][4], int step, bool adds, float (&sums)[MT][64]) const {
        const int half = 2 * step + PART;
        wait_for_bytes(shared.x_there + half % x_stages, half / x_stages % 2);
        __syncthreads();
        fetch_x(half + x_stages - 1); // to the place of the half before this one
        issue(w[0], half, 0, adds, sums);
        open<4 * PART + 1>(held, w[1]);
        issue(w[1], half, 1, true, sums);
        products_done<1>();
        open<4 * PART + 2>(held, w[0]);
        issue(w[0], half, 2, true, sums);
        products_done<1>();
        open<4 * PART + 3>(held, w[1]);
        issue(w[1], half, 3, true, sums);
        if (PART == 1) take(held, step + 1);
        products_done<1>();
        open<PART == 1 ? 0 : 4>(held, w[0]);
        if (PART == 0) fetch_weights(step + 2);
        products_done<0>();
    }

    // What a segment has come to is added to those before it; each thread has its own.
    INLINE void add_segment(const float (&sums)[MT][64], bool is_first) const {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < 16; i++) {
                float4 &total = shared.totals[m * 16 + i][threadIdx.x];
                const float *sum = sums[m] + 4 * i;
                const float4 before = total;
                total = is_first ? make_float4(sum[0], sum[1], sum[2], sum[3])
                                 : make_float4(before.x + sum[0], before.y + sum[1], before.z + sum[2], before.w + sum[3]);
            }
    }

    INLINE void store_one(int row, int token, float sum) const {
        if (row >= parts[0].rows || token >= a.tokens) return;
        const long at = (long)token * parts[0].rows + row;
        if (parts[0].bias) sum = sum + parts[0].bias[row];
        parts[0].y[at] = a.residual ? a.residual[at] + sum : sum;
    }

    INLINE void store_gated(int row, int token, float gate, float up) const {
        if (row >= parts[0].rows || token >= a.tokens) return;
        if (parts[0].bias) gate = gate + parts[0].bias[row];
        if (parts[1].bias) up = up + parts[1].bias[row];
        parts[0].y[(long)token * parts[0].rows + row] = (GATED == 1 ? silu(gate) : gelu_tanh(gate)) * up;
    }

    INLINE void store() const {
        const int lane = threadIdx.x % LANES;
#pragma unroll 4
        for (int n = 0; n < 16; n++) {
            float sums[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const float4 total = shared.totals[m * 16 + n][threadIdx.x];
                sums[m][0] = total.x, sums[m][1] = total.y, sums[m][2] = total.z, sums[m][3] = total.w;
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int token = first_token + n * 8 + lane % 4 * 2 + i % 2, inside = lane / 4 + i / 2 * 8;
                const float power = token < a.tokens ? ((const float *)a.x_scalars)[token] : 1.0f;
                if constexpr (GATED != 0) {
                    store_gated((first_tile + tile_of(0)) * TILE + inside, token, sums[0][i] * power, sums[MT - 1][i] * power);
                } else {
#pragma unroll
                    for (int m = 0; m < MT; m++) store_one((first_tile + tile_of(m)) * TILE + inside, token, sums[m][i] * power);
                }
            }
        }
    }

    INLINE void run() const {
        const int steps = steps_of(a.columns), each = steps_each(steps);
        float sums[MT][64];
        PackedRow<E> held[MT][2];
        u32 w[2][MT][4];
        if (threadIdx.x == 0) {
            for (int i = 0; i < x_stages; i++) begin_barrier(shared.x_there + i);
            for (int i = 0; i < WEIGHT_STAGES; i++) begin_barrier(shared.weights_there + i);
        }
        __syncthreads();
        fetch_weights(0), fetch_weights(1); // no earlier kernel writes weights
        wait_for_producer();
        let_consumer_start();
        for (int half = 0; half < x_stages - 1; half++) fetch_x(half);
        __syncthreads();
        take(held, 0);
        open<0>(held, w[0]);
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
            multiply<0>(held, w, step, step % each != 0, sums);
            multiply<1>(held, w, step, true, sums);
            if ((step + 1) % each == 0 || step + 1 == steps) add_segment(sums, step < each);
        }
        store();
    }
};

// blockIdx.x counts blocks of tokens, blockIdx.y blocks of rows, of all parts: so blocks that go together read the same
// weights.
template <class E, int MT, int GATED> INLINE void many_tokens(const Product &a) {
    typedef ManyTokens<E, MT, GATED> Many;
    SHARED_KILOBYTES(bytes);
    int at = blockIdx.y;
    const int number = GATED ? 0 : part_number(a, Many::part_tiles * TILE, at);
    const Many many = {
        a, {part_of(a, number), part_of(a, 1)}, *(ManyMemory<E, MT> *)bytes, at * Many::part_tiles, (int)blockIdx.x * TOKENS
    };
    many.run();
}

#define X(name, E)                                                                             \
    KERNEL_IN_COMPANY(many_1_##name, Product, THREADS, 1) { many_tokens<E, 1, 0>(a); }         \
    KERNEL_IN_COMPANY(many_2_##name, Product, THREADS, 1) { many_tokens<E, 2, 0>(a); }         \
    KERNEL_IN_COMPANY(many_silu_##name, Product, THREADS, 1) { many_tokens<E, 2, 1>(a); }      \
    KERNEL_IN_COMPANY(many_gelu_tanh_##name, Product, THREADS, 1) { many_tokens<E, 2, 2>(a); }
FOR_ENCODINGS(X)
#undef X
#endif
