// Writes new tokens' keys and values to the cache.

#include "attention.cuh"

constexpr unsigned WRITE_THREADS = 256;

__device__ __forceinline__ void cached(float value, float& place) { place = value; }
__device__ __forceinline__ void cached(float value, __half& place) { place = __float2half_rn(within_half(value)); }

template <class T, class C>
__device__ __forceinline__ void write_piece(const T* from, C* to, int count) {
    const bool is_aligned = (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % 16 == 0;
    if (count == FEATURES && is_aligned) {
        float values[FEATURES];
        Eight<T>::load(from).floats(values);
        C narrowed[FEATURES];
        UNROLL
        for (int i = 0; i < FEATURES; ++i) cached(values[i], narrowed[i]);
        Eight<C> eight;
        memcpy(eight.words, narrowed, sizeof narrowed);
        UNROLL
        for (int word = 0; word < Eight<C>::WORDS; ++word) reinterpret_cast<int4*>(to)[word] = eight.words[word];
    } else {
        for (int i = 0; i < count; ++i) cached(to_float(from[i]), to[i]);
    }
}

/// keys and values (batch, heads, tokens, head_dim) of the given strides (in values; features lie side by side) to
/// the positions from `past` on of the caches (batch, heads, capacity, head_dim).
/// Grid (ceil(tokens * heads * ceil(head_dim / 8) / 256), batch), block 256, no dynamic shared memory.
template <class T, class C>
__device__ void attention_write(const T* keys, const T* values, C* key_cache, C* value_cache, int heads, int tokens,
                                int head_dim, int capacity, int past, long long batch_stride, long long head_stride,
                                long long token_stride) {
    const unsigned pieces = (head_dim + FEATURES - 1) / FEATURES;
    const unsigned index = blockIdx.x * WRITE_THREADS + threadIdx.x;
    const unsigned row = index / pieces, feature = index % pieces * FEATURES;
    const unsigned token = row / heads, head = row % heads;
    if (token >= static_cast<unsigned>(tokens)) return;
    const long long from = blockIdx.y * batch_stride + head * head_stride + token * token_stride + feature;
    const size_t to = ((static_cast<size_t>(blockIdx.y) * heads + head) * capacity + past + token) * head_dim + feature;
    const int count = min(FEATURES, head_dim - static_cast<int>(feature));
    write_piece(keys + from, key_cache + to, count);
    write_piece(values + from, value_cache + to, count);
}

#define ATTENTION_WRITE(suffix, T, cache_suffix, C)                                                                   \
    extern "C" __global__ void __launch_bounds__(WRITE_THREADS) attention_write_##suffix##_##cache_suffix(            \
        const T* keys, const T* values, C* key_cache, C* value_cache, int heads, int tokens, int head_dim,            \
        int capacity, int past, long long batch_stride, long long head_stride, long long token_stride) {              \
        wait_for_earlier_kernels();                                                                                   \
        attention_write(keys, values, key_cache, value_cache, heads, tokens, head_dim, capacity, past, batch_stride,  \
                        head_stride, token_stride);                                                                   \
    }
FOR_EACH_FLOAT_AND_CACHE(ATTENTION_WRITE)
