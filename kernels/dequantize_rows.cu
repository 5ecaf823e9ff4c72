// Rows of an int8 table, by their numbers: embeddings. The caller sees to it that there are such rows.

#include "row.cuh"

/// Calls `piece(column)` with the columns at which this thread's pieces of a row (width) start.
template <class T, class Pass>
__device__ __forceinline__ void for_each_piece(int width, Pass piece) {
    for (int col = threadIdx.x * PIECE<T>; col < width; col += blockDim.x * PIECE<T>) piece(col);
}

/// codes (.., width), a scale a row, and ids to out (ids, width): `code * scale`, rounded once.
///
/// grid (ids), block 256.
template <class T>
__device__ void dequantize_rows(const int8_t* codes, const float* scales, const unsigned* ids, T* out, int width) {
    const size_t row = ids[blockIdx.x];
    const float scale = scales[row];
    codes += row * width;
    out += static_cast<size_t>(blockIdx.x) * width;
    if (is_aligned<PIECE<T>>(codes) && is_aligned(out) && width % PIECE<T> == 0) {
        for_each_piece<T>(width, [=](int col) {
            const auto words = load_words<PIECE<T> / 4>(codes + col);
            float values[PIECE<T>];
            UNROLL for (int i = 0; i < PIECE<T>; ++i) {
                values[i] = static_cast<float>(static_cast<int8_t>(words.at[i / 4] >> 8 * (i % 4))) * scale;
            }
            Piece<T>::of(values).template store<true>(out + col, PIECE<T>);
        });
    } else {
        for (int col = threadIdx.x; col < width; col += blockDim.x) {
            out[col] = from_float<T>(static_cast<float>(codes[col]) * scale);
        }
    }
}

#define DEQUANTIZE_ROWS(suffix, T)                                                                                    \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                         \
        dequantize_rows_##suffix(const int8_t* codes, const float* scales, const unsigned* ids, T* out, int width) {  \
        wait_for_earlier_kernels();                                                                                   \
        dequantize_rows(codes, scales, ids, out, width);                                                              \
    }
FOR_EACH_FLOAT(DEQUANTIZE_ROWS)
