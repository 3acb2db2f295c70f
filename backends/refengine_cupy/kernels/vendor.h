// What differs between compilers: NVRTC, hipcc, and a C++ compiler that plays a device in the tests
// (which defines EMULATED and everything below before it includes a kernel).
//
// Threads are grouped by 32 in shuffles, whatever the width of the hardware's waves.
// All files are compiled without contraction of a * b + c: what is fused says fmaf.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define LANES 32

#if defined(EMULATED)

#elif defined(__HIP__) || defined(__HIPCC__)

#include <hip/hip_runtime.h>

#define INLINE __device__ __forceinline__
#define KERNEL(name, Arguments, threads)                                                               \
    extern "C" __global__ void __launch_bounds__(threads) name(const Arguments a)
#define KERNEL_IN_COMPANY(name, Arguments, threads, blocks) KERNEL(name, Arguments, threads)
#define SHARED __shared__
#define SHARED_BYTES(name) extern __shared__ uint4 name##_words[]; u8 *name = (u8 *)name##_words

INLINE float half_to_float(u16 bits) { return (float)__builtin_bit_cast(_Float16, bits); }
INLINE u16 float_to_half(float x) { return __builtin_bit_cast(u16, (_Float16)x); }
INLINE float shuffle_xor(float x, int mask) { return __shfl_xor(x, mask, LANES); }
INLINE int shuffle_xor(int x, int mask) { return __shfl_xor(x, mask, LANES); }
INLINE double shuffle_xor(double x, int mask) { return __shfl_xor(x, mask, LANES); }
INLINE int threads_where(int condition) { return __syncthreads_count(condition); } // of the block, which waits
INLINE float float_of_bits(u32 bits) { return __uint_as_float(bits); }
INLINE u32 bits_of(float x) { return __float_as_uint(x); }
INLINE int dot4(u32 a, u32 b, int sum) {
    for (int i = 0; i < 32; i += 8) sum += (int)(signed char)(a >> i) * (int)(signed char)(b >> i);
    return sum;
}
INLINE void wait_for_lanes() { __threadfence_block(), __builtin_amdgcn_wave_barrier(); } // of the same 32
INLINE u32 count_up(u32 *counter) { return atomicAdd(counter, 1u); }
INLINE int shuffle(int x, int lane) { return __shfl(x, lane, LANES); }
INLINE u32 pick_bytes(u32 a, u32 b, u32 places) { return __byte_perm(a, b, places); }
INLINE int kept(int x) { return x; }
INLINE u32 masked(u32 a, u32 mask, u32 others) { return (a & mask) | others; }
typedef _Float16 Half2 __attribute__((ext_vector_type(2)));
INLINE u32 subtract_halves(u32 a, u32 b) {
    return __builtin_bit_cast(u32, __builtin_bit_cast(Half2, a) - __builtin_bit_cast(Half2, b));
}
INLINE u32 multiply_halves(u32 a, u32 b) {
    return __builtin_bit_cast(u32, __builtin_bit_cast(Half2, a) * __builtin_bit_cast(Half2, b));
}
INLINE u32 multiply_add_halves(u32 a, u32 b, u32 c) {
    const Half2 x = __builtin_bit_cast(Half2, a), y = __builtin_bit_cast(Half2, b), z = __builtin_bit_cast(Half2, c);
    const Half2 sum = {(_Float16)__builtin_fmaf16(x.x, y.x, z.x), (_Float16)__builtin_fmaf16(x.y, y.y, z.y)};
    return __builtin_bit_cast(u32, sum);
}
INLINE u32 halves_of(float first, float second) { return (u32)float_to_half(second) << 16 | float_to_half(first); }

// c[16 x 8] += a[16 x 16] b[16 x 8], of float16 in float32, by a group of 32 threads, laid out as NVIDIA's units take
// them: no unit of AMD's does, so threads ask each other. Sums go by fours of columns, one after the other.
INLINE void multiply_tile_halves(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const int lane = (int)threadIdx.x % LANES, row = lane / 4, column = lane % 4 * 2;
    for (int part = 0; part < 4; part++) {
        u32 from_a[4], from_b[2][2];
        for (int i = 0; i < 4; i++) from_a[i] = (u32)shuffle((int)a[i], row * 4 + part);
        for (int n = 0; n < 2; n++) {
            from_b[n][0] = (u32)shuffle((int)b0, (column + n) * 4 + part);
            from_b[n][1] = (u32)shuffle((int)b1, (column + n) * 4 + part);
        }
        for (int i = 0; i < 4; i++)
            for (int half = 0; half < 2; half++) {
                const u32 x = from_a[i / 2 + 2 * half], y = from_b[i % 2][half];
                c[i] = fmaf(half_to_float((u16)x), half_to_float((u16)y), c[i]);
                c[i] = fmaf(half_to_float((u16)(x >> 16)), half_to_float((u16)(y >> 16)), c[i]);
            }
    }
}

// Four tiles of 8 x 8 float16 from shared memory, as multiply_tile_halves takes them: of 32 threads, each gives where a row
// of eight begins, the first eight threads those of the first tile; it gets two neighbours of a row. Turned: of a column.
template <bool TURNED> INLINE void load_any_tiles(u32 (&tiles)[4], const void *row) {
    const int lane = (int)threadIdx.x % LANES, across = lane / 4, along = lane % 4 * 2;
    for (int i = 0; i < 4; i++) {
        const u16 *first = (const u16 *)__shfl((u64)row, i * 8 + (TURNED ? along : across), LANES);
        const u16 *second = (const u16 *)__shfl((u64)row, i * 8 + (TURNED ? along + 1 : across), LANES);
        tiles[i] = (u32)second[TURNED ? across : along + 1] << 16 | first[TURNED ? across : along];
    }
}
INLINE void load_tiles(u32 (&tiles)[4], const void *row) { load_any_tiles<false>(tiles, row); }
INLINE void load_tiles_turned(u32 (&tiles)[4], const void *row) { load_any_tiles<true>(tiles, row); }
INLINE void copy16(void *shared, const void *from) { *(uint4 *)shared = *(const uint4 *)from; }
INLINE void copies_issued() {}
template <int PENDING> INLINE void copies_done() {}
INLINE uint4 load_once(const uint4 *p) { return *p; }
INLINE void wait_for_producer() {}
INLINE void let_consumer_start() {}

#else

#define INLINE __device__ __forceinline__
#define KERNEL(name, Arguments, threads)                                                               \
    extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Arguments a)
#define KERNEL_IN_COMPANY(name, Arguments, threads, blocks)                                            \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Arguments a)
#define SHARED __shared__
#define SHARED_BYTES(name) extern __shared__ uint4 name##_words[]; u8 *name = (u8 *)name##_words
#define HAS_MATRIX_UNITS 1

INLINE float half_to_float(u16 bits) { float x; asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits)); return x; }
INLINE u16 float_to_half(float x) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x)); return h; }
INLINE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }
INLINE int shuffle_xor(int x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }
INLINE double shuffle_xor(double x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }
INLINE int threads_where(int condition) { return __syncthreads_count(condition); } // of the block, which waits
INLINE float float_of_bits(u32 bits) { return __uint_as_float(bits); }
INLINE u32 bits_of(float x) { return __float_as_uint(x); }
INLINE int dot4(u32 a, u32 b, int sum) { return __dp4a((int)a, (int)b, sum); }
INLINE void wait_for_lanes() { __syncwarp(); } // of the same 32
INLINE u32 count_up(u32 *counter) { return atomicAdd(counter, 1u); }
INLINE u32 pick_bytes(u32 a, u32 b, u32 places) { return __byte_perm(a, b, places); }
// A number that the compiler keeps, instead of computing it again.
INLINE int kept(int x) { asm volatile("" : "+r"(x)); return x; }
// The bits of a under a mask, and others: in one instruction, which the compiler makes of two constants only if told.
INLINE u32 masked(u32 a, u32 mask, u32 others) {
    u32 z;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(z) : "r"(a), "r"(mask), "r"(others));
    return z;
}

// Two float16 at a time, the first in the lower half; subnormal ones are numbers like any other.
INLINE u32 subtract_halves(u32 a, u32 b) { u32 z; asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(z) : "r"(a), "r"(b)); return z; }
INLINE u32 multiply_halves(u32 a, u32 b) { u32 z; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(z) : "r"(a), "r"(b)); return z; }
INLINE u32 multiply_add_halves(u32 a, u32 b, u32 c) {
    u32 z;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(z) : "r"(a), "r"(b), "r"(c));
    return z;
}
INLINE u32 halves_of(float first, float second) {
    u32 z;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(z) : "f"(second), "f"(first));
    return z;
}

// 16 bytes to shared memory, in the background; groups of copies are waited for in their order.
INLINE void copy16(void *shared, const void *from) {
    u32 at = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
INLINE void copies_issued() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> INLINE void copies_done() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// What is read once only need not stay in a cache.
INLINE uint4 load_once(const uint4 *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// Programmatic dependent launch: nothing that an earlier kernel writes may be touched before the first.
INLINE void wait_for_producer() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
INLINE void let_consumer_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 4 bytes, likewise.
INLINE void copy4(void *shared, const void *from) {
    u32 at = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(at), "l"(from) : "memory");
}

// y[16 x 8] = a[16 x K] b[K x 8] + c, of signed bytes, by a group of 32 threads: K is 32 or 16. The two columns of a
// thread have the same c in both of its rows.
INLINE void multiply_bytes_32(int (&y)[4], const u32 (&a)[4], u32 b0, u32 b1, int c0, int c1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%10,%11};"
        : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c0), "r"(c1));
}
INLINE void multiply_bytes_16(int (&y)[4], u32 a0, u32 a1, u32 b, int c0, int c1) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%7,%8};"
        : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
        : "r"(a0), "r"(a1), "r"(b), "r"(c0), "r"(c1));
}

// c[16 x 8] += a[16 x 16] b[16 x 8], of float16 in float32, by a group of 32 threads.
INLINE void multiply_tile_halves(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four tiles of 8 x 8 float16 from shared memory, as that takes them: of 32 threads, each gives where a row of eight begins,
// the first eight threads those of the first tile; it gets two neighbours of a row. Turned: of a column.
INLINE void load_tiles(u32 (&tiles)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"((u32)__cvta_generic_to_shared(row)) : "memory");
}
INLINE void load_tiles_turned(u32 (&tiles)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"((u32)__cvta_generic_to_shared(row)) : "memory");
}

#endif

INLINE float4 load_float4(const float *p) { return *(const float4 *)p; }

INLINE float sum_of_lanes(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x = x + shuffle_xor(x, mask);
    return x;
}
INLINE int sum_of_lanes(int x) {
    for (int mask = 16; mask > 0; mask /= 2) x = x + shuffle_xor(x, mask);
    return x;
}
INLINE float largest_of_lanes(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}
