// Weights of linear_a16 as float16 in memory, in the panels of halves.h, for multiply_panels.cu.
#include "half_rows.h"
#include "segments.h"

// Of some blocks of 128 rows: of up to three matrices, each of which begins one, or of two that are gated, whose rows
// alternate by eight. A block of threads has a step of columns.
struct Opening {
    const u8 *codes_0, *high_0, *scales_0, *blocks_0;
    const u8 *codes_1, *high_1, *scales_1, *blocks_1;
    const u8 *codes_2, *high_2, *scales_2, *blocks_2;
    u8 *opened; // [blocks][panels]
    int first_block, columns, rows_0, rows_1, rows_2, gated;
};

INLINE Part matrix_of(const Opening &a, int number) {
    if (number == 0) return {{a.codes_0, a.high_0, a.scales_0, a.blocks_0}, nullptr, nullptr, a.rows_0};
    if (number == 1) return {{a.codes_1, a.high_1, a.scales_1, a.blocks_1}, nullptr, nullptr, a.rows_1};
    return {{a.codes_2, a.high_2, a.scales_2, a.blocks_2}, nullptr, nullptr, a.rows_2};
}

#define THREADS 256
#define PANEL_WORDS (PANEL_ROWS * PANEL_COLUMNS / 8) // of 16 bytes

template <class Row> INLINE void open_step(const Opening &a) {
    SHARED uint4 panels[2][PANEL_WORDS];
    int at = a.first_block + blockIdx.y;
    const int number = a.gated ? 0 : part_number(a, PANEL_ROWS, at);
    let_consumer_start();
    for (int i = threadIdx.x; i < PANEL_ROWS * STEP_GROUPS; i += THREADS) {
        const int group = i % STEP_GROUPS, place = i / STEP_GROUPS;
        const int row = a.gated ? at * PANEL_ROWS / 2 + place / TILE * 8 + place % 8 : at * PANEL_ROWS + place;
        const Part part = matrix_of(a, a.gated ? place / 8 % 2 : number);
        if (row >= part.rows) continue; // whose results are not stored
        Row held;
        held.load(part, a.columns, row, (int)blockIdx.x * STEP_GROUPS + group);
        held.open();
#pragma unroll
        for (int k = 0; k < 8; k++) {
            u32 odd, even;
            held.four(k, odd, even);
            u8 *to = (u8 *)panels[k / 4] + group * 4;
            *(u32 *)(to + swizzled(place, k % 4 * 2)) = odd, *(u32 *)(to + swizzled(place, k % 4 * 2 + 1)) = even;
        }
    }
    __syncthreads();
    wait_for_producer(); // which may read what was opened before
    uint4 *to = (uint4 *)a.opened + ((long)blockIdx.y * gridDim.x + blockIdx.x) * 2 * PANEL_WORDS;
#pragma unroll
    for (int i = threadIdx.x; i < 2 * PANEL_WORDS; i += THREADS) to[i] = panels[i / PANEL_WORDS][i % PANEL_WORDS];
}

#define X(name, E) \
    KERNEL(open_##name, Opening, THREADS) { open_step<PackedRow<E>>(a); }
FOR_ENCODINGS(X)
#undef X
#define X(name, E) \
    KERNEL(open_##name, Opening, THREADS) { open_step<PlainRow<E>>(a); }
FOR_PLAIN(X)
#undef X
