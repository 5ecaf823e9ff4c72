// Steps 2 and 3 of LLM.int8() for many tokens: outlier columns, and every token's codes and scale.

#include "device_prims.cuh"

constexpr unsigned QUANTIZE_THREADS = 256;

/// A token's values (cols), read by `value(column)`, to codes and a scale, and the columns in which it has
/// outliers to the bits of its sequence.
///
/// Which columns other tokens of the sequence have outliers in is not known here: where this one's value is
/// small its code stands, and the product takes it out again, exactly.
template <class Value>
__device__ void quantize_row(Value value, int8_t* codes, float* scale, unsigned* outlier_bits, int cols, float threshold) {
    const unsigned limit = threshold > 0.f ? __float_as_uint(threshold) : 0xffffffffu;
    unsigned absmax_bits = 0;
    for (int col = threadIdx.x; col < cols; col += blockDim.x) {
        const unsigned bits = magnitude_bits(value(col));
        if (bits < limit) {
            absmax_bits = max(absmax_bits, bits);
        } else {
            atomicOr(&outlier_bits[col / 32], 1u << col % 32);
        }
    }
    const float absmax = __uint_as_float(block_max(absmax_bits));
    // Below about 4e-37 the reciprocal overflows. A power of two moves the row up exactly.
    const float lift = absmax < 1e-36f ? 9223372036854775808.f : 1.f;
    const float inverse = absmax > 0.f ? __fdiv_rn(MAX_CODE, __fmul_rn(absmax, lift)) : 0.f;
    for (int col = threadIdx.x; col < cols; col += blockDim.x) {
        const float x = value(col);
        // 1.5 * 2^23: what is added to it is rounded to a whole number, half to even, in the lowest bits.
        const float whole = __fadd_rn(__fmul_rn(__fmul_rn(x, lift), inverse), 12582912.f);
        codes[col] = magnitude_bits(x) < limit ? static_cast<int8_t>(__float_as_uint(whole)) : 0;
    }
    if (threadIdx.x == 0) *scale = __fdiv_rn(absmax, MAX_CODE);
}

/// x (tokens, cols) to codes (tokens, cols), scales (tokens), and outlier bits (sequences, words) that are
/// zero before. A threshold of 0 makes no outliers; the bits may be null then. One block a token.
template <class T>
__device__ void quantize_activations(const T* x, int8_t* codes, float* scales, unsigned* outlier_bits, int cols,
                                     int tokens_per_sequence, float threshold) {
    const size_t token = blockIdx.x;
    unsigned* bits = outlier_bits + token / tokens_per_sequence * ((cols + 31) / 32);
    const T* row = x + token * cols;
    quantize_row([=](int col) { return to_float(row[col]); }, codes + token * cols, scales + token, bits, cols, threshold);
}

#define QUANTIZE_ACTIVATIONS(suffix, T)                                                                               \
    extern "C" __global__ void __launch_bounds__(QUANTIZE_THREADS)                                                    \
        quantize_activations_##suffix(const T* x, int8_t* codes, float* scales, unsigned* outlier_bits, int cols,     \
                                      int tokens_per_sequence, float threshold) {                                     \
        quantize_activations(x, codes, scales, outlier_bits, cols, tokens_per_sequence, threshold);                   \
    }
FOR_EACH_FLOAT(QUANTIZE_ACTIVATIONS)
