// Floats to int8 codes and a scale: a row by a block.
#pragma once

#include "row.cuh"

/// What turns values into codes: `round_half_even(x * (127 / absmax))`.
struct Quantizer {
    float lift, inverse;

    __device__ __forceinline__ explicit Quantizer(float absmax) {
        // Below about 4e-37 the reciprocal overflows. A power of two moves the row up exactly.
        lift = absmax < 1e-36f ? 9223372036854775808.f : 1.f;
        inverse = absmax > 0.f ? __fdiv_rn(MAX_CODE, __fmul_rn(absmax, lift)) : 0.f;
    }

    /// The lowest byte is the code.
    __device__ __forceinline__ unsigned code(float x) const {
        // 1.5 * 2^23: what is added to it is rounded to a whole number, half to even, in the lowest bits.
        return __float_as_uint(__fadd_rn(__fmul_rn(__fmul_rn(x, lift), inverse), 12582912.f));
    }
};

/// A row to codes and a scale, and the columns in which it has outliers to the bits of its sequence; without a
/// threshold (0) it has none. Gives the bits of the absmax; where they are those of NaN or an infinity, the codes
/// mean nothing.
///
/// Which columns other tokens of the sequence have outliers in is not known here: where this one's value is
/// small its code stands, and the product takes it out again, exactly.
///
/// With WHOLE the codes too lie where as many of them as a piece has values can be stored at once.
template <class T, bool WHOLE>
__device__ __forceinline__ unsigned quantize_row(Row<T, WHOLE>& row, int8_t* codes, float* scale,
                                                 unsigned* outlier_bits, float threshold) {
    const unsigned limit = threshold > 0.f ? __float_as_uint(threshold) : 0xffffffffu;
    unsigned absmax_bits = 0;
    row.each([&](const Piece<T>& piece, int col, int there) {
        UNROLL for (int i = 0; i < PIECE<T>; ++i) {
            const unsigned bits = magnitude_bits(piece[i]);
            if (bits < limit) {
                absmax_bits = max(absmax_bits, bits);
            } else if (WHOLE || i < there) {
                atomicOr(&outlier_bits[(col + i) / 32], 1u << (col + i) % 32);
            }
        }
    });
    absmax_bits = block_max(absmax_bits);
    const float absmax = __uint_as_float(absmax_bits);
    const Quantizer quantizer(absmax);
    row.each([&](const Piece<T>& piece, int col, int there) {
        Words<PIECE<T> / 4> packed = {};
        UNROLL for (int i = 0; i < PIECE<T>; ++i) {
            const unsigned code = magnitude_bits(piece[i]) < limit ? quantizer.code(piece[i]) & 0xff : 0;
            packed.at[i / 4] |= code << 8 * (i % 4);
        }
        if constexpr (WHOLE) {
            store_words(codes + col, packed);
        } else {
            UNROLL for (int i = 0; i < PIECE<T>; ++i) {
                if (i < there) codes[col + i] = static_cast<int8_t>(packed.at[i / 4] >> 8 * (i % 4));
            }
        }
    });
    if (threadIdx.x == 0) *scale = __fdiv_rn(absmax, MAX_CODE);
    return absmax_bits;
}
