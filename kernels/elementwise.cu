// What happens between the layers of a block, value by value, in place.

#include "row.cuh"

/// Calls `piece(index)` with the index at which each whole piece starts, where pieces are aligned, and `value(index)`
/// with every other index below `count`.
template <class T, class Piecewise, class Single>
__device__ __forceinline__ void for_each_value(size_t count, bool aligned, Piecewise piece, Single value) {
    const size_t thread = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const size_t threads = static_cast<size_t>(gridDim.x) * blockDim.x;
    const size_t pieces = aligned ? count / PIECE<T> : 0;
    for (size_t index = thread; index < pieces; index += threads) piece(index * PIECE<T>);
    for (size_t index = pieces * PIECE<T> + thread; index < count; index += threads) value(index);
}

/// x += other, both (count).
///
/// Any grid in one dimension, block 256; a thread a piece of 16 bytes is best.
template <class T>
__device__ void add(T* x, const T* other, long long count) {
    const auto add_piece = [=](size_t index) {
        const auto a = Piece<T>::template load<true>(x + index, PIECE<T>);
        const auto b = Piece<T>::template load<true>(other + index, PIECE<T>);
        float sums[PIECE<T>];
        UNROLL for (int i = 0; i < PIECE<T>; ++i) sums[i] = a[i] + b[i];
        Piece<T>::of(sums).template store<true>(x + index, PIECE<T>);
    };
    const auto add_value = [=](size_t index) { x[index] = from_float<T>(to_float(x[index]) + to_float(other[index])); };
    for_each_value<T>(count, is_aligned(x) && is_aligned(other), add_piece, add_value);
}

/// x = activation(x), (count); see `activated` for the numbers.
///
/// Any grid in one dimension, block 256; a thread a piece of 16 bytes is best.
template <class T>
__device__ void activate(T* x, int activation, long long count) {
    const auto activate_piece = [=](size_t index) {
        const auto piece = Piece<T>::template load<true>(x + index, PIECE<T>);
        float values[PIECE<T>];
        UNROLL for (int i = 0; i < PIECE<T>; ++i) values[i] = activated(piece[i], activation);
        Piece<T>::of(values).template store<true>(x + index, PIECE<T>);
    };
    const auto activate_value = [=](size_t index) {
        x[index] = from_float<T>(activated(to_float(x[index]), activation));
    };
    for_each_value<T>(count, is_aligned(x), activate_piece, activate_value);
}

#define ELEMENTWISE(suffix, T)                                                                                        \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS) add_##suffix(T* x, const T* other, long long count) {   \
        add(x, other, count);                                                                                         \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                         \
        activate_##suffix(T* x, int activation, long long count) {                                                    \
        activate(x, activation, count);                                                                               \
    }
FOR_EACH_FLOAT(ELEMENTWISE)
