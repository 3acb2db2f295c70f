// Matrix units as four warps use them together: of NVIDIA's devices of compute capability 9.0 alone, for which modules
// that include this are compiled (sm_90a). See the PTX manual, "Asynchronous Warpgroup Level Matrix Instructions".
//
// They read b from shared memory: panels of halves.h, at multiples of 1024 bytes. Products are queued in groups; a group's
// operands must be left alone until it is waited for.
//
// Copies of any multiple of 16 bytes go to shared memory without threads. A barrier there counts the bytes that arrive:
// one thread says how many it is to wait for, then copies are issued; when all are there, it goes on to its next phase,
// and who waits for the end of the phase before (phases are counted by their parity) goes on too.
#pragma once
#include "halves.h"

#if defined(EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_WARPGROUPS 1
#endif
#define WARPGROUP 128

#if defined(HAS_WARPGROUPS) && !defined(EMULATED)

// Shared memory that begins at a multiple of 1024 bytes.
#define SHARED_KILOBYTES(name) extern __shared__ __align__(1024) uint4 name##_words[]; u8 *name = (u8 *)name##_words

INLINE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// By one thread, for others behind a barrier of the block.
INLINE void begin_barrier(u64 *barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
INLINE void expect_bytes(u64 *barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
INLINE void copy_bytes(void *shared, const void *from, u32 bytes, u64 *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(shared)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
INLINE void wait_for_bytes(u64 *barrier, int parity) {
    asm volatile("{\n"
                 ".reg .pred there;\n"
                 "again%=: mbarrier.try_wait.parity.shared::cta.b64 there, [%0], %1;\n"
                 "@!there bra again%=;\n"
                 "}" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

INLINE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void products_issued() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> INLINE void products_done() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// c[64 x 128] = a[64 x 16] b[16 x 128] + c, or without c, of float16 in float32: each warp has 16 rows of a and c, laid out
// as in multiply_tile_halves(); b is the part-th 16 columns of a panel.
INLINE void multiply_group_halves(float (&c)[64], const u32 (&a)[4], const u8 *b, int part, bool adds) {
    const u64 start = (shared_address(b) + part * 32) >> 4;
    const u64 described = (start & 0x3FFF) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62; // 1024 bytes from 8 rows to 8 rows
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, adds, 1, 1, 0;\n}"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
                   "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
                   "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
                   "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),
                   "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]),
                   "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
                   "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),
                   "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(described), "r"((int)adds));
}

#endif
