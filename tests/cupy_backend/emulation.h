// A device played by one thread of the host: enough of CUDA's dialect to run the kernels as they are.
//
// Each thread of a block is a fiber with a stack of its own. A fiber runs until it waits: for its block, or for the
// 32 of its group. Fibers and blocks go in a shuffled order, so that what rests on an order shows.
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

struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
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

static void wait(State state) {
    const int self = current;
    fibers[self].state = state;
    emulated_switch(&fibers[self].sp, scheduler);
}

static void enter() {
    body(arguments);
    wait(DONE);
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

static bool run_block() {
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
        if (all_done) return true;
        if (block_waits) {
            for (int i = 0; i < count; i++)
                if (fibers[i].state == AT_BLOCK) fibers[i].state = READY;
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
            for (int i = g; i < g + GROUP && i < count; i++)
                if (fibers[i].state == AT_GROUP) fibers[i].state = READY;
        }
        if (!moved) return false;
    }
}

static int run(void (*kernel)(const void *), const void *given, u32 x, u32 y, u32 z, u32 threads, u32 shared) {
    body = kernel, arguments = given, count = (int)threads;
    gridDim = {x, y, z}, blockDim = {threads, 1, 1};
    dynamic_shared = (u8 *)aligned_alloc(64, (shared + 127) / 64 * 64);
    const u64 blocks = (u64)x * y * z, start = next_random() % blocks;
    bool fine = true;
    for (u64 k = 0; fine && k < blocks; k++) {
        const u64 i = (start + k) % blocks;
        blockIdx = {(u32)(i % x), (u32)(i / x % y), (u32)(i / x / y)};
        memset(dynamic_shared, 0xFF, shared);
        fine = run_block();
    }
    free(dynamic_shared);
    return fine ? 0 : 1;
}
} // namespace emulated

#define INLINE inline __attribute__((always_inline))
#define KERNEL(name, Arguments, threads)                                                               \
    static void kernel_##name(const Arguments &a);                                                     \
    static void call_##name(const void *a) { kernel_##name(*(const Arguments *)a); }                   \
    extern "C" int run_##name(const void *a, u32 x, u32 y, u32 z, u32 given, u32 shared) {             \
        return given > (threads) ? 2 : emulated::run(call_##name, a, x, y, z, given, shared);          \
    }                                                                                                  \
    static void kernel_##name(const Arguments &a)
#define KERNEL_IN_COMPANY(name, Arguments, threads, blocks) KERNEL(name, Arguments, threads)
#define SHARED static
#define SHARED_BYTES(name) u8 *name = emulated::dynamic_shared
#define HAS_MATRIX_UNITS 1

static void __syncthreads() { emulated::wait(emulated::AT_BLOCK); }
static void group_barrier() { emulated::wait(emulated::AT_GROUP); }
static void __threadfence() {}

template <class T> static T shuffle_xor(T x, int mask) {
    const int self = emulated::current;
    memcpy(emulated::exchange[self], &x, sizeof x);
    group_barrier();
    memcpy(&x, emulated::exchange[self ^ mask], sizeof x);
    group_barrier();
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
INLINE void copy16(void *shared, const void *from) { memcpy(shared, from, 16); }
INLINE void copy4(void *shared, const void *from) { memcpy(shared, from, 4); }
INLINE void copies_issued() {}
template <int PENDING> INLINE void copies_done() {}
INLINE uint4 load_once(const uint4 *p) { return *p; }
INLINE void wait_for_producer() {}
INLINE void let_consumer_start() {}

// Products of a group of 32 threads, by the tables of the PTX manual: K is 32 or 16, in words of four bytes.
template <int A, int B> static void multiply_bytes(int (&c)[4], const u32 (&a)[A], const u32 (&b)[B]) {
    const int self = emulated::current, lane = self % 32, group = self - lane;
    u32 mine[8] = {};
    for (int i = 0; i < A; i++) mine[i] = a[i];
    for (int i = 0; i < B; i++) mine[4 + i] = b[i];
    memcpy(emulated::exchange[self], mine, sizeof mine);
    group_barrier();
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
        for (int word = 0; word < 4 * B; word++) {
            u32 from_a[8], from_b[8];
            memcpy(from_a, emulated::exchange[group + row % 8 * 4 + word % 4], sizeof from_a);
            memcpy(from_b, emulated::exchange[group + column * 4 + word % 4], sizeof from_b);
            c[i] = dot4(from_a[row / 8 + word / 4 * 2], from_b[4 + word / 4], c[i]);
        }
    }
    group_barrier();
}
static void multiply_bytes_32(int (&y)[4], const u32 (&a)[4], u32 b0, u32 b1, int c0, int c1) {
    const u32 both[2] = {b0, b1};
    y[0] = y[2] = c0, y[1] = y[3] = c1;
    multiply_bytes(y, a, both);
}
static void multiply_bytes_16(int (&y)[4], u32 a0, u32 a1, u32 b, int c0, int c1) {
    const u32 both[2] = {a0, a1}, one[1] = {b};
    y[0] = y[2] = c0, y[1] = y[3] = c1;
    multiply_bytes(y, both, one);
}
