// What the attention kernels share. Keys and values are cached plainly, (batch, heads, capacity, head_dim) each, in
// C, which is f16 or f32; what lies after the tokens that are held is never read, whatever it is.
#pragma once

#include "device_prims.cuh"

/// `KERNEL(suffix, T, cache_suffix, C)` for each dtype of activations and of the cache.
#define FOR_EACH_FLOAT_AND_CACHE(KERNEL)                                                                              \
    KERNEL(f32, float, f32, float) KERNEL(f16, __half, f32, float) KERNEL(bf16, __nv_bfloat16, f32, float)            \
    KERNEL(f32, float, f16, __half) KERNEL(f16, __half, f16, __half) KERNEL(bf16, __nv_bfloat16, f16, __half)

/// Features that a thread reads at a time: 16 bytes of f16.
constexpr int FEATURES = 8;

/// f16 has no room beyond 65504: what is larger comes as near as it can. NaN stays NaN.
__device__ __forceinline__ float within_half(float value) {
    value = value > 65504.f ? 65504.f : value;
    return value < -65504.f ? -65504.f : value;
}

/// Eight values that begin at 16 bytes, as they lie in memory.
template <class V>
struct Eight {
    static constexpr int WORDS = sizeof(V) / 2;
    int4 words[WORDS];

    __device__ __forceinline__ static Eight load(const V* values) {
        Eight eight;
        UNROLL
        for (int word = 0; word < WORDS; ++word) eight.words[word] = load_streaming(values + 16 / sizeof(V) * word);
        return eight;
    }

    __device__ __forceinline__ static Eight zeros() {
        Eight eight;
        UNROLL
        for (int word = 0; word < WORDS; ++word) eight.words[word] = int4{0, 0, 0, 0};
        return eight;
    }

    __device__ __forceinline__ void floats(float (&out)[FEATURES]) const {
        V values[FEATURES];
        memcpy(values, words, sizeof values);
        UNROLL
        for (int i = 0; i < FEATURES; ++i) out[i] = to_float(values[i]);
    }
};
