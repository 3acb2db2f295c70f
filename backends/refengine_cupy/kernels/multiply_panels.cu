// linear_a16 for so many tokens that weights are better opened once, by linear_a16_open.cu: matrix units multiply panels of
// weights with panels of activations, both from shared memory.
//
// A block of threads has 128 rows and 128 or 192 tokens, and when it is done with them, others: one thread fetches, as far
// ahead as there is room; two warpgroups multiply, each 64 rows. Neighbours are a cluster: they have the same tokens, of
// which each fetches its share for all. The order of a row's sums is that of linear_a16.cu.
#include "gated.h"
#include "segments.h"
#include "warpgroups.h"

struct PanelProduct {
    const u8 *x, *weights; // panels: [T / 128][panels], [blocks][panels]
    const float *powers;   // [T]: what a row was divided by
    const float *bias_0, *bias_1, *bias_2;
    const float *residual; // [T, rows_0], may be y_0
    float *y_0, *y_1, *y_2;
    int first_block, blocks, tokens, columns, rows_0, rows_1, rows_2;
};

#ifdef HAS_WARPGROUPS
#ifdef EMULATED
#define CLUSTER 1
#else
#define CLUSTER 2
#endif
#define GROUPS 2
#define THREADS ((GROUPS + 1) * WARPGROUP)
#define WARPS_THAT_READ (GROUPS * WARPGROUP / LANES)
#define PANEL_BYTES (PANEL_ROWS * PANEL_COLUMNS * 2)
#define PIECE_ROWS 32 // of activations, that are fetched at once: within a panel

template <int TOKENS> struct PanelMemory {
    static constexpr int stages = TOKENS == 192 ? 5 : 6, x_bytes = TOKENS * PANEL_COLUMNS * 2;
    u8 weights[stages][PANEL_BYTES], x[stages][x_bytes]; // from a multiple of 1024 bytes on
    u64 there[stages], free[stages];
};

// GATED: 0 for plain products, 1 for silu(y_0) * y_1, 2 for gelu_tanh; then each 16 rows are eight of both matrices.
template <int TOKENS, int GATED> struct Panels {
    typedef PanelMemory<TOKENS> Memory;
    const PanelProduct &a;
    Memory &shared;
    const int panels;

    // What a cluster has, tile by tile: `block` of rows, counted from the first that is opened.
    struct Tile {
        int first_token, block;
    };
    INLINE int columns_of_tiles() const { return (a.tokens + TOKENS - 1) / TOKENS; }
    INLINE int count() const { return (a.blocks + CLUSTER - 1) / CLUSTER * columns_of_tiles(); }
    INLINE int first() const { return blockIdx.x / CLUSTER; }
    INLINE int step() const { return gridDim.x / CLUSTER; }
    INLINE u32 rank() const { return blockIdx.x % CLUSTER; }
    INLINE Tile tile(int number) const {
        const int across = columns_of_tiles();
        return {number % across * TOKENS, number / across * CLUSTER + (int)rank()};
    }

    // By one thread.
    INLINE void fetch_all() const {
        const int last_panel = (a.tokens - 1) / PANEL_ROWS;
        int stage = 0, parity = 1;
        for (int number = first(); number < count(); number += step()) {
            const Tile at = tile(number);
            const u8 *weights = a.weights + (long)(at.block < a.blocks ? at.block : a.blocks - 1) * panels * PANEL_BYTES;
#pragma unroll 1
            for (int panel = 0; panel < panels; panel++) {
                wait_for_bytes(shared.free + stage, parity);
                u64 *there = shared.there + stage;
                expect_bytes(there, PANEL_BYTES + Memory::x_bytes);
                copy_bytes(shared.weights[stage], weights + (long)panel * PANEL_BYTES, PANEL_BYTES, there);
#pragma unroll
                for (int i = (int)rank(); i < TOKENS / PIECE_ROWS; i += CLUSTER) {
                    const int token = at.first_token + i * PIECE_ROWS; // behind the last panel: of that one, not stored
                    const int from = token / PANEL_ROWS < last_panel ? token / PANEL_ROWS : last_panel;
                    const u8 *x = a.x + ((long)from * panels + panel) * PANEL_BYTES + token % PANEL_ROWS * (PANEL_COLUMNS * 2);
                    u8 *to = shared.x[stage] + i * PIECE_ROWS * PANEL_COLUMNS * 2;
                    copy_bytes_to_all(to, x, PIECE_ROWS * PANEL_COLUMNS * 2, there, CLUSTER);
                }
                if (++stage == Memory::stages) stage = 0, parity ^= 1;
            }
        }
    }

    // A thread's sums of 64 rows: four of each eight tokens, two rows' two neighbours.
    typedef float Sums[TOKENS / 2];

    INLINE void leave(int stage) const {
        if (threadIdx.x % LANES == 0)
            for (u32 block = 0; block < CLUSTER; block++) arrive_in(shared.free + stage, block);
    }

    // A segment's panels, added up from zero; the last stage is left when all is computed.
    INLINE void add_up(int count, int group, int &stage, int &parity, Sums &sums) const {
        int before = 0;
#pragma unroll 1
        for (int i = 0; i < count; i++) {
            wait_for_bytes(shared.there + stage, parity);
            const u8 *weights = shared.weights[stage] + group * (PANEL_BYTES / GROUPS), *x = shared.x[stage];
            begin_products();
#pragma unroll
            for (int k = 0; k < 4; k++) multiply_panels(sums, weights, x, k, i + k > 0);
            products_issued();
            products_done<1>();
            if (i > 0) leave(before);
            before = stage;
            if (++stage == Memory::stages) stage = 0, parity ^= 1;
        }
        products_done<0>();
        leave(before);
    }

    // What is read comes first, of so many eights of tokens at a time: a load does not overtake a store.
    static constexpr int at_once = 4;
    INLINE void store(const Tile &at, int group, const Sums &totals) const {
        const int lane = threadIdx.x % LANES, sixteen = (int)threadIdx.x % WARPGROUP / LANES + 4 * group;
        int block = a.first_block + at.block;
        const Part part = result_of(GATED ? 0 : part_number(a, PANEL_ROWS, block));
        const int row = GATED ? block * PANEL_ROWS / 2 + sixteen * 8 + lane / 4 : block * PANEL_ROWS + sixteen * TILE + lane / 4;
        const int first_token = at.first_token + lane % 4 * 2;
        const bool there[2] = {row < part.rows, row + 8 < part.rows};
        float bias[2] = {};
        if (part.bias && there[0]) bias[0] = part.bias[row];
        if (GATED && a.bias_1 && there[0]) bias[1] = a.bias_1[row];
        if (!GATED && part.bias && there[1]) bias[1] = part.bias[row + 8];
#pragma unroll
        for (int from = 0; from < TOKENS / 8; from += at_once) {
            float powers[at_once][2], residual[at_once][4];
#pragma unroll
            for (int n = 0; n < at_once; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int token = first_token + (from + n) * 8 + i;
                    powers[n][i] = token < a.tokens ? a.powers[token] : 1.0f;
                    if (GATED || !a.residual) continue;
#pragma unroll
                    for (int k = 0; k < 2; k++)
                        residual[n][i + 2 * k] = token < a.tokens && there[k] ? a.residual[(long)token * part.rows + row + 8 * k] : 0.0f;
                }
#pragma unroll
            for (int n = 0; n < at_once; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int token = first_token + (from + n) * 8 + i;
                    if (token >= a.tokens) continue;
                    const float *sums = totals + 4 * (from + n) + i;
                    float *y = part.y + (long)token * part.rows + row;
                    float one = sums[0] * powers[n][i], other = sums[2] * powers[n][i];
                    if (part.bias) one = one + bias[0];
                    if (GATED ? a.bias_1 != nullptr : part.bias != nullptr) other = other + bias[1];
                    if (GATED) {
                        if (there[0]) y[0] = (GATED == 1 ? silu(one) : gelu_tanh(one)) * other;
                        continue;
                    }
                    if (there[0]) y[0] = a.residual ? residual[n][i] + one : one;
                    if (there[1]) y[8] = a.residual ? residual[n][i + 2] + other : other;
                }
        }
    }
    INLINE Part result_of(int number) const {
        if (number == 0) return {{}, a.bias_0, a.y_0, a.rows_0};
        if (number == 1) return {{}, a.bias_1, a.y_1, a.rows_1};
        return {{}, a.bias_2, a.y_2, a.rows_2};
    }

    INLINE void multiply_all() const {
        const int group = threadIdx.x / WARPGROUP - 1, each = 2 * steps_each(panels / 2);
        int stage = 0, parity = 0;
        for (int number = first(); number < count(); number += step()) {
            Sums sums, totals;
            add_up(each < panels ? each : panels, group, stage, parity, totals);
#pragma unroll 1
            for (int done = each; done < panels; done += each) {
                add_up(each < panels - done ? each : panels - done, group, stage, parity, sums);
#pragma unroll
                for (int i = 0; i < TOKENS / 2; i++) totals[i] = totals[i] + sums[i];
            }
            store(tile(number), group, totals);
        }
    }

    // The first warpgroup fetches.
    INLINE void run() const {
        if (threadIdx.x == 0)
            for (int i = 0; i < Memory::stages; i++) {
                begin_barrier(shared.there + i);
                begin_barrier(shared.free + i, WARPS_THAT_READ * CLUSTER);
            }
        wait_for_cluster();
        wait_for_producer();
        let_consumer_start();
        if (threadIdx.x < WARPGROUP) {
            give_registers<40>();
            if (threadIdx.x == 0) fetch_all();
        } else {
            take_registers<232>();
            multiply_all();
        }
        wait_for_cluster(); // others may still arrive here
    }
};

template <int TOKENS, int GATED> INLINE void multiply(const PanelProduct &a) {
    SHARED_KILOBYTES(bytes);
    const Panels<TOKENS, GATED> product = {a, *(PanelMemory<TOKENS> *)bytes, 2 * steps_of(a.columns)};
    product.run();
}

#define VERSIONS(tokens)                                                                                            \
    KERNEL_IN_CLUSTERS(multiply_##tokens, PanelProduct, THREADS, CLUSTER) { multiply<tokens, 0>(a); }               \
    KERNEL_IN_CLUSTERS(multiply_silu_##tokens, PanelProduct, THREADS, CLUSTER) { multiply<tokens, 1>(a); }          \
    KERNEL_IN_CLUSTERS(multiply_gelu_tanh_##tokens, PanelProduct, THREADS, CLUSTER) { multiply<tokens, 2>(a); }
VERSIONS(128)
VERSIONS(192)
#endif
