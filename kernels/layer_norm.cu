// Layer normalisation of rows, alone or with the quantising that follows it.

#include "quantize_row.cuh"

/// A norm's weight and bias (cols), either of them null for none.
struct NormVectors {
    const void *weight, *bias;
    int weight_dtype, bias_dtype;
};

/// `(x - mean) / sqrt(variance + eps) * weight + bias`, rounded to T, in place of the row and to `out` (cols). What
/// the row does not hold is read from `out` from then on.
template <class T, bool WHOLE>
__device__ __forceinline__ void normalise(Row<T, WHOLE>& row, const NormVectors& vectors, float eps, T* out) {
    float sum = 0.f;
    row.each([&](const Piece<T>& piece, int, int) {
        UNROLL for (int i = 0; i < PIECE<T>; ++i) sum += piece[i];
    });
    const float mean = __fdiv_rn(block_sum(sum), static_cast<float>(row.cols));
    float squares = 0.f;
    row.each([&](const Piece<T>& piece, int, int there) {
        UNROLL for (int i = 0; i < PIECE<T>; ++i) {
            const float centred = piece[i] - mean;
            if (WHOLE || i < there) squares += centred * centred;
        }
    });
    const float variance = __fdiv_rn(block_sum(squares), static_cast<float>(row.cols));
    const float inverse = __fdiv_rn(1.f, __fsqrt_rn(variance + eps));
    row.each([&](Piece<T>& piece, int col, int there) {
        float weight[PIECE<T>], bias[PIECE<T>], values[PIECE<T>];
        read_vector<WHOLE>(weight, vectors.weight, vectors.weight_dtype, col, there, 1.f);
        read_vector<WHOLE>(bias, vectors.bias, vectors.bias_dtype, col, there, 0.f);
        UNROLL for (int i = 0; i < PIECE<T>; ++i) {
            // As the CPU does it, without a fused step.
            const float normed = __fmul_rn(__fmul_rn(piece[i] - mean, inverse), weight[i]);
            values[i] = __fadd_rn(normed, bias[i]);
        }
        piece = Piece<T>::of(values);
        piece.template store<WHOLE>(out + col, there);
    });
    row.values = out;
}

template <class T>
__device__ __forceinline__ bool are_whole(const T* x, const NormVectors& vectors, const T* out, int cols) {
    return is_aligned(x) && is_aligned(vectors.weight) && is_aligned(vectors.bias) && is_aligned(out) &&
           cols % PIECE<T> == 0;
}

/// x (rows, width) to out (rows, width).
///
/// grid (rows), block 256.
template <class T>
__device__ void layer_norm(const T* x, const NormVectors& vectors, float eps, T* out, int width) {
    x += static_cast<size_t>(blockIdx.x) * width;
    out += static_cast<size_t>(blockIdx.x) * width;
    if (are_whole(x, vectors, out, width)) {
        Row<T, true> row(x, width);
        normalise(row, vectors, eps, out);
    } else {
        Row<T, false> row(x, width);
        normalise(row, vectors, eps, out);
    }
}

/// x (tokens, cols) to its norm, rounded to T, and that to codes, scales and outlier bits just as
/// `quantize_activations` makes them.
///
/// grid (tokens), block 256.
template <class T>
__device__ void layer_norm_quantize(const T* x, const NormVectors& vectors, float eps, T* normed, int8_t* codes,
                                    float* scales, unsigned* outlier_bits, int cols, int tokens_per_sequence,
                                    float threshold) {
    const size_t token = blockIdx.x;
    if (threshold > 0.f) outlier_bits += token / tokens_per_sequence * ((cols + 31) / 32);
    x += token * cols;
    normed += token * cols;
    codes += token * cols;
    if (are_whole(x, vectors, normed, cols) && is_aligned<PIECE<T>>(codes)) {
        Row<T, true> row(x, cols);
        normalise(row, vectors, eps, normed);
        quantize_row(row, codes, scales + token, outlier_bits, threshold);
    } else {
        Row<T, false> row(x, cols);
        normalise(row, vectors, eps, normed);
        quantize_row(row, codes, scales + token, outlier_bits, threshold);
    }
}

// Four blocks at a time on a multiprocessor: left to itself, the compiler spills for a fifth.
#define LAYER_NORM(suffix, T)                                                                                         \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS, 4)                                                      \
        layer_norm_##suffix(const T* x, const void* weight, int weight_dtype, const void* bias, int bias_dtype,       \
                            float eps, T* out, int width) {                                                           \
        wait_for_earlier_kernels();                                                                                   \
        layer_norm(x, NormVectors{weight, bias, weight_dtype, bias_dtype}, eps, out, width);                          \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS, 4)                                                      \
        layer_norm_quantize_##suffix(const T* x, const void* weight, int weight_dtype, const void* bias,              \
                                     int bias_dtype, float eps, T* normed, int8_t* codes, float* scales,              \
                                     unsigned* outlier_bits, int cols, int tokens_per_sequence, float threshold) {    \
        wait_for_earlier_kernels();                                                                                   \
        layer_norm_quantize(x, NormVectors{weight, bias, weight_dtype, bias_dtype}, eps, normed, codes, scales,       \
                            outlier_bits, cols, tokens_per_sequence, threshold);                                      \
    }
FOR_EACH_FLOAT(LAYER_NORM)
