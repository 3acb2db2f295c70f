// Ops that treat rows or elements alone. Rows lie one after another, without gaps.
#include "codes.h"
#include "encodings.h"
#include "rows.h"

INLINE long thread_number() { return (long)blockIdx.x * blockDim.x + threadIdx.x; }

struct LookUp {
    const int *rows;
    const u8 *codes, *high, *scales, *blocks;
    float *y;
    int count, columns;
};

template <class E> INLINE void look_up_packed(const LookUp &a) {
    wait_for_producer();
    let_consumer_start();
    const int groups = a.columns / 32;
    const long at = thread_number();
    if (at >= (long)a.count * groups) return;
    const int row = a.rows[at / groups];
    const long item = ((long)(row / TILE) * groups + at % groups) * TILE + row % TILE;
    float weights[32];
    decode_group<E>({a.codes, a.high, a.scales, a.blocks}, item, groups, weights);
    for (int i = 0; i < 32; i++) a.y[at * 32 + i] = weights[i];
}

template <class E> INLINE void look_up_plain(const LookUp &a) {
    wait_for_producer();
    let_consumer_start();
    const long at = thread_number();
    if (at >= (long)a.count * a.columns) return;
    a.y[at] = E::weight(a.codes, (long)a.rows[at / a.columns] * a.columns + at % a.columns);
}

#define X(name, E) KERNEL(embedding_##name, LookUp, 128) { look_up_packed<E>(a); }
FOR_ENCODINGS(X)
#undef X
#define X(name, E) KERNEL(embedding_##name, LookUp, 128) { look_up_plain<E>(a); }
FOR_PLAIN(X)
#undef X

struct TakeRows {
    const float *x;
    const int *rows;
    float *y;
    int count, columns;
};

KERNEL(take_rows, TakeRows, 256) {
    wait_for_producer();
    let_consumer_start();
    const long at = thread_number();
    if (at >= (long)a.count * a.columns) return;
    a.y[at] = a.x[(long)a.rows[at / a.columns] * a.columns + at % a.columns];
}

struct Binary {
    const float *x, *y;
    float *z;
    u64 count;
};

KERNEL(add, Binary, 256) {
    wait_for_producer();
    let_consumer_start();
    const u64 at = thread_number();
    if (at < a.count) a.z[at] = a.x[at] + a.y[at];
}

struct Unary {
    const float *x;
    float *y;
    u64 count;
    float parameter;
};

KERNEL(scale, Unary, 256) {
    wait_for_producer();
    let_consumer_start();
    const u64 at = thread_number();
    if (at < a.count) a.y[at] = a.x[at] * a.parameter;
}

KERNEL(softcap, Unary, 256) {
    wait_for_producer();
    let_consumer_start();
    const u64 at = thread_number();
    if (at < a.count) a.y[at] = tanhf(a.x[at] / a.parameter) * a.parameter;
}

KERNEL(copy, Unary, 256) {
    wait_for_producer();
    let_consumer_start();
    const u64 at = thread_number();
    if (at < a.count) a.y[at] = a.x[at];
}

#include "gated.h"
#include "rope.h"

KERNEL(gated_silu, Binary, 256) {
    wait_for_producer();
    let_consumer_start();
    const u64 at = thread_number();
    if (at < a.count) a.z[at] = silu(a.x[at]) * a.y[at];
}

KERNEL(gated_gelu_tanh, Binary, 256) {
    wait_for_producer();
    let_consumer_start();
    const u64 at = thread_number();
    if (at < a.count) a.z[at] = gelu_tanh(a.x[at]) * a.y[at];
}

// rms_norm of rows x[count, columns] to y, to codes, or to float16 and powers. A row is one block's.
struct Norm {
    const float *x, *weight;
    float *y;
    u8 *codes, *scalars;
    u16 *halves;
    float *powers;
    int columns, panels; // whether halves lie in panels, see halves.h
    float epsilon;
};

// Rows of any length.
KERNEL(norm_any, Norm, 32) {
    const long start = (long)blockIdx.x * a.columns;
    wait_for_producer();
    let_consumer_start();
    float sum = 0.0f;
    for (int i = threadIdx.x; i < a.columns; i += LANES) sum = fmaf(a.x[start + i], a.x[start + i], sum);
    sum = sum_of_lanes(sum);
    const float factor = 1.0f / sqrtf(sum / (float)a.columns + a.epsilon);
    for (int i = threadIdx.x; i < a.columns; i += LANES) a.y[start + i] = a.x[start + i] * factor * a.weight[i];
}

template <int THREADS, int FOURS> INLINE void normalise(const Norm &a) {
    typedef NormedRow<THREADS, FOURS> Row;
    const long start = (long)blockIdx.x * a.columns;
    Row row;
    row.load_weights(a.weight, a.columns);
    wait_for_producer();
    let_consumer_start();
    row.normalise(a.x + start, a.columns, a.epsilon);
#pragma unroll
    for (int k = 0; k < FOURS; k++) {
        const int i = Row::column(k);
        const int first = (k * THREADS + (threadIdx.x & ~31u)) * 4; // all lanes take part where one does
        if (first >= a.columns) continue;
        if (a.codes) {
            const float4 zero = {};
            store_codes(a.codes, a.scalars, (start + i) / 32, i < a.columns ? row.x[k] : zero, i < a.columns);
        } else if (i < a.columns) {
            *(float4 *)(a.y + start + i) = row.x[k];
        }
    }
}

template <int THREADS, int FOURS> INLINE void normalise_halves(const Norm &a) {
    typedef NormedRow<THREADS, FOURS> Row;
    const long start = (long)blockIdx.x * a.columns;
    Row row;
    row.load_weights(a.weight, a.columns);
    wait_for_producer();
    let_consumer_start();
    row.normalise(a.x + start, a.columns, a.epsilon);
    const float power = row_power(block_largest<THREADS>(row.largest(a.columns)));
    const HalfRow halves = half_row(a.halves, blockIdx.x, a.columns, a.panels);
    row.store(halves, a.columns, power);
    fill_step(halves, a.columns, THREADS);
    if (threadIdx.x == 0) a.powers[blockIdx.x] = power;
#pragma unroll
    for (int k = 0; k < FOURS; k++)
        if (a.y && Row::column(k) < a.columns) *(float4 *)(a.y + start + Row::column(k)) = row.x[k];
}

KERNEL(norm_512, Norm, 32) { normalise<32, 4>(a); }
KERNEL(norm_8192, Norm, TOKEN_THREADS) { normalise<TOKEN_THREADS, TOKEN_FOURS>(a); }
KERNEL(norm_32768, Norm, 1024) { normalise<1024, 8>(a); }
KERNEL(norm_halves_8192, Norm, TOKEN_THREADS) { normalise_halves<TOKEN_THREADS, TOKEN_FOURS>(a); }
KERNEL(norm_halves_32768, Norm, 1024) { normalise_halves<1024, 8>(a); }

// Rows x[count, columns] as float16, and the power that each is divided by. A row is one block's.
struct RoundRows {
    const float *x;
    u16 *halves;
    float *powers;
    int columns, panels;
};

KERNEL(round_rows, RoundRows, 1024) {
    wait_for_producer();
    let_consumer_start();
    const HalfRow row = half_row(a.halves, blockIdx.x, a.columns, a.panels);
    const float power = round_row<1024, 2>(a.x + (long)blockIdx.x * a.columns, row, a.columns);
    if (threadIdx.x == 0) a.powers[blockIdx.x] = power;
}

struct Quantize {
    const float *x;
    u8 *codes, *scalars;
    u64 groups;
};

// Eight threads have a group: the word of each, and whether there is such a group.
INLINE bool codes_of_group(const Quantize &a, u64 item, u32 &word, Scalars &found) {
    const bool inside = item < a.groups;
    const float4 four = load_float4(a.x + (inside ? item : 0) * 32 + threadIdx.x % 8 * 4);
    const float x[4] = {four.x, four.y, four.z, four.w};
    word = codes_of_lane(x, found); // all lanes take part
    return inside;
}

KERNEL(quantize_a8, Quantize, 256) {
    wait_for_producer();
    let_consumer_start();
    const u64 item = thread_number() / 8;
    u32 word;
    Scalars found;
    if (!codes_of_group(a, item, word, found)) return;
    ((u32 *)(a.codes + item * 32))[word_place(threadIdx.x % 8)] = word;
    if (threadIdx.x % 8 == 0) ((Scalars *)a.scalars)[item] = found;
}

// Records as the caller of a program sees them.
KERNEL(quantize_a8_records, Quantize, 256) {
    wait_for_producer();
    let_consumer_start();
    const u64 item = thread_number() / 8;
    u32 word;
    Scalars found;
    if (!codes_of_group(a, item, word, found)) return;
    ((u32 *)(a.codes + item * 48))[threadIdx.x % 8] = word;
    if (threadIdx.x % 8 == 0) *(Scalars *)(a.codes + item * 48 + 32) = found;
}

struct RopeTable {
    const int *positions;
    const double *frequencies;
    float *table;
    double magnitude;
    int count, pairs;
};

KERNEL(rope_table, RopeTable, 128) {
    wait_for_producer();
    let_consumer_start();
    const long at = thread_number();
    if (at >= (long)a.count * a.pairs) return;
    const long row = at / a.pairs, pair = at % a.pairs;
    const double angle = (double)a.positions[row] * a.frequencies[pair];
    a.table[row * 2 * a.pairs + pair] = (float)(cos(angle) * a.magnitude);
    a.table[row * 2 * a.pairs + a.pairs + pair] = (float)(sin(angle) * a.magnitude);
}

// Rotate queries [T, heads, size]; rotate keys and put them, and values, into their slots.
struct Rope {
    const float *q, *k, *v;
    const float *table;
    const int *slots;
    float *q_out; // may be q
    u8 *keys, *values; // of one layer in block 0
    u64 block_bytes;
    int heads, kv_heads, size, dims, halves, block_size;
};

struct FloatSlots {
    typedef float Number;
    static INLINE float of(float x) { return x; }
};

template <class S> INLINE void store_slot(u8 *layer, u64 block_bytes, int block_size, int slot, int width, int at, float x) {
    typedef typename S::Number Number;
    Number *block = (Number *)(layer + (u64)(slot / block_size) * block_bytes);
    block[(long)(slot % block_size) * width + at] = S::of(x);
}

// The elements that turn together, or two of those that stay, of one head: size is even.
INLINE void turn_pair(const float *x, const float *table, int pair, int dims, int halves, int (&at)[2], float (&y)[2]) {
    const int half = dims / 2;
    const bool apart = halves && pair < half;
    at[0] = apart ? pair : 2 * pair, at[1] = apart ? pair + half : 2 * pair + 1;
    y[0] = rotated(x, table, at[0], dims, halves), y[1] = rotated(x, table, at[1], dims, halves);
}

// A thread has two elements of q, k or v of the token blockIdx.y.
template <class S> INLINE void rotate_and_store(const Rope &a) {
    wait_for_producer();
    let_consumer_start();
    const int token = blockIdx.y, width = a.kv_heads * a.size, pairs = a.size / 2;
    int item = blockIdx.x * blockDim.x + threadIdx.x, at[2];
    float y[2];
    const float *table = a.table + (long)token * a.dims;
    if (item < a.heads * pairs) {
        const long head = ((long)token * a.heads + item / pairs) * a.size;
        turn_pair(a.q + head, table, item % pairs, a.dims, a.halves, at, y);
        a.q_out[head + at[0]] = y[0], a.q_out[head + at[1]] = y[1];
        return;
    }
    item -= a.heads * pairs;
    const bool key = item < a.kv_heads * pairs;
    if (!key) item -= a.kv_heads * pairs;
    if (item >= a.kv_heads * pairs) return;
    const int head = item / pairs * a.size;
    const float *x = (key ? a.k : a.v) + (long)token * width + head;
    if (key) {
        turn_pair(x, table, item % pairs, a.dims, a.halves, at, y);
    } else {
        at[0] = item % pairs * 2, at[1] = at[0] + 1;
        y[0] = x[at[0]], y[1] = x[at[1]];
    }
    for (int i = 0; i < 2; i++)
        store_slot<S>(key ? a.keys : a.values, a.block_bytes, a.block_size, a.slots[token], width, head + at[i], y[i]);
}

KERNEL(rope_and_store_f32, Rope, 256) { rotate_and_store<FloatSlots>(a); }
KERNEL(rope_and_store_f16, Rope, 256) { rotate_and_store<HalfSlots>(a); }

#define TURN_PER_THREAD 4 // so heads have at most 1024 elements

// x may be y.
struct Turn {
    const float *x, *table;
    float *y;
    int heads, size, dims, halves;
};

KERNEL(rope, Turn, 256) {
    wait_for_producer();
    let_consumer_start();
    const int token = blockIdx.x, width = a.heads * a.size;
    const float *x = a.x + (long)token * width, *table = a.table + (long)token * a.dims;
    // Elements that turn together are read before either is written: as many heads at a time as threads hold.
    const int at_once = a.size >= (int)blockDim.x ? 1 : blockDim.x / a.size;
    for (int head = 0; head < a.heads; head += at_once) {
        const int end = (head + at_once < a.heads ? head + at_once : a.heads) * a.size;
        const int start = head * a.size + threadIdx.x;
        float turned[TURN_PER_THREAD];
        for (int k = 0; k < TURN_PER_THREAD; k++) {
            const int at = start + k * blockDim.x;
            if (at < end) turned[k] = rotated(x + at / a.size * a.size, table, at % a.size, a.dims, a.halves);
        }
        __syncthreads();
        for (int k = 0; k < TURN_PER_THREAD; k++) {
            const int at = start + k * blockDim.x;
            if (at < end) a.y[(long)token * width + at] = turned[k];
        }
        __syncthreads();
    }
}

struct Store {
    const float *k, *v;
    const int *slots;
    u8 *keys, *values;
    u64 block_bytes;
    int count, width, block_size;
};

template <class S> INLINE void store_both(const Store &a) {
    wait_for_producer();
    let_consumer_start();
    const long at = thread_number();
    if (at >= (long)a.count * a.width) return;
    const int slot = a.slots[at / a.width], i = (int)(at % a.width);
    store_slot<S>(a.keys, a.block_bytes, a.block_size, slot, a.width, i, a.k[at]);
    store_slot<S>(a.values, a.block_bytes, a.block_size, slot, a.width, i, a.v[at]);
}

KERNEL(kv_write_f32, Store, 256) { store_both<FloatSlots>(a); }
KERNEL(kv_write_f16, Store, 256) { store_both<HalfSlots>(a); }
