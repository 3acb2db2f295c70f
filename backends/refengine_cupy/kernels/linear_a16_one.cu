// linear_a16 of one token, from its float32 row on: normed, where that is asked for, and rounded.
//
// Blocks of threads stay: each has every gridDim.x-th tile of 16 rows, and each of its warps a segment of the columns.
// Its weights come to shared memory STAGES steps before they are multiplied, also from one tile to the next; and the first
// of them before the row is there: while a block waits for that, memory is busy. The next kernel's first blocks do so
// beside it. (Registers would not do: a thread that waits for one of its loads waits for later ones too.)
//
// A row's sums are those of linear_a16.cu, in their order.
#include "gated.h"
#include "rows.h"
#include "segments.h"
#include "weight_stage.h"

#define THREADS (SEGMENTS * LANES) // TOKEN_THREADS
#define STAGES 6

struct TokenProduct {
    const float *x;    // [columns]
    const float *norm; // of an rms_norm, [columns], or null
    const u8 *codes_0, *high_0, *scales_0, *blocks_0;
    const u8 *codes_1, *high_1, *scales_1, *blocks_1;
    const u8 *codes_2, *high_2, *scales_2, *blocks_2;
    const float *bias_0, *bias_1, *bias_2;
    const float *residual; // [rows_0], may be y_0
    float *y_0, *y_1, *y_2;
    int columns, rows_0, rows_1, rows_2;
    int tiles; // of all parts, or of each that is gated
    float epsilon;
};

// GATED: 0 for plain products, 1 for silu(y_0) * y_1, 2 for gelu_tanh; then each tile has its like in the other matrix.
template <class E, int GATED> struct OneToken {
    static constexpr int matrices = GATED ? 2 : 1;
    typedef float Sums[matrices][SEGMENTS][TILE];

    struct alignas(16) Memory {
        WeightStage<E, 1> stages[SEGMENTS][STAGES]; // of each warp
        Sums sums[2];                               // of a tile, and of the next
        float power[4];
    };

    const TokenProduct &a;
    Memory &shared;
    u16 *x; // in shared memory
    int first, last; // steps of this warp's segment

    INLINE void begin(TileSource<E> &source, int tile, int matrix) const {
        int at = tile;
        const Part part = part_of(a, GATED ? matrix : part_number(a, TILE, at));
        source.begin(part.weight, a.columns / 32, at, first);
    }

    // All columns of the matrix units' result are the one token's.
    INLINE void multiply(const WeightStage<E, 1> &weights, int step, float (&found)[4]) const {
        const u16 *from = x + step * STEP + threadIdx.x % 4 * 8;
        PackedRow<E> held[2];
        weights.template take<true>(held, 0);
#pragma unroll
        for (int eight = 0; eight < 4; eight++) {
            u32 w[2][4];
            take_eight(held, eight, w);
            const uint4 v = *(const uint4 *)(from + eight * 32);
            multiply_tile_halves(found, w[0], v.x, v.y);
            multiply_tile_halves(found, w[1], v.z, v.w);
        }
    }

    INLINE float result(const Sums &sums, int matrix, int place, const float *bias, int row) const {
        const int count = segments_of(steps_of(a.columns));
        float sum = sums[matrix][0][place];
        for (int segment = 1; segment < count; segment++) sum = sum + sums[matrix][segment][place];
        sum = sum * shared.power[0];
        return bias ? sum + bias[row] : sum;
    }

    // By one warp: half of its threads have a row.
    INLINE void store(const Sums &sums, int tile) const {
        const int place = threadIdx.x % LANES;
        int at = tile;
        const Part part = part_of(a, GATED ? 0 : part_number(a, TILE, at));
        const int row = at * TILE + place;
        if (place >= TILE || row >= part.rows) return;
        float sum = result(sums, 0, place, part.bias, row);
        if (GATED) sum = (GATED == 1 ? silu(sum) : gelu_tanh(sum)) * result(sums, 1, place, a.bias_1, row);
        part.y[row] = a.residual ? a.residual[row] + sum : sum;
    }

    INLINE void prepare() const {
        wait_for_producer();
        const HalfRow row = {x, -1};
        const float power = a.norm ? normed_row<THREADS>(a.x, a.norm, row, a.columns, a.epsilon) : round_row<THREADS, 8>(a.x, row, a.columns);
        let_consumer_start();
        if (threadIdx.x == 0) shared.power[0] = power;
        __syncthreads();
    }

    // Where the next weights come from that are asked for.
    struct Next {
        TileSource<E> source;
        int tile, matrix;
    };

    // One more group of copies, of nothing where all has been asked for.
    INLINE void ask(Next &next, WeightStage<E, 1> &stage) const {
        if (next.tile < a.tiles) {
            next.source.copy(stage);
            if (next.source.step == last) {
                if (++next.matrix == matrices) next.matrix = 0, next.tile += gridDim.x;
                if (next.tile < a.tiles) begin(next.source, next.tile, next.matrix);
            }
        }
        copies_issued();
    }

    INLINE void run() const {
        const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
        WeightStage<E, 1> *stages = shared.stages[warp];
        Next next;
        begin(next.source, blockIdx.x, 0);
        next.tile = first < last ? (int)blockIdx.x : a.tiles, next.matrix = 0;
#pragma unroll 1
        for (int k = 0; k < STAGES; k++) ask(next, stages[k]); // no earlier kernel writes weights
        prepare();
        int turn = 0, stage = 0;
#pragma unroll 1
        for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x, turn++) {
            Sums &sums = shared.sums[turn % 2];
#pragma unroll 1
            for (int matrix = 0; matrix < matrices; matrix++) {
                float found[4] = {};
#pragma unroll 1
                for (int step = first; step < last; step++) {
                    copies_done<STAGES - 1>();
                    wait_for_lanes();
                    multiply(stages[stage], step, found);
                    wait_for_lanes();
                    ask(next, stages[stage]);
                    stage = stage + 1 < STAGES ? stage + 1 : 0;
                }
                if (lane % 4 == 0) {
                    sums[matrix][warp][lane / 4] = found[0];
                    sums[matrix][warp][lane / 4 + 8] = found[2];
                }
            }
            __syncthreads();
            if (warp == turn % SEGMENTS) store(sums, tile);
        }
    }
};

template <class E, int GATED> INLINE void one_token(const TokenProduct &a) {
    typedef OneToken<E, GATED> One;
    SHARED_BYTES(bytes);
    const int steps = steps_of(a.columns), each = steps_each(steps);
    const int first = (int)threadIdx.x / LANES * each, last = first + each < steps ? first + each : steps;
    typename One::Memory &shared = *(typename One::Memory *)bytes;
    const One one = {a, shared, (u16 *)(&shared + 1), first, last};
    one.run();
}

#define X(name, E)                                                                                         \
    KERNEL_IN_COMPANY(one_##name, TokenProduct, THREADS, 3) { one_token<E, 0>(a); }                          \
    KERNEL_IN_COMPANY(one_silu_##name, TokenProduct, THREADS, 3) { one_token<E, 1>(a); }                     \
    KERNEL_IN_COMPANY(one_gelu_tanh_##name, TokenProduct, THREADS, 3) { one_token<E, 2>(a); }
FOR_ENCODINGS(X)
#undef X
