// Paged attention, one query of a key head at a time: for few queries, or short contexts.
//
// A block of threads has a token, a key head and its query heads, and one partition of the context (SPLIT) or all of
// them in turn. In SPLIT the block that comes last joins what the others have left.
//
// Keys and values come from a reader R. For a run of positions, it gives chunks of them, some positions at a time and in
// order; and an opener, whose number(chunk, k, e) is element e of the k-th.
#pragma once
#include "attention_partials.h"

#define SUB_LANES 16           // threads that share a position
#define MOST_AT_ONCE 4         // query heads treated at once, where a key head has several
#define MOST_CHUNKS 32         // so heads have at most 256 elements
#define LOADS 8                // positions whose numbers a thread reads before it uses them

struct Query {
    const float *q; // shared: [AT_ONCE][chunks * CHUNK]
    int size, heads, chunks, first, last;

    INLINE int count(int chunk) const { return size - chunk * CHUNK; }
    INLINE bool sees(int position) const { return position >= first && position <= last; }
};

// Products of keys and queries by chunks: parts[heads][PARTITION][chunks + 1].
struct KeyProducts {
    const Query &query;
    int start, chunk;
    float *parts;

    template <class C, int COUNT, class O> INLINE void operator()(const C (&keys)[COUNT], const O &opener, int first) const {
        for (int h = 0; h < query.heads; h++) {
            const float *q = query.q + (h * query.chunks + chunk) * CHUNK;
            const float4 low = load_float4(q), high = load_float4(q + 4);
            const float numbers[CHUNK] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int k = 0; k < COUNT; k++) {
                const int place = first + k;
                if (!query.sees(start + place)) continue;
                float sum = 0.0f;
#pragma unroll
                for (int e = 0; e < CHUNK; e++) sum = fmaf(numbers[e], opener.number(keys[k], k, e), sum);
                parts[(h * PARTITION + place) * (query.chunks + 1) + chunk] = sum;
            }
        }
    }
};

template <class R> INLINE void multiply_keys(const R &reader, const Query &query, int start, float *parts) {
    const int lane = threadIdx.x % SUB_LANES, run = threadIdx.x / SUB_LANES;
    for (int chunk = lane; chunk < query.chunks; chunk += SUB_LANES)
        reader.keys(query, start, run, chunk, KeyProducts{query, start, chunk, parts});
}

// Values weighed, by runs: sums[heads][RUNS][size].
template <int AT_ONCE> struct WeighedValues {
    const Query &query;
    int start;
    const float (*weights)[PARTITION];
    float (&sum)[AT_ONCE][CHUNK];

    template <class C, int COUNT, class O> INLINE void operator()(const C (&values)[COUNT], const O &opener, int first) const {
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            const int place = first + k;
            if (!query.sees(start + place)) continue;
#pragma unroll
            for (int h = 0; h < AT_ONCE; h++) {
                if (h >= query.heads) break;
#pragma unroll
                for (int e = 0; e < CHUNK; e++) sum[h][e] = fmaf(weights[h][place], opener.number(values[k], k, e), sum[h][e]);
            }
        }
    }
};

template <class R, int AT_ONCE>
INLINE void add_values(const R &reader, const Query &query, int start, const float (*weights)[PARTITION], float *sums) {
    const int lane = threadIdx.x % SUB_LANES, run = threadIdx.x / SUB_LANES, size = query.size;
    for (int chunk = lane; chunk < query.chunks; chunk += SUB_LANES) {
        float sum[AT_ONCE][CHUNK] = {};
        reader.values(query, start, run, chunk, WeighedValues<AT_ONCE>{query, start, weights, sum});
#pragma unroll
        for (int h = 0; h < AT_ONCE; h++) {
            if (h >= query.heads) break;
#pragma unroll
            for (int e = 0; e < CHUNK; e++)
                if (e < query.count(chunk)) sums[(h * RUNS + run) * size + chunk * CHUNK + e] = sum[h][e];
        }
    }
}

template <class R, bool SPLIT, int AT_ONCE> INLINE void attend(const Attention &a) {
    constexpr int most_chunks = AT_ONCE == 1 ? MOST_CHUNKS : 16; // with 32, two heads are treated at once
    SHARED float scores[AT_ONCE * PARTITION * (most_chunks + 1)]; // of keys; then sums of values
    SHARED float weights[AT_ONCE][PARTITION];
    alignas(16) SHARED float queries[AT_ONCE * most_chunks * CHUNK]; // 4 heads of 128, or 2 of 256; read by float4
    SHARED float largest[AT_ONCE][PARTITION / LANES];
    SHARED float run_sums[AT_ONCE][RUNS];
    SHARED typename R::Memory memory;

    const int token = blockIdx.z, head = blockIdx.y, group = a.heads / a.kv_heads;
    const int chunks = (a.size + CHUNK - 1) / CHUNK;
    const int at_once = AT_ONCE > 1 && chunks > 16 ? AT_ONCE / 2 : AT_ONCE;
    wait_for_producer();
    let_consumer_start();
    const int position = a.positions[token];
    const int seen_from = a.window > 0 && position + 1 > a.window ? position + 1 - a.window : 0;
    const int first_partition = seen_from / PARTITION, last_partition = position / PARTITION;
    const int mine = first_partition + (SPLIT ? (int)blockIdx.x : 0);
    if (SPLIT && mine > last_partition) return;
    const int end = SPLIT ? mine : last_partition;
    R reader(a, memory, a.sequences[token], position, head);

    for (int done = 0; done < group; done += at_once) {
        const int heads = group - done < at_once ? group - done : at_once;
        const int first_head = head * group + done;
        const long row = (long)token * a.heads + first_head;
        for (int i = threadIdx.x; i < heads * chunks * CHUNK; i += PARTITION) {
            const int h = i / (chunks * CHUNK), e = i % (chunks * CHUNK);
            queries[i] = e < a.size ? a.q[(row + h) * a.size + e] : 0.0f;
        }
        float m[AT_ONCE], l[AT_ONCE], sums[AT_ONCE][2] = {}; // a thread has elements threadIdx.x, and + PARTITION
        for (int h = 0; h < AT_ONCE; h++) m[h] = LOWEST, l[h] = 0.0f;
        const Query query = {queries, a.size, heads, chunks, seen_from, position};
        for (int partition = mine; partition <= end; partition++) {
            const int start = partition * PARTITION;
            const bool seen = query.sees(start + (int)threadIdx.x);
            if (seen) reader.find(query, start + threadIdx.x);
            __syncthreads();
            multiply_keys(reader, query, start, scores);
            if (seen) reader.settle(start + threadIdx.x);
            __syncthreads();
            float score[AT_ONCE];
#pragma unroll
            for (int h = 0; h < AT_ONCE; h++) {
                if (h >= heads) break;
                const float *parts = scores + (h * PARTITION + threadIdx.x) * (chunks + 1);
                float sum = 0.0f;
                if (seen) {
                    sum = parts[0];
                    for (int c = 1; c < chunks; c++) sum = sum + parts[c];
                }
                score[h] = seen ? bend(a, sum) : LOWEST;
                const float most = largest_of_lanes(score[h]);
                if (threadIdx.x % LANES == 0) largest[h][threadIdx.x / LANES] = most;
            }
            __syncthreads();
            float most[AT_ONCE];
#pragma unroll
            for (int h = 0; h < AT_ONCE; h++) {
                if (h >= heads) break;
                most[h] = LOWEST;
                for (int i = 0; i < PARTITION / LANES; i++) most[h] = fmaxf(most[h], largest[h][i]);
                weights[h][threadIdx.x] = seen ? expf(score[h] - most[h]) : 0.0f;
            }
            __syncthreads();
            if (threadIdx.x < (u32)heads * RUNS) {
                const int h = threadIdx.x / RUNS, run = threadIdx.x % RUNS;
                float sum = 0.0f;
                for (int i = 0; i < RUN; i++) sum = sum + weights[h][run * RUN + i];
                run_sums[h][run] = sum;
            }
            add_values<R, AT_ONCE>(reader, query, start, weights, scores);
            __syncthreads();
#pragma unroll
            for (int h = 0; h < AT_ONCE; h++) {
                if (h >= heads) break;
                float kept, added, total = run_sums[h][0];
                for (int run = 1; run < RUNS; run++) total = total + run_sums[h][run];
                float value[2];
                for (int part = 0; part < 2; part++) {
                    const int e = threadIdx.x + part * PARTITION;
                    if (e >= a.size) break;
                    const float *runs = scores + h * RUNS * a.size + e;
                    value[part] = runs[0];
                    for (int run = 1; run < RUNS; run++) value[part] = value[part] + runs[run * a.size];
                }
                if (SPLIT) {
                    float *partial = a.partials + ((row + h) * a.partitions + blockIdx.x) * (a.size + 2);
                    for (int part = 0; part < 2; part++)
                        if (threadIdx.x + part * PARTITION < a.size) partial[threadIdx.x + part * PARTITION] = value[part];
                    if (threadIdx.x == 0) partial[a.size] = most[h], partial[a.size + 1] = total;
                } else {
                    join_factors(m[h], most[h], kept, added);
                    l[h] = join(l[h], kept, total, added);
                    for (int part = 0; part < 2; part++)
                        if (threadIdx.x + part * PARTITION < a.size) sums[h][part] = join(sums[h][part], kept, value[part], added);
                }
            }
        }
        __syncthreads();
        if (!SPLIT)
#pragma unroll
            for (int h = 0; h < AT_ONCE; h++) {
                if (h >= heads) break;
                for (int part = 0; part < 2; part++) {
                    const int e = threadIdx.x + part * PARTITION;
                    if (e < a.size) a.y[(row + h) * a.size + e] = sums[h][part] / l[h];
                }
            }
    }
    if (SPLIT) join_partials(a, token, head, last_partition - first_partition + 1, scores);
}
