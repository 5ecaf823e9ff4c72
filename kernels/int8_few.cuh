// What `int8_matmul_few` and `int8_matmul_one` make of x alike, bit for bit: norm, codes, and outlier columns beyond a list.
#pragma once

#include "device_prims.cuh"

namespace few {

/// Columns of a row that a warp reads at once: 16 a lane.
constexpr int STEP = 512;
/// Outlier columns that are kept in a list, one a lane; the product finds further ones by their bits.
constexpr int LISTED = 32;

/// Four values of a row.
struct Quad {
    float values[4];
};

template <class T>
struct alignas(4 * sizeof(T)) FourOf {
    T values[4];
};

/// A value's layer norm, rounded to T.
template <class T>
__device__ __forceinline__ float normed(float x, float mean, float inverse, float weight, float bias) {
    return to_float(from_float<T>(__fadd_rn(__fmul_rn(__fmul_rn(__fadd_rn(x, -mean), inverse), weight), bias)));
}

/// What makes a token's codes.
struct Coder {
    float absmax, lift, inverse;

    __device__ __forceinline__ explicit Coder(unsigned absmax_bits) : absmax(__uint_as_float(absmax_bits)) {
        // Below about 4e-37 the reciprocal overflows. A power of two moves the row up exactly.
        lift = absmax < 1e-36f ? 9223372036854775808.f : 1.f;
        inverse = absmax > 0.f ? __fdiv_rn(MAX_CODE, __fmul_rn(absmax, lift)) : 0.f;
    }

    /// What turns codes back into floats.
    __device__ __forceinline__ float scale() const { return __fdiv_rn(absmax, MAX_CODE); }

    /// The codes of four values, 0 where the bit of `outliers` says that the column is one.
    __device__ __forceinline__ unsigned codes(const Quad& quad, unsigned outliers) const {
        unsigned four = 0;
        UNROLL for (int i = 0; i < 4; ++i) {
            // 1.5 * 2^23: what is added to it is rounded to a whole number, half to even, in the lowest bits.
            const float whole = __fadd_rn(__fmul_rn(__fmul_rn(quad.values[i], lift), inverse), 12582912.f);
            four |= outliers >> i & 1 ? 0u : (__float_as_uint(whole) & 0xffu) << 8 * i;
        }
        return four;
    }
};

/// Calls `term(column)` for the outlier columns of bits (words) after the last that is listed, ascending.
template <class Term>
__device__ __forceinline__ void each_unlisted(const unsigned* bits, int words, int last_listed, Term term) {
    for (int word = last_listed / 32; word < words; ++word) {
        unsigned mask = bits[word];
        if (word == last_listed / 32) mask &= ~((2u << last_listed % 32) - 1u);
        for (; mask; mask &= mask - 1) term(32 * word + __ffs(static_cast<int>(mask)) - 1);
    }
}

}  // namespace few
