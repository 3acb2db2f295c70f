// linear_a16 for up to 64 tokens: float16 numbers, multiplied by matrix units and added up in float32.
//
// A block of threads has some tiles of 16 rows. Each of its warps has a segment of the columns, all rows and all
// tokens; weights go from memory to registers, each read once. The warps' sums are added up in the order of their
// segments. What a segment is depends on the number of columns alone, and so does the order of a row's sums: it is that
// of linear_a16_tiles.cu too.
#include "gated.h"
#include "half_rows.h"
#include "segments.h"

#define THREADS (SEGMENTS * LANES)

// MT: tiles of 16 rows. NT: tiles of eight tokens. GATED: 0 for plain products, 1 for silu(y_0) * y_1, 2 for gelu_tanh;
// then the even tiles are those of the first matrix, the odd ones those of the second.
template <class Row, int MT, int NT, int GATED> struct FewTokens {
    static constexpr int rows = MT * TILE;
    static constexpr int ahead = MT * NT > 4 ? 1 : MT == 1 ? Row::ahead : 2; // steps whose weights are under way
    static constexpr int mine = (rows * NT * 8 + THREADS - 1) / THREADS; // results of a thread
    typedef float Sums[rows][NT * 8 + 1];

    const Product &a;
    const Part parts[2];
    int first_row, first_token, tokens;
    Sums *sums; // of each segment

    INLINE void load(Row (&held)[MT][2], int step) const {
        const int lane = threadIdx.x % LANES, group = step * STEP_GROUPS + lane % 4;
#pragma unroll
        for (int m = 0; m < MT; m++) {
            const int row = first_row + (GATED ? m / 2 : m) * TILE + lane / 4;
            const Part &part = parts[GATED ? m % 2 : 0];
            held[m][0].load(part, a.columns, row, group);
            held[m][1].load(part, a.columns, row + 8, group);
        }
    }

    INLINE void multiply(Row (&held)[MT][2], int step, float (&found)[MT][NT][4]) const {
        const int lane = threadIdx.x % LANES;
        const long padded = (long)steps_of(a.columns) * STEP;
        const u16 *x = (const u16 *)a.x_codes + (first_token + lane / 4) * padded + step * STEP + lane % 4 * 8;
#pragma unroll
        for (int m = 0; m < MT; m++) held[m][0].open(), held[m][1].open();
#pragma unroll
        for (int eight = 0; eight < 4; eight++) {
            u32 w[MT][2][4];
#pragma unroll
            for (int m = 0; m < MT; m++) take_eight(held[m], eight, w[m]);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                uint4 v = {0, 0, 0, 0};
                if (n * 8 + lane / 4 < tokens) v = *(const uint4 *)(x + n * 8 * padded + eight * 32);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    multiply_tile_halves(found[m][n], w[m][0], v.x, v.y);
                    multiply_tile_halves(found[m][n], w[m][1], v.z, v.w);
                }
            }
        }
    }

    INLINE void add_up() {
        const int lane = threadIdx.x % LANES, steps = steps_of(a.columns), each = steps_each(steps);
        const int first = (int)threadIdx.x / LANES * each, last = first + each < steps ? first + each : steps;
        float found[MT][NT][4] = {};
        Row held[ahead][MT][2];
#pragma unroll
        for (int k = 0; k < ahead; k++)
            if (first + k < last) load(held[k], first + k); // no earlier kernel writes weights
        wait_for_producer();
        let_consumer_start();
#pragma unroll 1
        for (int step = first; step < last; step += ahead)
#pragma unroll
            for (int k = 0; k < ahead; k++) {
                if (step + k < last) multiply(held[k], step + k, found);
                if (step + k + ahead < last) load(held[k], step + k + ahead);
            }
        Sums &own = sums[threadIdx.x / LANES];
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) own[m * TILE + lane / 4 + i / 2 * 8][n * 8 + lane % 4 * 2 + i % 2] = found[m][n][i];
    }

    INLINE float result(const Part &part, int place, int row, int token) const {
        const int steps = steps_of(a.columns), count = segments_of(steps);
        float sum = sums[0][place][token];
        for (int segment = 1; segment < count; segment++) sum = sum + sums[segment][place][token];
        sum = sum * ((const float *)a.x_scalars)[first_token + token];
        return part.bias ? sum + part.bias[row] : sum;
    }

    INLINE void store() const {
        constexpr int places = GATED ? rows / 2 : rows;
        for (int i = threadIdx.x; i < places * tokens; i += THREADS) {
            const int place = i % places, token = i / places, row = first_row + place;
            if (row >= parts[0].rows) continue;
            const long at = (long)(first_token + token) * parts[0].rows + row;
            const int tile = GATED ? place / TILE * 2 * TILE + place % TILE : place;
            float sum = result(parts[0], tile, row, token);
            if (GATED) {
                const float up = result(parts[1], tile + TILE, row, token);
                sum = (GATED == 1 ? silu(sum) : gelu_tanh(sum)) * up;
            }
            parts[0].y[at] = a.residual ? a.residual[at] + sum : sum;
        }
    }
};

// blockIdx.x counts tiles of rows, of all parts; blockIdx.y tiles of tokens.
template <class Row, int MT, int NT, int GATED> INLINE void few_tokens(const Product &a) {
    typedef FewTokens<Row, MT, NT, GATED> Few;
    SHARED_BYTES(bytes);
    constexpr int rows = GATED ? Few::rows / 2 : Few::rows;
    int at = blockIdx.x, number = 0;
    if (!GATED) number = part_number(a, rows, at);
    const int first = (int)blockIdx.y * NT * 8;
    Few few = {
        a, {part_of(a, number), part_of(a, 1)}, at * rows, first,
        a.tokens - first < NT * 8 ? a.tokens - first : NT * 8, (typename Few::Sums *)bytes
    };
    few.add_up();
    __syncthreads();
    few.store();
}

// Opened: rows that are opened beforehand, which was faster for 64 tokens: measured, not explained.
#define VERSIONS(name, Row, Opened)                                                                            \
    KERNEL_IN_COMPANY(few_8_##name, Product, THREADS, Row::company) { few_tokens<Row, 1, 1, 0>(a); }                            \
    KERNEL(few_32_##name, Product, THREADS) { few_tokens<Row, 1, 4, 0>(a); }                           \
    KERNEL(few_64_##name, Product, THREADS) { few_tokens<Opened, 2, 8, 0>(a); }                           \
    KERNEL(few_8_silu_##name, Product, THREADS) { few_tokens<Row, 2, 1, 1>(a); }                       \
    KERNEL(few_32_silu_##name, Product, THREADS) { few_tokens<Row, 2, 4, 1>(a); }                      \
    KERNEL(few_64_silu_##name, Product, THREADS) { few_tokens<Opened, 2, 8, 1>(a); }                      \
    KERNEL(few_8_gelu_tanh_##name, Product, THREADS) { few_tokens<Row, 2, 1, 2>(a); }                  \
    KERNEL(few_32_gelu_tanh_##name, Product, THREADS) { few_tokens<Row, 2, 4, 2>(a); }                 \
    KERNEL(few_64_gelu_tanh_##name, Product, THREADS) { few_tokens<Opened, 2, 8, 2>(a); }
template <class E> struct OpenedRow : PackedRow<E, false> {};
#define X(name, E) VERSIONS(name, PackedRow<E>, OpenedRow<E>)
FOR_ENCODINGS(X)
#undef X
#define X(name, E) VERSIONS(name, PlainRow<E>, PlainRow<E>)
FOR_PLAIN(X)
#undef X
