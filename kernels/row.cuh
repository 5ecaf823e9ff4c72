// Rows that a block reads once and works on several times: in pieces of 16 bytes, dealt out to its threads and held
// in registers from one pass to the next.
#pragma once

#include "device_prims.cuh"

/// Threads of a block that works on a row.
constexpr unsigned ROW_THREADS = 256;

/// Words that are loaded or stored at once; their place is aligned as they are.
template <int COUNT>
struct alignas(COUNT < 4 ? 4 * COUNT : 16) Words {
    uint32_t at[COUNT];
};

template <int COUNT>
__device__ __forceinline__ Words<COUNT> load_words(const void* place) {
    return *static_cast<const Words<COUNT>*>(place);
}

template <int COUNT>
__device__ __forceinline__ void store_words(void* place, const Words<COUNT>& words) {
    *static_cast<Words<COUNT>*>(place) = words;
}

/// Whether words of so many bytes may lie there.
template <int BYTES = 16>
__device__ __forceinline__ bool is_aligned(const void* place) {
    return reinterpret_cast<uintptr_t>(place) % (BYTES < 16 ? BYTES : 16) == 0;
}

/// The lowest bits of a word, as many as T has.
template <class T>
__device__ __forceinline__ float float_of_bits(uint32_t bits) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return to_float(value);
}

template <class T>
__device__ __forceinline__ uint32_t bits_of_float(float value) {
    const T rounded = from_float<T>(value);
    uint32_t bits = 0;
    memcpy(&bits, &rounded, sizeof rounded);
    return bits;
}

/// Values of T as they lie in memory, `COUNT` of them (an even number).
template <class T, int COUNT>
struct Packed {
    static constexpr int PER_WORD = 4 / sizeof(T);
    Words<COUNT / PER_WORD> words;

    __device__ __forceinline__ float operator[](int index) const {
        return float_of_bits<T>(words.at[index / PER_WORD] >> 16 * (index % PER_WORD));
    }

    __device__ __forceinline__ static Packed of(const float (&values)[COUNT]) {
        Packed packed;
        UNROLL for (int word = 0; word < COUNT / PER_WORD; ++word) {
            packed.words.at[word] = bits_of_float<T>(values[word * PER_WORD]);
            if (PER_WORD == 2) packed.words.at[word] |= bits_of_float<T>(values[word * PER_WORD + 1]) << 16;
        }
        return packed;
    }

    /// From `place` on, as many as there are; the others are 0. With WHOLE all are there, and lie as words do.
    template <bool WHOLE>
    __device__ __forceinline__ static Packed load(const T* place, int there) {
        if constexpr (WHOLE) {
            return {load_words<COUNT / PER_WORD>(place)};
        } else {
            float values[COUNT];
            UNROLL for (int i = 0; i < COUNT; ++i) values[i] = i < there ? to_float(place[i]) : 0.f;
            return of(values);
        }
    }

    template <bool WHOLE>
    __device__ __forceinline__ void store(T* place, int there) const {
        if constexpr (WHOLE) {
            store_words(place, words);
        } else {
            UNROLL for (int i = 0; i < COUNT; ++i) {
                if (i < there) place[i] = from_float<T>((*this)[i]);
            }
        }
    }
};

/// 16 bytes of a row.
template <class T>
using Piece = Packed<T, 16 / sizeof(T)>;

/// Values of a piece.
template <class T>
constexpr int PIECE = 16 / sizeof(T);

/// Values of `U` as floats, from `values` on.
template <bool WHOLE, class U, int COUNT>
__device__ __forceinline__ void read_floats(float (&out)[COUNT], const U* values, int there) {
    const auto packed = Packed<U, COUNT>::template load<WHOLE>(values, there);
    UNROLL for (int i = 0; i < COUNT; ++i) out[i] = packed[i];
}

/// The same of a bias, or of a norm's vector, from `index` on; see `vector_value` for the dtype. `absent` where it is
/// null.
template <bool WHOLE, int COUNT>
__device__ __forceinline__ void read_vector(float (&out)[COUNT], const void* values, int dtype, int index, int there,
                                            float absent) {
    if constexpr (WHOLE) {
        // Selected without branches: every piece that a thread holds has its own copy of this.
        const bool wide = dtype == 0;
        const char* place = static_cast<const char*>(values) + static_cast<size_t>(index) * (wide ? 4 : 2);
        Words<COUNT / 2> low = {}, high = {};
        if (values) low = load_words<COUNT / 2>(place);
        if (values && wide) high = load_words<COUNT / 2>(place + 2 * COUNT);
        UNROLL for (int i = 0; i < COUNT; ++i) {
            const uint32_t narrow = low.at[i / 2] >> 16 * (i % 2);
            const float f16 = float_of_bits<__half>(narrow), bf16 = float_of_bits<__nv_bfloat16>(narrow);
            const float f32 = __uint_as_float(i < COUNT / 2 ? low.at[i] : high.at[i - COUNT / 2]);
            const float value = wide ? f32 : dtype == 1 ? f16 : bf16;
            out[i] = values ? value : absent;
        }
    } else {
        for (int i = 0; i < COUNT; ++i) out[i] = values && i < there ? vector_value(values, dtype, index + i) : absent;
    }
}

/// A block's row (cols). WHOLE: its length is that of whole pieces, and it starts where one may; then as much of it as
/// 32 values a thread, 8192 in all, is held. What is not held is read again in every pass.
template <class T, bool WHOLE>
struct Row {
    static constexpr int HELD = WHOLE ? 32 / PIECE<T> : 0;
    static constexpr int STEP = ROW_THREADS * PIECE<T>;

    const T* values;
    int cols;
    Piece<T> held[WHOLE ? HELD : 1];

    __device__ __forceinline__ Row(const T* values, int cols) : values(values), cols(cols) {
        UNROLL for (int i = 0; i < HELD; ++i) {
            const int col = i * STEP + threadIdx.x * PIECE<T>;
            if (col < cols) held[i] = Piece<T>::template load<WHOLE>(values + col, cols - col);
        }
    }

    /// Calls `pass(piece, column, values there)` with this thread's pieces. What it makes of a piece is seen by the
    /// next pass where the piece is held; elsewhere the next pass reads `values`.
    template <class Pass>
    __device__ __forceinline__ void each(Pass pass) {
        UNROLL for (int i = 0; i < HELD; ++i) {
            const int col = i * STEP + threadIdx.x * PIECE<T>;
            if (col < cols) pass(held[i], col, there(col));
        }
        for (int col = HELD * STEP + threadIdx.x * PIECE<T>; col < cols; col += STEP) {
            auto piece = Piece<T>::template load<WHOLE>(values + col, cols - col);
            pass(piece, col, there(col));
        }
    }

    __device__ __forceinline__ int there(int col) const { return WHOLE ? PIECE<T> : min(cols - col, PIECE<T>); }
};
