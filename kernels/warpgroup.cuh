// Products of Hopper's tensor cores by whole warpgroups, 4 warps each (PTX ISA, "Asynchronous warpgroup level matrix
// instructions"): operands lie in shared memory, and instructions go on while the warps do. Only 9.0 has them.
//
// Operands (rows, columns) lie in rows of 128 bytes, whose 16 byte pieces change places within a row: piece p of row r
// lies at p ^ r % 8 ("swizzle of 128 bytes"). The whole begins at a multiple of 1024 bytes.
#pragma once

#include "device_prims.cuh"

/// Whether this is compiled for a chip that has them.
#if defined(LLM8_ON_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_WARPGROUP_PRODUCTS 1
#else
#define HAS_WARPGROUP_PRODUCTS 0
#endif

/// Where piece `part` of a row lies.
__device__ __forceinline__ int swizzled(int row, int part) { return row * 128 + 16 * (part ^ row % 8); }

/// sums (64, 8 * BLOCKS) += a (64, 32) b (8 * BLOCKS, 32)^T in int8, exact. Warp w of the group has rows 16 * w +
/// group and 8 further of `a`; of every 8 rows of `b` a lane has 2 * member and the next for the first, then for the
/// other. Operands begin with the first row, at a multiple of 32 columns. Sums are there when waited for.
template <int BLOCKS>
__device__ __forceinline__ void warpgroup_mma_s8(int (&sums)[BLOCKS][4], const void* a, const void* b);

/// Before the first product, and after sums have been touched.
__device__ __forceinline__ void begin_products();

/// Ends a group of products.
__device__ __forceinline__ void commit_products();

/// Waits until at most so many groups of products are under way.
template <int GROUPS>
__device__ __forceinline__ void wait_for_products();

/// Makes what this thread has written to shared memory seen by products after the block's next barrier.
__device__ __forceinline__ void show_to_products();

#ifdef LLM8_ON_HOST

template <int BLOCKS>
inline void warpgroup_mma_s8(int (&sums)[BLOCKS][4], const void* a, const void* b) {
    // As the tensor cores do: address bits 7 to 9 change bits 4 to 6.
    const auto code = [](const void* first, int row, int column) {
        const uintptr_t at = reinterpret_cast<uintptr_t>(first) + row * 128 + column;
        return static_cast<int>(*reinterpret_cast<const int8_t*>(at ^ (at >> 7 & 7) << 4));
    };
    const int lane = shim::flat_thread() % WARP, warp = shim::flat_thread() / WARP % 4;
    for (int block = 0; block < BLOCKS; ++block) {
        for (int i = 0; i < 4; ++i) {
            const int row = 16 * warp + lane / 4 + 8 * (i / 2), other = 8 * block + lane % 4 * 2 + i % 2;
            for (int k = 0; k < 32; ++k) sums[block][i] += code(a, row, k) * code(b, other, k);
        }
    }
}
inline void begin_products() {}
inline void commit_products() {}
template <int GROUPS>
inline void wait_for_products() {}
inline void show_to_products() {}

#elif HAS_WARPGROUP_PRODUCTS

/// What a product is told of an operand: where it begins, 1024 bytes from 8 rows to the next 8, and the swizzle.
__device__ __forceinline__ uint64_t operand(const void* shared) {
    return uint64_t{shared_address(shared)} >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

template <>
__device__ __forceinline__ void warpgroup_mma_s8<16>(int (&sums)[16][4], const void* a, const void* b) {
#define FOUR(i) "+r"(sums[i][0]), "+r"(sums[i][1]), "+r"(sums[i][2]), "+r"(sums[i][3])
    asm volatile(
        "{.reg .pred add; setp.ne.b32 add, 1, 0; wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, %64, %65, add;}"
        : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7),
          FOUR(8), FOUR(9), FOUR(10), FOUR(11), FOUR(12), FOUR(13), FOUR(14), FOUR(15)
        : "l"(operand(a)), "l"(operand(b)));
#undef FOUR
}
template <>
__device__ __forceinline__ void warpgroup_mma_s8<32>(int (&sums)[32][4], const void* a, const void* b) {
#define FOUR(i) "+r"(sums[i][0]), "+r"(sums[i][1]), "+r"(sums[i][2]), "+r"(sums[i][3])
    asm volatile(
        "{.reg .pred add; setp.ne.b32 add, 1, 0; wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
        "}, %128, %129, add;}"
        : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7),
          FOUR(8), FOUR(9), FOUR(10), FOUR(11), FOUR(12), FOUR(13), FOUR(14), FOUR(15),
          FOUR(16), FOUR(17), FOUR(18), FOUR(19), FOUR(20), FOUR(21), FOUR(22), FOUR(23),
          FOUR(24), FOUR(25), FOUR(26), FOUR(27), FOUR(28), FOUR(29), FOUR(30), FOUR(31)
        : "l"(operand(a)), "l"(operand(b)));
#undef FOUR
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int GROUPS>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#endif
