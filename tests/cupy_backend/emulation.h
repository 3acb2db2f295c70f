// A device played by one thread of the host: enough of CUDA's dialect to run the kernels as they are.
//
// Each thread of a block is a fiber with a stack of its own. A fiber runs until it waits: for its block, or for the
// 32 of its group. Fibers and blocks go in a shuffled order, so that what rests on an order shows: threads do not go in
// step here, however wide the waves of the hardware may be. Where they wait for each other, all of a block or of a group
// must wait in the same line: on hardware whose waves are wider than a group, other lines would be other barriers, and
// threads that are elsewhere would take no part in a shuffle. What a thread leaves behind that has ended is NaN.
//
// A GPU ends a kernel that reads or writes at an address which is no multiple of what it reads or writes at once; this
// CPU would not mind. So the compiler is told to look at each address (-fsanitize=alignment), and to tell what is below.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define EMULATED 1
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { u32 x, y, z; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {
constexpr int MOST = 1024, STACK = 1 << 16, GROUP = 32;
enum State { READY, AT_BLOCK, AT_GROUP, DONE };

struct Fiber {
    void *sp;
    char *stack;
    State state;
    int place; // the line where it waits
};

static Fiber fibers[MOST];
static void *scheduler;
static int current, count;
static void (*body)(const void *);
static const void *arguments;
static u8 *dynamic_shared;
static u64 exchange[MOST][8];
static u64 random_state = 88172645463325252ull;

static u64 next_random() {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return random_state;
}

extern "C" void emulated_switch(void **from, void *to);
asm(R"(
.text
.type emulated_switch,@function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

static void wait(State state, int place) {
    const int self = current;
    fibers[self].state = state, fibers[self].place = place;
    emulated_switch(&fibers[self].sp, scheduler);
}

static void enter() {
    body(arguments);
    memset(exchange[current], 0xFF, sizeof exchange[current]);
    wait(DONE, 0);
}

static void prepare(int i) {
    Fiber &fiber = fibers[i];
    if (!fiber.stack) fiber.stack = (char *)aligned_alloc(64, STACK);
    void **top = (void **)(fiber.stack + STACK);
    *--top = nullptr; // where a call would have left the stack
    *--top = (void *)enter;
    for (int k = 0; k < 6; k++) *--top = nullptr;
    fiber.sp = top;
    fiber.state = READY;
}

// Lets those from first to last go on that wait: not where they wait in several lines.
static bool release(int first, int last, State state) {
    int place = 0;
    for (int i = first; i < last; i++) {
        if (fibers[i].state != state) continue;
        if (place && fibers[i].place != place) return false;
        place = fibers[i].place, fibers[i].state = READY;
    }
    return true;
}

enum Outcome { FINE, STUCK, TOO_MANY, APART, MISALIGNED };

// Where the compiler's check of addresses failed, and the check: as compilers describe both.
struct Place {
    const char *file;
    u32 line, column;
};
static Place misaligned; // of the first of a run: no file where there was none

static Outcome run_block() {
    for (int i = 0; i < count; i++) prepare(i);
    for (;;) {
        bool moved = false;
        const int first = (int)(next_random() % count), step = next_random() % 2 ? 1 : count - 1;
        for (int k = 0, i = first; k < count; k++, i = (i + step) % count) {
            if (fibers[i].state != READY) continue;
            moved = true;
            current = i;
            threadIdx = {(u32)i, 0, 0};
            emulated_switch(&scheduler, fibers[i].sp);
        }
        bool all_done = true, block_waits = true;
        for (int i = 0; i < count; i++) {
            all_done &= fibers[i].state == DONE;
            block_waits &= fibers[i].state == DONE || fibers[i].state == AT_BLOCK;
        }
        if (all_done) return FINE;
        if (block_waits) {
            if (!release(0, count, AT_BLOCK)) return APART;
            continue;
        }
        for (int g = 0; g < count; g += GROUP) {
            bool whole = true, any = false;
            for (int i = g; i < g + GROUP && i < count; i++) {
                whole &= fibers[i].state == AT_GROUP || fibers[i].state == DONE;
                any |= fibers[i].state == AT_GROUP;
            }
            if (!whole || !any) continue;
            moved = true;
            if (!release(g, g + GROUP < count ? g + GROUP : count, AT_GROUP)) return APART;
        }
        if (!moved) return STUCK;
    }
}

static int run(void (*kernel)(const void *), const void *given, u32 x, u32 y, u32 z, u32 threads, u32 shared) {
    body = kernel, arguments = given, count = (int)threads;
    gridDim = {x, y, z}, blockDim = {threads, 1, 1};
    dynamic_shared = (u8 *)aligned_alloc(64, (shared + 127) / 64 * 64);
    const u64 blocks = (u64)x * y * z, start = next_random() % blocks;
    Outcome outcome = FINE;
    misaligned = {};
    for (u64 k = 0; outcome == FINE && k < blocks; k++) {
        const u64 i = (start + k) % blocks;
        blockIdx = {(u32)(i % x), (u32)(i / x % y), (u32)(i / x / y)};
        memset(dynamic_shared, 0xFF, shared);
        outcome = run_block();
    }
    free(dynamic_shared);
    return outcome == FINE && misaligned.file ? MISALIGNED : outcome;
}
} // namespace emulated

// Called where an address is no multiple of its type's alignment; what it is given begins with the place.
extern "C" void __ubsan_handle_type_mismatch_v1(void *check, void *) {
    if (!emulated::misaligned.file) emulated::misaligned = *(const emulated::Place *)check;
}
extern "C" u32 line_of_misaligned_access() { return emulated::misaligned.line; }
extern "C" const char *file_of_misaligned_access() { return emulated::misaligned.file; }

#define INLINE inline __attribute__((always_inline))
#define KERNEL(name, Arguments, threads)                                                               \
    static void kernel_##name(const Arguments &a);                                                     \
    static void call_##name(const void *a) { kernel_##name(*(const Arguments *)a); }                   \
    extern "C" int run_##name(const void *a, u32 x, u32 y, u32 z, u32 given, u32 shared) {             \
        return given > (threads) ? emulated::TOO_MANY : emulated::run(call_##name, a, x, y, z, given, shared);          \
    }                                                                                                  \
    static void kernel_##name(const Arguments &a)
#define KERNEL_IN_COMPANY(name, Arguments, threads, blocks) KERNEL(name, Arguments, threads)
#define SHARED static __attribute__((aligned(1))) // as its type wants it and no more, as on a GPU: not as the CPU likes it
#define SHARED_BYTES(name) u8 *name = emulated::dynamic_shared
#define HAS_MATRIX_UNITS 1

static void __syncthreads(int place = __builtin_LINE()) { emulated::wait(emulated::AT_BLOCK, place); }
static void group_barrier(int place) { emulated::wait(emulated::AT_GROUP, place); }
static void __threadfence() {}
static void wait_for_lanes(int place = __builtin_LINE()) { group_barrier(place); }
static int threads_where(int condition, int place = __builtin_LINE()) {
    static int arrived, number, result; // the result stands until all have come again
    number = condition != 0 ? (arrived ? number : 0) + 1 : (arrived ? number : 0);
    if (++arrived == emulated::count) result = number, arrived = 0;
    __syncthreads(place);
    return result;
}

template <class T> static T shuffle_xor(T x, int mask, int place = __builtin_LINE()) {
    const int self = emulated::current;
    memcpy(emulated::exchange[self], &x, sizeof x);
    group_barrier(place);
    memcpy(&x, emulated::exchange[self ^ mask], sizeof x);
    group_barrier(place);
    return x;
}

INLINE float half_to_float(u16 bits) { _Float16 h; memcpy(&h, &bits, 2); return (float)h; }
INLINE u16 float_to_half(float x) { _Float16 h = (_Float16)x; u16 bits; memcpy(&bits, &h, 2); return bits; }
INLINE float float_of_bits(u32 bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE u32 bits_of(float x) { u32 bits; memcpy(&bits, &x, 4); return bits; }
INLINE int dot4(u32 a, u32 b, int sum) {
    for (int i = 0; i < 32; i += 8) sum += (int)(signed char)(a >> i) * (int)(signed char)(b >> i);
    return sum;
}
INLINE u32 count_up(u32 *counter) { return (*counter)++; }
INLINE u32 pick_bytes(u32 a, u32 b, u32 places) {
    const u64 both = (u64)b << 32 | a;
    u32 z = 0;
    for (int i = 0; i < 4; i++) z |= (u32)(both >> (places >> 4 * i & 7) * 8 & 255) << 8 * i;
    return z;
}
INLINE int kept(int x) { return x; }
INLINE u32 masked(u32 a, u32 mask, u32 others) { return (a & mask) | others; }
INLINE u32 halves_of(float first, float second) { return (u32)float_to_half(second) << 16 | float_to_half(first); }
INLINE float half_at(u32 both, int i) { return half_to_float((u16)(both >> 16 * i)); }
INLINE u32 subtract_halves(u32 a, u32 b) { return halves_of(half_at(a, 0) - half_at(b, 0), half_at(a, 1) - half_at(b, 1)); }
INLINE u32 multiply_halves(u32 a, u32 b) { return halves_of(half_at(a, 0) * half_at(b, 0), half_at(a, 1) * half_at(b, 1)); }
INLINE u32 multiply_add_halves(u32 a, u32 b, u32 c) { // products of halves are exact in float64
    u16 z[2];
    for (int i = 0; i < 2; i++) {
        const _Float16 sum = (_Float16)((double)half_at(a, i) * half_at(b, i) + half_at(c, i));
        memcpy(z + i, &sum, 2);
    }
    return (u32)z[1] << 16 | z[0];
}
INLINE void copy16(void *shared, const void *from) { *(uint4 *)shared = *(const uint4 *)from; }
INLINE void copy4(void *shared, const void *from) { *(u32 *)shared = *(const u32 *)from; }
INLINE void copies_issued() {}
template <int PENDING> INLINE void copies_done() {}
INLINE uint4 load_once(const uint4 *p) { return *p; }
INLINE void wait_for_producer() {}
INLINE void let_consumer_start() {}

// Products of a group of 32 threads, by the tables of the PTX manual: K is 32 or 16, in words of four bytes.
template <int A, int B> static void multiply_bytes(int (&c)[4], const u32 (&a)[A], const u32 (&b)[B], int place) {
    const int self = emulated::current, lane = self % 32, group = self - lane;
    u32 mine[8] = {};
    for (int i = 0; i < A; i++) mine[i] = a[i];
    for (int i = 0; i < B; i++) mine[4 + i] = b[i];
    memcpy(emulated::exchange[self], mine, sizeof mine);
    group_barrier(place);
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
        for (int word = 0; word < 4 * B; word++) {
            u32 from_a[8], from_b[8];
            memcpy(from_a, emulated::exchange[group + row % 8 * 4 + word % 4], sizeof from_a);
            memcpy(from_b, emulated::exchange[group + column * 4 + word % 4], sizeof from_b);
            c[i] = dot4(from_a[row / 8 + word / 4 * 2], from_b[4 + word / 4], c[i]);
        }
    }
    group_barrier(place);
}
static void multiply_bytes_32(int (&y)[4], const u32 (&a)[4], u32 b0, u32 b1, int c0, int c1, int place = __builtin_LINE()) {
    const u32 both[2] = {b0, b1};
    y[0] = y[2] = c0, y[1] = y[3] = c1;
    multiply_bytes(y, a, both, place);
}
static void multiply_bytes_16(int (&y)[4], u32 a0, u32 a1, u32 b, int c0, int c1, int place = __builtin_LINE()) {
    const u32 both[2] = {a0, a1}, one[1] = {b};
    y[0] = y[2] = c0, y[1] = y[3] = c1;
    multiply_bytes(y, both, one, place);
}

// Likewise of float16, added up in float64 and rounded once; the tables are those of mma.m16n8k16 in the PTX manual.
static void multiply_tile_halves(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, int place = __builtin_LINE()) {
    const int self = emulated::current, lane = self % 32, group = self - lane;
    const u32 mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    memcpy(emulated::exchange[self], mine, sizeof mine);
    group_barrier(place);
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
        double sum = c[i];
        for (int k = 0; k < 16; k++) {
            u32 from_a[4], from_b[6];
            memcpy(from_a, emulated::exchange[group + row % 8 * 4 + k % 8 / 2], sizeof from_a);
            memcpy(from_b, emulated::exchange[group + column * 4 + k % 8 / 2], sizeof from_b);
            sum += (double)half_at(from_a[row / 8 + k / 8 * 2], k % 2) * half_at(from_b[4 + k / 8], k % 2);
        }
        c[i] = (float)sum;
    }
    group_barrier(place);
}

// Four tiles of 8 x 8 float16, by the tables of ldmatrix in the PTX manual: rows are where the threads say, eight of each
// tile; a thread gets two neighbours of a row, or of a column.
template <bool TURNED> static void load_any_tiles(u32 (&tiles)[4], const void *row, int place) {
    const int self = emulated::current, lane = self % 32, group = self - lane;
    const uint4 *mine = (const uint4 *)row;
    const uint4 numbers = *mine; // which begins at a multiple of 16 bytes
    memcpy(emulated::exchange[self], &numbers, sizeof numbers);
    group_barrier(place);
    for (int i = 0; i < 4; i++) {
        u16 two[2];
        for (int k = 0; k < 2; k++) {
            const int across = lane / 4, along = lane % 4 * 2 + k;
            u16 eight[8];
            memcpy(eight, emulated::exchange[group + i * 8 + (TURNED ? along : across)], sizeof eight);
            two[k] = eight[TURNED ? across : along];
        }
        tiles[i] = (u32)two[1] << 16 | two[0];
    }
    group_barrier(place);
}
static void load_tiles(u32 (&tiles)[4], const void *row, int place = __builtin_LINE()) {
    load_any_tiles<false>(tiles, row, place);
}
static void load_tiles_turned(u32 (&tiles)[4], const void *row, int place = __builtin_LINE()) {
    load_any_tiles<true>(tiles, row, place);
}

// Products of warpgroups, see warpgroups.h: done at once, by the table of wgmma's fragments and that of its 128-byte
// swizzle in the PTX manual.
#define SHARED_KILOBYTES(name) SHARED_BYTES(name)
// A barrier of arrivals: how many a phase has, how many it lacks, and the phase's number. Bytes are there when they are
// copied, before another thread goes on: so who says how many it will wait for has all it waits for.
#define KERNEL_IN_CLUSTERS(name, Arguments, threads, blocks) KERNEL(name, Arguments, threads)
#define MOST_TRIES 1000000
struct Arrivals {
    u16 all, lacking;
    u32 phase;
};
INLINE void begin_barrier(u64 *barrier, int arrivals = 1) { *(Arrivals *)barrier = {(u16)arrivals, (u16)arrivals, 0}; }
INLINE void arrive_in(u64 *barrier, u32) {
    Arrivals &arrivals = *(Arrivals *)barrier;
    if (--arrivals.lacking == 0) arrivals.lacking = arrivals.all, arrivals.phase++;
}
INLINE void arrive(u64 *barrier) { arrive_in(barrier, 0); }
INLINE void show_to_units() {}
INLINE void expect_bytes(u64 *barrier, u32) { arrive_in(barrier, 0); }
INLINE void copy_bytes(void *shared, const void *from, u32 bytes, u64 *) {
    for (u32 i = 0; i < bytes; i += 16) copy16((u8 *)shared + i, (const u8 *)from + i);
}
INLINE void copy_bytes_to_all(void *shared, const void *from, u32 bytes, u64 *barrier, int) { copy_bytes(shared, from, bytes, barrier); }
static void wait_for_bytes(u64 *barrier, int parity, int place = __builtin_LINE()) {
    for (int tries = 0; (int)(((Arrivals *)barrier)->phase & 1) == parity; tries++)
        emulated::wait(tries < MOST_TRIES ? emulated::READY : emulated::AT_BLOCK, place);
}
static void wait_for_cluster(int place = __builtin_LINE()) { __syncthreads(place); }
template <int COUNT> INLINE void give_registers() {}
template <int COUNT> INLINE void take_registers() {}
INLINE void begin_products() {}
INLINE void products_issued() {}
template <int PENDING> static void products_done(int place = __builtin_LINE()) { group_barrier(place); }
// A number of a panel.
INLINE float panel_number(const u8 *panel, int row, int part, int k) {
    const int byte = row * 128 + part * 32 + k * 2;
    u16 half;
    memcpy(&half, panel + (byte ^ (byte >> 7 & 7) << 4), sizeof half);
    return half_to_float(half);
}
template <int N> static void multiply_panels(float (&c)[N], const u8 *a, const u8 *b, int part, bool adds) {
    const int lane = emulated::current % 32, warp = emulated::current / 32 % 4;
    for (int i = 0; i < N; i++) {
        const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        double sum = adds ? c[i] : 0.0;
        for (int k = 0; k < 16; k++) sum += (double)panel_number(a, row, part, k) * panel_number(b, column, part, k);
        c[i] = (float)sum;
    }
}
static void multiply_group_halves(float (&c)[64], const u32 (&a)[4], const u8 *b, int part, bool adds, int place = __builtin_LINE()) {
    const int self = emulated::current, lane = self % 32, group = self - lane;
    memcpy(emulated::exchange[self], a, sizeof a);
    group_barrier(place);
    for (int i = 0; i < 64; i++) {
        const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        double sum = adds ? c[i] : 0.0;
        for (int k = 0; k < 16; k++) {
            u32 from_a[4];
            memcpy(from_a, emulated::exchange[group + row % 8 * 4 + k % 8 / 2], sizeof from_a);
            sum += (double)half_at(from_a[row / 8 + k / 8 * 2], k % 2) * panel_number(b, column, part, k);
        }
        c[i] = (float)sum;
    }
    group_barrier(place);
}
struct Panel {
    const u8 *start;
};
INLINE Panel panel_at(const u8 *p) { return {p}; }
INLINE Panel panel_behind(Panel panel, int bytes) { return {panel.start + bytes}; }
INLINE void multiply_panels(float (&c)[64], Panel a, Panel b, int part, bool adds) {
    multiply_panels(c, a.start, b.start, part, adds);
}
// b: 16 rows of a panel, of which c has the columns.
static void multiply_group_rows(float (&c)[32], const u32 (&a)[4], Panel b, int part, bool adds, int place = __builtin_LINE()) {
    const int self = emulated::current, lane = self % 32, group = self - lane;
    memcpy(emulated::exchange[self], a, sizeof a);
    group_barrier(place);
    for (int i = 0; i < 32; i++) {
        const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        double sum = adds ? c[i] : 0.0;
        for (int k = 0; k < 16; k++) {
            u32 from_a[4];
            memcpy(from_a, emulated::exchange[group + row % 8 * 4 + k % 8 / 2], sizeof from_a);
            sum += (double)half_at(from_a[row / 8 + k / 8 * 2], k % 2) * panel_number(b.start, part * 16 + k, column / 16, column % 16);
        }
        c[i] = (float)sum;
    }
    group_barrier(place);
}
