// Ops that treat rows or elements alone. Rows lie one after another, without gaps.
#include "codes.h"
#include "encodings.h"
#include "halves.h"

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
    int columns;
    float epsilon;
};

template <int THREADS> INLINE float block_sum(float sum) {
    SHARED float parts[THREADS / LANES];
    sum = sum_of_lanes(sum);
    if (threadIdx.x % LANES == 0) parts[threadIdx.x / LANES] = sum;
    __syncthreads();
    sum = threadIdx.x % LANES < THREADS / LANES ? parts[threadIdx.x % LANES] : 0.0f;
    return sum_of_lanes(sum);
}

template <int THREADS> INLINE u32 block_largest(u32 largest) {
    SHARED u32 parts[THREADS / LANES];
    for (int mask = 16; mask > 0; mask /= 2) {
        const u32 other = (u32)shuffle_xor((int)largest, mask);
        largest = other > largest ? other : largest;
    }
    if (THREADS == LANES) return largest;
    if (threadIdx.x % LANES == 0) parts[threadIdx.x / LANES] = largest;
    __syncthreads();
    for (int i = 0; i < THREADS / LANES; i++) largest = parts[i] > largest ? parts[i] : largest;
    return largest;
}

// Four columns of a row, the first of them a multiple of four, as float16.
INLINE void store_halves(u16 *row, int column, const float4 &x, float factor) {
    const uint2 both = {halves_of(x.x * factor, x.y * factor), halves_of(x.z * factor, x.w * factor)};
    *(uint2 *)(row + half_place(column)) = both;
}

INLINE u32 larger(u32 largest, float x) {
    const u32 bits = bits_of(x) & 0x7FFFFFFFu;
    return bits > largest ? bits : largest;
}

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

// Rows of whole groups of 32, held in registers: each thread has up to FOURS times four elements.
template <int THREADS, int FOURS, bool HALVES> INLINE void normalise(const Norm &a) {
    const long start = (long)blockIdx.x * a.columns;
    float4 x[FOURS], weight[FOURS];
#pragma unroll
    for (int k = 0; k < FOURS; k++) {
        const int i = (k * THREADS + threadIdx.x) * 4;
        if (i < a.columns) weight[k] = load_float4(a.weight + i);
    }
    wait_for_producer();
    let_consumer_start();
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < FOURS; k++) {
        const int i = (k * THREADS + threadIdx.x) * 4;
        if (i >= a.columns) continue;
        x[k] = load_float4(a.x + start + i);
        sum = fmaf(x[k].x, x[k].x, sum);
        sum = fmaf(x[k].y, x[k].y, sum);
        sum = fmaf(x[k].z, x[k].z, sum);
        sum = fmaf(x[k].w, x[k].w, sum);
    }
    sum = THREADS == LANES ? sum_of_lanes(sum) : block_sum<THREADS>(sum);
    const float factor = 1.0f / sqrtf(sum / (float)a.columns + a.epsilon);
    if (HALVES) {
        u32 largest = 0;
#pragma unroll
        for (int k = 0; k < FOURS; k++) {
            if ((k * THREADS + (int)threadIdx.x) * 4 >= a.columns) continue;
            x[k].x = x[k].x * factor * weight[k].x, x[k].y = x[k].y * factor * weight[k].y;
            x[k].z = x[k].z * factor * weight[k].z, x[k].w = x[k].w * factor * weight[k].w;
            largest = larger(larger(larger(larger(largest, x[k].x), x[k].y), x[k].z), x[k].w);
        }
        const float power = row_power(block_largest<THREADS>(largest));
        u16 *row = a.halves + (long)blockIdx.x * steps_of(a.columns) * STEP;
        const float4 zero = {};
#pragma unroll
        for (int k = 0; k < FOURS; k++) {
            const int i = (k * THREADS + threadIdx.x) * 4;
            if (i < a.columns) store_halves(row, i, x[k], row_factor(power));
            if (a.y && i < a.columns) *(float4 *)(a.y + start + i) = x[k];
        }
        for (int i = a.columns + threadIdx.x * 4; i < steps_of(a.columns) * STEP; i += THREADS * 4) store_halves(row, i, zero, 1.0f);
        if (threadIdx.x == 0) a.powers[blockIdx.x] = power;
        return;
    }
#pragma unroll
    for (int k = 0; k < FOURS; k++) {
        const int i = (k * THREADS + threadIdx.x) * 4;
        const int first = (k * THREADS + (threadIdx.x & ~31u)) * 4; // all lanes take part where one does
        if (first >= a.columns) continue;
        float y[4] = {};
        if (i < a.columns) {
            y[0] = x[k].x * factor * weight[k].x, y[1] = x[k].y * factor * weight[k].y;
            y[2] = x[k].z * factor * weight[k].z, y[3] = x[k].w * factor * weight[k].w;
        }
        if (a.codes) {
            Scalars found;
            const u32 word = codes_of_lane(y, found);
            const long item = (start + i) / 32;
            if (i < a.columns) {
                ((u32 *)(a.codes + item * 32))[word_place(threadIdx.x % 8)] = word;
                if (threadIdx.x % 8 == 0) ((Scalars *)a.scalars)[item] = found;
            }
        } else if (i < a.columns) {
            *(float4 *)(a.y + start + i) = make_float4(y[0], y[1], y[2], y[3]);
        }
    }
}

KERNEL(norm_512, Norm, 32) { normalise<32, 4, false>(a); }
KERNEL(norm_8192, Norm, 1024) { normalise<1024, 2, false>(a); }
KERNEL(norm_32768, Norm, 1024) { normalise<1024, 8, false>(a); }
KERNEL(norm_halves_512, Norm, 32) { normalise<32, 4, true>(a); }
KERNEL(norm_halves_8192, Norm, 1024) { normalise<1024, 2, true>(a); }
KERNEL(norm_halves_32768, Norm, 1024) { normalise<1024, 8, true>(a); }

// Rows x[count, columns] as float16, and the power that each is divided by. A row is one block's.
struct RoundRows {
    const float *x;
    u16 *halves;
    float *powers;
    int columns;
};

INLINE float4 load_four(const float *x, int column, int columns) {
    if (columns % 4 == 0 && column < columns) return load_float4(x + column);
    float four[4];
#pragma unroll
    for (int i = 0; i < 4; i++) four[i] = column + i < columns ? x[column + i] : 0.0f;
    return make_float4(four[0], four[1], four[2], four[3]);
}

KERNEL(round_rows, RoundRows, 1024) {
    wait_for_producer();
    let_consumer_start();
    const float *x = a.x + (long)blockIdx.x * a.columns;
    u16 *row = a.halves + (long)blockIdx.x * steps_of(a.columns) * STEP;
    u32 largest = 0;
    for (int i = threadIdx.x * 4; i < a.columns; i += 4096) {
        const float4 four = load_four(x, i, a.columns);
        largest = larger(larger(larger(larger(largest, four.x), four.y), four.z), four.w);
    }
    const float power = row_power(block_largest<1024>(largest));
    for (int i = threadIdx.x * 4; i < steps_of(a.columns) * STEP; i += 4096)
        store_halves(row, i, load_four(x, i, a.columns), row_factor(power));
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

INLINE float rotated(const float *x, const float *table, int i, int dims, int halves) {
    if (i >= dims) return x[i];
    const int half = dims / 2;
    const int pair = halves ? i % half : i / 2;
    const bool first = halves ? i < half : i % 2 == 0;
    const int other = halves ? (first ? i + half : i - half) : i ^ 1;
    const float cosine = table[pair], sine = table[half + pair];
    const float kept = x[i] * cosine, turned = x[other] * sine;
    return first ? kept - turned : kept + turned;
}

struct HalfSlots {
    typedef u16 Number;
    static INLINE u16 of(float x) { // what would round to infinity is NaN
        const u16 h = float_to_half(x);
        return (h & 0x7FFF) == 0x7C00 ? (u16)0x7E00 : h;
    }
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
