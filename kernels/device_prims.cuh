// What kernels need beyond plain CUDA C++: conversions, reductions, and instructions that are written in PTX, each with a
// twin for the host's compiler (`LLM8_ON_HOST`, see host/shim.h).
//
// Fragment layouts are those of the PTX ISA, section "Matrix multiply-accumulate instructions":
// lane = 4 * group + member, with group 0..8 and member 0..4.
#pragma once

#ifdef LLM8_ON_HOST
#include "host/shim.h"
#define DYNAMIC_SHARED(name) unsigned char* name = shim::dynamic_shared
#define UNROLL
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define UNROLL _Pragma("unroll")
#endif

constexpr unsigned WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
/// The largest int8 code: the range is symmetric.
constexpr float MAX_CODE = 127.f;

// Floats of any of the three dtypes that activations come in.

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

/// `name_f32`, `name_f16` and `name_bf16` by `KERNEL(suffix, type)`.
#define FOR_EACH_FLOAT(KERNEL) KERNEL(f32, float) KERNEL(f16, __half) KERNEL(bf16, __nv_bfloat16)

/// A bias, or a vector of a norm, in the dtype that its checkpoint has: 0 for f32, 1 for f16, 2 for bf16.
__device__ __forceinline__ float vector_value(const void* values, int dtype, int index) {
    if (dtype == 0) return static_cast<const float*>(values)[index];
    if (dtype == 1) return to_float(static_cast<const __half*>(values)[index]);
    return to_float(static_cast<const __nv_bfloat16*>(values)[index]);
}

/// The bits of a magnitude: they order as the magnitudes do, and NaN comes after infinity.
__device__ __forceinline__ unsigned magnitude_bits(float value) { return __float_as_uint(value) & 0x7fffffffu; }

// Reductions. All lanes of the warp, or all threads of the block, must come here.

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
    for (int step = 16; step > 0; step /= 2) {
        const T other = __shfl_xor_sync(ALL_LANES, value, step);
        value = other > value ? other : value;
    }
    return value;
}

/// The same for whole numbers; one instruction from Ampere on.
__device__ __forceinline__ int warp_sum_of_ints(int value) {
#if !defined(LLM8_ON_HOST) && __CUDA_ARCH__ >= 800
    return __reduce_add_sync(ALL_LANES, value);
#else
    return warp_sum(value);
#endif
}

/// Of a block of whole warps in one dimension; the result is every thread's. The barrier at the start lets
/// calls follow one another.
template <class T>
__device__ __forceinline__ T block_sum(T value) {
    __shared__ T sums[WARP];
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = value;
    __syncthreads();
    T sum = 0;
    for (unsigned warp = 0; warp < blockDim.x / WARP; ++warp) sum += sums[warp];
    return sum;
}

template <class T>
__device__ __forceinline__ T block_max(T value) {
    __shared__ T maxima[WARP];
    value = warp_max(value);
    __syncthreads();
    if (threadIdx.x % WARP == 0) maxima[threadIdx.x / WARP] = value;
    __syncthreads();
    T max = maxima[0];
    for (unsigned warp = 1; warp < blockDim.x / WARP; ++warp) max = maxima[warp] > max ? maxima[warp] : max;
    return max;
}

// Instructions.

/// c (16, 8) += a (16, 32) b (8, 32)^T in int8, exact. `a`: rows group, group + 8, group, group + 8, at columns
/// 4 * member, the last two 16 further; `b`: row group, columns 4 * member and 16 further; `c`: row group,
/// columns 2 * member and the next, then the same of row group + 8.
__device__ __forceinline__ void mma_s8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

/// c (16, 8) += a (16, 16) b (8, 16)^T in f16 with f32 sums. `a`: pairs of columns 2 * member of rows group and
/// group + 8, then the same 8 columns further; `b`: row group, columns 2 * member, and 8 further; `c` as above.
__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

/// Four 8 by 8 matrices of 16-bit values from shared memory: lane l names the address of row l % 8 of matrix
/// l / 8 (16 bytes, aligned); every lane gets the pair of columns 2 * member of row group of each.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row);

/// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row);

/// An address of shared memory, as its instructions have it.
__device__ __forceinline__ uint32_t shared_address(const void* shared);

/// Copies 16 bytes to shared memory, or clears them; both sides aligned. Done when waited for.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool is_there);

/// Ends a group of copies.
__device__ __forceinline__ void commit_copies();

/// Waits until at most so many groups of this thread's copies are under way. Others' copies are seen after the
/// block's next barrier.
template <int GROUPS>
__device__ __forceinline__ void wait_for_copies();

/// 16 bytes that are read once: they need not stay in the first cache.
__device__ __forceinline__ int4 load_streaming(const void* global);

/// Two floats to f16, the first in the lower half.
__device__ __forceinline__ uint32_t pack_halves(float low, float high);

/// 1 / x to one unit in the last place; 0 for numbers whose inverse is below 2^-126.
__device__ __forceinline__ float inverse_approximate(float x);

/// 2^x to 2 units in the last place; below 2^-126 it is 0.
__device__ __forceinline__ float exp2_approximate(float x);

/// Asks for the 32 bytes at an address to be brought to the second cache; nothing waits for them.
__device__ __forceinline__ void prefetch(const void* global);

/// Waits until what earlier kernels wrote is there, and lets the next kernel start as soon as there is room for it. Every
/// kernel calls it before it touches what others write, which weights are not: all are launched so that they may start
/// before earlier ones end (programmatic dependent launch, from Hopper on).
__device__ __forceinline__ void wait_for_earlier_kernels();

// What turns a sum into an output.

/// What follows a linear layer; the numbers are those of `Activation` in int8-ops.
enum : int { NO_ACTIVATION = 0, RELU = 1, GELU = 2, GELU_ERF = 3 };

/// What GELU divides x by: (1 + tanh(u)) / 2 is 1 / (1 + e^-2u), and -2 * 0.7978845608 * log2(e) is -2.302208198.
__device__ __forceinline__ float gelu_divisor(float x) {
    return 1.f + exp2_approximate(-2.302208198f * x * (1.f + 0.044715f * x * x));
}

__device__ __forceinline__ float activated(float x, int activation) {
    // NaN stays NaN.
    if (activation == RELU) return x < 0.f ? 0.f : x;
    if (activation == GELU) return x / gelu_divisor(x);
    if (activation == GELU_ERF) return 0.5f * x * erfcf(-x * 0.70710678118f);
    return x;
}

#ifdef LLM8_ON_HOST

namespace shim {
struct Operands {
    uint32_t a[4], b[2];
};
/// What all lanes of the warp give.
inline std::vector<Operands> gather_operands(const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Operands own;
    std::memcpy(own.a, a, sizeof a);
    std::memcpy(own.b, b, sizeof b);
    const unsigned thread = flat_thread();
    std::memcpy(exchange[thread], &own, sizeof own);
    yield(Wait::Warp);
    std::vector<Operands> all(WARP);
    for (unsigned lane = 0; lane < WARP; ++lane) std::memcpy(&all[lane], exchange[thread / WARP * WARP + lane], sizeof own);
    yield(Wait::Warp);
    return all;
}
inline float half_of(uint32_t pair, int index) {
    const uint16_t bits = static_cast<uint16_t>(pair >> 16 * index);
    __half value;
    std::memcpy(&value, &bits, 2);
    return static_cast<float>(value);
}
inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
    const unsigned thread = flat_thread(), lane = thread % WARP;
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) std::abort();
    std::memcpy(exchange[thread], row, 16);
    yield(Wait::Warp);
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (unsigned i = 0; i < 2; ++i) {
            const unsigned group = lane / 4, column = lane % 4 * 2 + i;
            const unsigned from_row = transposed ? column : group, from_column = transposed ? group : column;
            std::memcpy(&pair[i], exchange[thread / WARP * WARP + 8 * matrix + from_row] + 2 * from_column, 2);
        }
        std::memcpy(&r[matrix], pair, 4);
    }
    yield(Wait::Warp);
}
}  // namespace shim

inline void mma_s8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const auto all = shim::gather_operands(a, b);
    const int lane = shim::flat_thread() % WARP;
    const auto code = [](uint32_t four, int index) { return static_cast<int>(static_cast<int8_t>(four >> 8 * index)); };
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 32; ++k) {
            const int member = k % 16 / 4, half = k / 16;
            c[i] += code(all[row % 8 * 4 + member].a[row / 8 + 2 * half], k % 4) * code(all[column * 4 + member].b[half], k % 4);
        }
    }
}

inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const auto all = shim::gather_operands(a, b);
    const int lane = shim::flat_thread() % WARP;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const int member = k % 8 / 2, half = k / 8;
            c[i] += shim::half_of(all[row % 8 * 4 + member].a[row / 8 + 2 * half], k % 2) *
                    shim::half_of(all[column * 4 + member].b[half], k % 2);
        }
    }
}

inline uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(shared));
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { shim::load_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { shim::load_matrices(r, row, true); }

namespace shim {
/// Copies that are under way: what is not waited for is not there.
struct Copy {
    void* to;
    unsigned char bytes[16];
};
inline std::vector<std::vector<std::vector<Copy>>> copies(MAX_THREADS);
}  // namespace shim

inline void copy_async(void* shared, const void* global, bool is_there) {
    if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || (is_there && reinterpret_cast<uintptr_t>(global) % 16 != 0)) std::abort();
    auto& groups = shim::copies[shim::flat_thread()];
    if (groups.empty()) groups.emplace_back();
    shim::Copy copy = {shared, {}};
    if (is_there) std::memcpy(copy.bytes, global, 16);
    groups.back().push_back(copy);
}
inline void commit_copies() {
    auto& groups = shim::copies[shim::flat_thread()];
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
}
template <int GROUPS>
inline void wait_for_copies() {
    // The last group is not yet committed.
    auto& groups = shim::copies[shim::flat_thread()];
    while (groups.size() > GROUPS + 1) {
        for (const auto& copy : groups.front()) std::memcpy(copy.to, copy.bytes, 16);
        groups.erase(groups.begin());
    }
}

inline int4 load_streaming(const void* global) {
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) std::abort();
    int4 value;
    std::memcpy(&value, global, 16);
    return value;
}

inline uint32_t pack_halves(float low, float high) {
    const __half pair[2] = {__float2half_rn(low), __float2half_rn(high)};
    uint32_t bits;
    std::memcpy(&bits, pair, 4);
    return bits;
}

inline float inverse_approximate(float x) { return 1.f / x; }

inline float exp2_approximate(float x) { return std::exp2(x); }

inline void prefetch(const void*) {}
inline void wait_for_earlier_kernels() {}

#else

__device__ __forceinline__ void mma_s8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    // Four of the small ones that Turing has: their fragments are the quarters of the large one's.
    for (int half = 0; half < 2; ++half) {
        for (int rows = 0; rows < 2; ++rows) {
            asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                : "+r"(c[2 * rows]), "+r"(c[2 * rows + 1])
                : "r"(a[2 * half + rows]), "r"(b[half]));
        }
    }
#endif
}

__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int half = 0; half < 2; ++half) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
    }
#endif
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void copy_async(void* shared, const void* global, bool is_there) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(is_there ? 16 : 0)
                 : "memory");
#else
    *static_cast<int4*>(shared) = is_there ? *static_cast<const int4*>(global) : int4{0, 0, 0, 0};
#endif
}

__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int GROUPS>
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#endif
}

__device__ __forceinline__ int4 load_streaming(const void* global) {
    int4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(global));
    return value;
}

__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float inverse_approximate(float x) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
    return inverse;
}

__device__ __forceinline__ float exp2_approximate(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait; griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif
