// Steps 2 and 3 of LLM.int8() for many tokens: outlier columns, and every token's codes and scale.

#include "quantize_row.cuh"

/// x (tokens, cols) to codes (tokens, cols), scales (tokens), and outlier bits (sequences, words) that are
/// zero before. A threshold of 0 makes no outliers; the bits may be null then.
///
/// grid (tokens), block 256.
template <class T>
__device__ void quantize_activations(const T* x, int8_t* codes, float* scales, unsigned* outlier_bits, int cols,
                                     int tokens_per_sequence, float threshold) {
    const size_t token = blockIdx.x;
    if (threshold > 0.f) outlier_bits += token / tokens_per_sequence * ((cols + 31) / 32);
    x += token * cols;
    codes += token * cols;
    if (is_aligned(x) && is_aligned<PIECE<T>>(codes) && cols % PIECE<T> == 0) {
        Row<T, true> row(x, cols);
        quantize_row(row, codes, scales + token, outlier_bits, threshold);
    } else {
        Row<T, false> row(x, cols);
        quantize_row(row, codes, scales + token, outlier_bits, threshold);
    }
}

#define QUANTIZE_ACTIVATIONS(suffix, T)                                                                               \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                         \
        quantize_activations_##suffix(const T* x, int8_t* codes, float* scales, unsigned* outlier_bits, int cols,     \
                                      int tokens_per_sequence, float threshold) {                                     \
        wait_for_earlier_kernels();                                                                                   \
        quantize_activations(x, codes, scales, outlier_bits, cols, tokens_per_sequence, threshold);                   \
    }
FOR_EACH_FLOAT(QUANTIZE_ACTIVATIONS)
