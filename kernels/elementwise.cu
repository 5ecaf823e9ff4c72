// What follows a product that has no such ending of its own, value by value, in place.

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

/// x = activation(x + bias) + residual, (count) as rows of `width`: each of the three where it is given. `bias`
/// (width) is in the dtype of that number (see `vector_value`) or null, `residual` (count) may be null.
///
/// Any grid in one dimension, block 256; a thread a piece of 16 bytes is best.
template <class T>
__device__ void finish(T* x, const void* bias, int bias_dtype, int width, int activation, const T* residual, long long count) {
    const auto finished = [=](float value, size_t col, float other) {
        if (bias) value += vector_value(bias, bias_dtype, static_cast<int>(col));
        return activated(value, activation) + other;
    };
    const auto finish_piece = [=](size_t index) {
        const auto piece = Piece<T>::template load<true>(x + index, PIECE<T>);
        const size_t col = index % width;
        float values[PIECE<T>];
        if (residual) {
            const auto others = Piece<T>::template load<true>(residual + index, PIECE<T>);
            UNROLL for (int i = 0; i < PIECE<T>; ++i) values[i] = finished(piece[i], col + i, others[i]);
        } else {
            UNROLL for (int i = 0; i < PIECE<T>; ++i) values[i] = finished(piece[i], col + i, 0.f);
        }
        Piece<T>::of(values).template store<true>(x + index, PIECE<T>);
    };
    const auto finish_value = [=](size_t index) {
        x[index] = from_float<T>(finished(to_float(x[index]), index % width, residual ? to_float(residual[index]) : 0.f));
    };
    // A piece lies in one row.
    const bool aligned = is_aligned(x) && (!residual || is_aligned(residual)) && (!bias || width % PIECE<T> == 0);
    for_each_value<T>(count, aligned, finish_piece, finish_value);
}

#define FINISH(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                         \
        finish_##suffix(T* x, const void* bias, int bias_dtype, int width, int activation, const T* residual,         \
                        long long count) {                                                                            \
        wait_for_earlier_kernels();                                                                                   \
        finish(x, bias, bias_dtype, width, activation, residual, count);                                              \
    }
FOR_EACH_FLOAT(FINISH)
