// Step 1 of LLM.int8(): a weight's rows to codes and scales, once, at load.

#include "quantize_row.cuh"

/// weight (rows, cols) to codes (rows, cols) and scales (rows). The first row that holds a NaN or an infinity is left
/// in `bad_row`, which is the largest int before.
///
/// grid (rows), block 256.
template <class T>
__device__ void quantize_rows(const T* weight, int8_t* codes, float* scales, int* bad_row, int cols) {
    const size_t index = blockIdx.x;
    weight += index * cols;
    codes += index * cols;
    unsigned absmax_bits;
    if (is_aligned(weight) && is_aligned<PIECE<T>>(codes) && cols % PIECE<T> == 0) {
        Row<T, true> row(weight, cols);
        absmax_bits = quantize_row(row, codes, scales + index, nullptr, 0.f);
    } else {
        Row<T, false> row(weight, cols);
        absmax_bits = quantize_row(row, codes, scales + index, nullptr, 0.f);
    }
    if (threadIdx.x == 0 && absmax_bits >= 0x7f800000u) atomicMin(bad_row, static_cast<int>(index));
}

#define QUANTIZE_ROWS(suffix, T)                                                                                      \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS)                                                         \
        quantize_rows_##suffix(const T* weight, int8_t* codes, float* scales, int* bad_row, int cols) {               \
        wait_for_earlier_kernels();                                                                                   \
        quantize_rows(weight, codes, scales, bad_row, cols);                                                          \
    }
FOR_EACH_FLOAT(QUANTIZE_ROWS)
