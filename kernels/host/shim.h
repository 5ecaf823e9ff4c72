// The words of CUDA C++ for the host's compiler: kernels run on the CPU, where sanitizers see them and tests
// compare them with plain loops.
//
// Blocks run one after the other, so `__shared__` is `static`. Every thread of a block is a fiber; the lanes
// of a warp run in a random order from one warp-level call to the next, and the warps of a block in a random
// order from one barrier to the next, so that a missing barrier shows. Calls at warp level must be convergent.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

using __half = _Float16;
inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }

struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
using std::max;
using std::min;
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
    return sum;
}
inline unsigned atomicOr(unsigned* place, unsigned bits) {
    const unsigned old = *place;
    *place |= bits;
    return old;
}
template <class T>
T atomicAdd(T* place, T value) {
    const T old = *place;
    *place += value;
    return old;
}
template <class T>
T atomicMin(T* place, T value) {
    const T old = *place;
    *place = std::min(old, value);
    return old;
}

namespace shim {

enum class Wait { None, Warp, Block };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(128 << 10);
    dim3 thread;
    bool done = false;
    Wait wait = Wait::None;
};

constexpr unsigned MAX_THREADS = 1024;
inline std::vector<Fiber> fibers(MAX_THREADS);
inline ucontext_t scheduler;
inline unsigned current;
inline std::function<void()> body;
inline std::mt19937 order(1);
/// What lanes show each other, 64 bytes each.
inline char exchange[MAX_THREADS][64];
/// Dynamic shared memory: exactly as much as was asked for, so that sanitizers see what lies beyond.
inline unsigned char* dynamic_shared;

inline unsigned flat_thread() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

inline void yield(Wait why) {
    Fiber& fiber = fibers[current];
    fiber.wait = why;
    swapcontext(&fiber.context, &scheduler);
    threadIdx = fiber.thread;
}

inline void start() {
    body();
    fibers[current].done = true;
    swapcontext(&fibers[current].context, &scheduler);
    std::abort();
}

inline void resume(unsigned index) {
    current = index;
    threadIdx = fibers[index].thread;
    fibers[index].wait = Wait::None;
    swapcontext(&scheduler, &fibers[index].context);
}

inline std::vector<unsigned> shuffled(unsigned first, unsigned end) {
    std::vector<unsigned> indices(end - first);
    std::iota(indices.begin(), indices.end(), first);
    std::shuffle(indices.begin(), indices.end(), order);
    return indices;
}

/// Runs a warp's lanes until each is done or at the block's barrier.
inline void run_warp(unsigned first, unsigned end) {
    for (bool more = true; more;) {
        more = false;
        for (unsigned lane : shuffled(first, end)) {
            Fiber& fiber = fibers[lane];
            if (fiber.done || fiber.wait == Wait::Block) continue;
            resume(lane);
            more |= !fiber.done && fiber.wait == Wait::Warp;
        }
    }
}

inline void run_block() {
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        fiber.done = false;
        fiber.wait = Wait::None;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.context, start, 0);
    }
    for (bool more = true; more;) {
        for (unsigned warp : shuffled(0, (threads + 31) / 32)) run_warp(32 * warp, std::min(32 * warp + 32, threads));
        more = false;
        // Threads that have left count as arrived.
        for (unsigned i = 0; i < threads; ++i) {
            more |= !fibers[i].done;
            fibers[i].wait = Wait::None;
        }
    }
}

inline void launch(dim3 grid, dim3 block, unsigned shared_bytes, std::function<void()> kernel) {
    gridDim = grid;
    blockDim = block;
    body = std::move(kernel);
    std::vector<unsigned> blocks = shuffled(0, grid.x * grid.y * grid.z);
    for (unsigned index : blocks) {
        blockIdx = {index % grid.x, index / grid.x % grid.y, index / (grid.x * grid.y)};
        void* shared = shared_bytes ? std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128) : nullptr;
        if (shared) std::memset(shared, 0xa5, shared_bytes);
        dynamic_shared = static_cast<unsigned char*>(shared);
        run_block();
        std::free(shared);
    }
}

/// Shows `value` to the warp, and gives what `lane` shows.
template <class T>
T exchanged(T value, unsigned lane) {
    static_assert(sizeof(T) <= 64);
    const unsigned own = flat_thread();
    std::memcpy(exchange[own], &value, sizeof(T));
    yield(Wait::Warp);
    T other;
    std::memcpy(&other, exchange[own / 32 * 32 + lane % 32], sizeof(T));
    yield(Wait::Warp);
    return other;
}

}  // namespace shim

inline void __syncthreads() { shim::yield(shim::Wait::Block); }
inline void __syncwarp(unsigned = ~0u) { shim::yield(shim::Wait::Warp); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return shim::exchanged(value, (shim::flat_thread() % 32) ^ static_cast<unsigned>(mask));
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    return shim::exchanged(value, static_cast<unsigned>(lane));
}
inline unsigned __ballot_sync(unsigned, bool value) {
    unsigned bits = 0;
    const unsigned own = shim::flat_thread();
    shim::exchange[own][0] = value;
    shim::yield(shim::Wait::Warp);
    for (unsigned lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(shim::exchange[own / 32 * 32 + lane][0] != 0) << lane;
    shim::yield(shim::Wait::Warp);
    return bits;
}
