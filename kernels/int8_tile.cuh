// What the tiles of `int8_matmul_many` and `int8_matmul_hopper` share: which outputs a block makes, its outlier
// columns, and what turns integer sums into outputs.
//
// A `Tile` says how many TOKENS and ROWS of the weight a block has, its THREADS and WARPS, and where the products
// want the codes of outlier columns (CODES_BYTES, `token_code`, `row_code`) and tokens' values (`value`).
#pragma once

#include "row.cuh"

namespace tile {

/// Outlier columns that are in shared memory at a time: as many as one product of tensor cores takes.
constexpr int OUTLIERS = 32;
/// Tiles of tokens that share a row of blocks: those that run at a time should ask for few different codes, and
/// the weight has the most.
constexpr int GROUP = 16;
/// Bytes for the columns of the outliers in shared memory, behind the stages.
constexpr int LIST_BYTES = 256;

/// The arguments of a kernel: out (tokens, rows, out_width apart) from codes (tokens, cols), their scales (tokens),
/// outlier bits (sequences, words) or null, x (tokens, cols), weight (rows, cols), its scales (rows), a bias (rows)
/// or null, and a residual that lies as `out` does, or null.
template <class T>
struct Product {
    const int8_t* codes;
    const float* x_scales;
    const unsigned* outlier_bits;
    const T* x;
    const int8_t* weight;
    const float* weight_scales;
    const void* bias;
    int bias_dtype;
    const T* residual;
    T* out;
    int tokens, rows, cols, out_width, tokens_per_sequence, activation;
};

/// The first outputs of this block.
struct Corner {
    int token, row;
};

/// Blocks in order go down the tokens of a group, then on to the next rows.
template <class Tile>
__device__ __forceinline__ Corner corner(int tokens, int rows) {
    const int token_tiles = (tokens + Tile::TOKENS - 1) / Tile::TOKENS;
    const int row_tiles = (rows + Tile::ROWS - 1) / Tile::ROWS;
    const int group = blockIdx.x / (GROUP * row_tiles), in_group = blockIdx.x % (GROUP * row_tiles);
    const int height = min(token_tiles - group * GROUP, GROUP);
    return {(group * GROUP + in_group % height) * Tile::TOKENS, in_group / height * Tile::ROWS};
}

/// The outlier bits of the sequences that a tile has tokens of.
struct OutlierBits {
    const unsigned* bits;
    int sequences, words;

    template <class Tile, class T>
    __device__ __forceinline__ static OutlierBits of(const Product<T>& product, int first_token) {
        const int words = (product.cols + 31) / 32, first = first_token / product.tokens_per_sequence;
        const int end_token = min(first_token + Tile::TOKENS, product.tokens);
        return {product.outlier_bits ? product.outlier_bits + static_cast<size_t>(first) * words : nullptr,
                (end_token - 1) / product.tokens_per_sequence - first + 1, words};
    }
};

/// The columns that are outliers in any of a tile's sequences: how many there are, and, in `list`, up to OUTLIERS
/// of them from number `first` on, ascending. The list is complete after the block's next barrier.
template <class Tile>
__device__ int collect_outliers(int* list, const OutlierBits& of_tile, int first) {
    int* totals = list + OUTLIERS;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int count = 0;
    for (int start = 0; start < of_tile.words; start += Tile::THREADS) {
        const int index = start + threadIdx.x;
        unsigned word = 0;
        if (index < of_tile.words) {
            const unsigned* words_here = of_tile.bits + index;
            for (int sequence = 0; sequence < of_tile.sequences; ++sequence, words_here += of_tile.words) {
                word |= *words_here;
            }
        }
        // The sum of this lane and those before it.
        int sum = __popc(word);
        for (int step = 1; step < 32; step *= 2) {
            const int before = __shfl_sync(ALL_LANES, sum, (lane - step) & 31);
            sum += lane < step ? 0 : before;
        }
        if (lane == 31) totals[warp] = sum;
        __syncthreads();
        int number = count + sum - __popc(word) - first;
        for (int other = 0; other < Tile::WARPS; ++other) {
            const int total = totals[other];
            number += other < warp ? total : 0;
            count += total;
        }
        __syncthreads();
        for (; word != 0; word &= word - 1, ++number) {
            if (number >= 0 && number < OUTLIERS) list[number] = 32 * index + __ffs(word) - 1;
        }
    }
    return count;
}

/// What a tile's outputs take besides the sums, in shared memory.
template <class Tile>
struct Epilogue {
    static constexpr int BYTES =
        (Tile::TOKENS + 2 * Tile::ROWS) * 4 + (Tile::TOKENS + Tile::ROWS) * OUTLIERS * 4 + Tile::CODES_BYTES;

    unsigned char* codes;  // Negated codes of the tokens, and those of the weight.
    float* weight_scales;  // (rows)
    float* biases;         // (rows)
    float* x_scales;       // (tokens)
    float* values;         // (OUTLIERS, tokens), in the order of `Tile::value`.
    float* weights;        // (OUTLIERS, rows)

    __device__ __forceinline__ explicit Epilogue(unsigned char* shared) {
        codes = shared;
        weight_scales = reinterpret_cast<float*>(shared + Tile::CODES_BYTES);
        biases = weight_scales + Tile::ROWS;
        x_scales = biases + Tile::ROWS;
        values = x_scales + Tile::TOKENS;
        weights = values + OUTLIERS * Tile::TOKENS;
    }

    /// Loads what belongs to outlier columns of the tile that begins at `corner`. Zeros stand where a column is not
    /// an outlier of the token's sequence: they change no sum. Codes are written where they are yet to be multiplied (WITH_CODES), else the
    /// float part alone. So many loads of a thread are under way AT_ONCE.
    template <int AT_ONCE, bool WITH_CODES, class T>
    __device__ __forceinline__ void load_outliers(const Product<T>& product, const int* list, int count,
                                                  const Corner& corner) const {
        // Where there are fewer columns the tokens have zeros; whatever the weight has there is multiplied by them.
        for (int i = threadIdx.x; WITH_CODES && i < Tile::TOKENS * OUTLIERS / 16; i += Tile::THREADS) {
            const int token = i / (OUTLIERS / 16), index = i % (OUTLIERS / 16) * 16;
            *reinterpret_cast<int4*>(codes + Tile::token_code(token, index)) = {0, 0, 0, 0};
        }
        __syncthreads();
        const int words = (product.cols + 31) / 32;
#pragma unroll AT_ONCE
        for (int i = threadIdx.x; i < count * Tile::TOKENS; i += Tile::THREADS) {
            const int index = i / Tile::TOKENS, token = i % Tile::TOKENS, col = list[index];
            float value = 0.f;
            int code = 0;
            if (corner.token + token < product.tokens) {
                const size_t sequence = (corner.token + token) / product.tokens_per_sequence;
                const size_t at = static_cast<size_t>(corner.token + token) * product.cols + col;
                const bool is_outlier = product.outlier_bits[sequence * words + col / 32] >> col % 32 & 1;
                // Loaded all the same: none waits for another.
                const float own_value = to_float(product.x[at]);
                const int own_code = product.codes[at];
                value = is_outlier ? own_value : 0.f;
                code = is_outlier ? own_code : 0;
            }
            if (WITH_CODES) codes[Tile::token_code(token, index)] = static_cast<unsigned char>(-code);
            values[index * Tile::TOKENS + Tile::value(token)] = value;
        }
#pragma unroll AT_ONCE
        for (int i = threadIdx.x; i < count * Tile::ROWS; i += Tile::THREADS) {
            const int index = i / Tile::ROWS, row = i % Tile::ROWS, col = list[index];
            const bool is_there = corner.row + row < product.rows;
            const int8_t code = is_there ? product.weight[static_cast<size_t>(corner.row + row) * product.cols + col] : 0;
            if (WITH_CODES) codes[Tile::row_code(row, index)] = static_cast<unsigned char>(code);
            weights[index * Tile::ROWS + row] = code;
        }
        __syncthreads();
    }
};

/// What is loaded for the epilogue while the first copies are under way: of a row and a token of the tile by the
/// thread's number.
struct Own {
    float weight_scale, bias, x_scale;

    template <class T>
    __device__ __forceinline__ static Own load(const Product<T>& product, const Corner& corner, int rows_of_tile,
                                               int tokens_of_tile) {
        const int own = threadIdx.x, row = corner.row + own, token = corner.token + own;
        const bool has_row = own < rows_of_tile && row < product.rows;
        const bool has_token = own < tokens_of_tile && token < product.tokens;
        return {has_row ? product.weight_scales[row] : 0.f,
                has_row && product.bias ? vector_value(product.bias, product.bias_dtype, row) : 0.f,
                has_token ? product.x_scales[token] : 0.f};
    }

    template <class Tile>
    __device__ __forceinline__ void store(const Epilogue<Tile>& epilogue) const {
        static_assert(Tile::TOKENS <= Tile::THREADS && Tile::ROWS <= Tile::THREADS, "a thread loads one of each");
        if (threadIdx.x < Tile::ROWS) {
            epilogue.weight_scales[threadIdx.x] = weight_scale;
            epilogue.biases[threadIdx.x] = bias;
        }
        if (threadIdx.x < Tile::TOKENS) epilogue.x_scales[threadIdx.x] = x_scale;
    }
};

/// x * w + sum with two roundings, as on the CPU. A 16-bit value times a code is exact in f32.
__device__ __forceinline__ float add_product(float sum, float x, float w, float) {
    return __fadd_rn(sum, __fmul_rn(x, w));
}
template <class T>
__device__ __forceinline__ float add_product(float sum, float x, float w, T) {
    return fmaf(x, w, sum);
}

/// `activated` of all, with one question for what it is; GELU by an inverse that is good to the last bit but one.
template <int TOKENS>
__device__ __forceinline__ void activate(float (&values)[TOKENS][8], int activation) {
    if (activation == RELU) {
        UNROLL for (int i = 0; i < 8 * TOKENS; ++i) values[i / 8][i % 8] = activated(values[i / 8][i % 8], RELU);
    } else if (activation == GELU) {
        UNROLL for (int i = 0; i < 8 * TOKENS; ++i) {
            values[i / 8][i % 8] *= inverse_approximate(gelu_divisor(values[i / 8][i % 8]));
        }
    } else if (activation == GELU_ERF) {
        UNROLL for (int i = 0; i < 8 * TOKENS; ++i) values[i / 8][i % 8] = activated(values[i / 8][i % 8], GELU_ERF);
    }
}

/// Eight values of 32 bits that follow each other.
template <class T>
struct alignas(16) EightOf {
    T values[8];
};

/// The products of `count` outlier columns for some tokens by 8 rows: the tokens' values lie `STRIDE` apart, from one
/// column to the next TOKENS of the tile.
template <int STRIDE, class Tile, class T, int TOKENS>
__device__ __forceinline__ void add_outliers(float (&sums)[TOKENS][8], const float* values, const float* weights,
                                             int count) {
    for (int index = 0; index < count; ++index) {
        float of_tokens[TOKENS];
        UNROLL for (int i = 0; i < TOKENS; ++i) of_tokens[i] = values[index * Tile::TOKENS + i * STRIDE];
        const auto of_rows = *reinterpret_cast<const EightOf<float>*>(weights + index * Tile::ROWS);
        UNROLL for (int i = 0; i < 8 * TOKENS; ++i) {
            sums[i / 8][i % 8] = add_product(sums[i / 8][i % 8], of_tokens[i / 8], of_rows.values[i % 8], T{});
        }
    }
}

/// The same for all `outliers` columns of a tile. Where the list has room for them they are in shared memory; else they are
/// loaded again, which all threads of the block do together.
template <int STRIDE, class Tile, class T, int TOKENS>
__device__ __forceinline__ void add_all_outliers(float (&sums)[TOKENS][8], const Product<T>& product,
                                                 const Epilogue<Tile>& epilogue, const Corner& corner,
                                                 const OutlierBits& bits, int* list, int outliers,
                                                 const float* values, const float* weights) {
#pragma unroll 1
    for (int first = 0; first < outliers; first += OUTLIERS) {
        const int count = min(outliers - first, OUTLIERS);
        if (outliers > OUTLIERS) {
            __syncthreads();
            collect_outliers<Tile>(list, bits, first);
            epilogue.template load_outliers<1, false>(product, list, count, corner);
        }
        add_outliers<STRIDE, Tile, T>(sums, values, weights, count);
    }
}

/// Writes a token's outputs of 8 rows, or of as many as there are, with the residual if there is one.
template <bool WHOLE, class T>
__device__ __forceinline__ void write_token(float (&values)[8], const T* residual, T* out, int there) {
    if (residual) {
        const auto others = Packed<T, 8>::template load<WHOLE>(residual, there);
        UNROLL for (int i = 0; i < 8; ++i) values[i] = __fadd_rn(values[i], others[i]);
    }
    Packed<T, 8>::of(values).template store<WHOLE>(out, there);
}

/// Turns some tokens' integer sums with 8 rows, `sums(i)` those of one, and their sums of outliers in `values`, into
/// outputs. Tokens are `STEP` apart; `token` and `row` are the first of the tile.
template <int STEP, class Tile, class T, int TOKENS, class Sums>
__device__ __forceinline__ void write_outputs(const Product<T>& product, const Epilogue<Tile>& epilogue,
                                              const Corner& corner, int token, int row, float (&values)[TOKENS][8],
                                              Sums sums) {
    const auto scales = *reinterpret_cast<const EightOf<float>*>(epilogue.weight_scales + row);
    UNROLL for (int i = 0; i < TOKENS; ++i) {
        const float scale = epilogue.x_scales[token + STEP * i];
        const EightOf<int> whole = sums(i);
        UNROLL for (int j = 0; j < 8; ++j) {
            const float scaled = __fadd_rn(__fmul_rn(static_cast<float>(whole.values[j]), scale), values[i][j]);
            values[i][j] = __fmul_rn(scales.values[j], scaled);
        }
    }
    if (product.bias) {
        const auto biases = *reinterpret_cast<const EightOf<float>*>(epilogue.biases + row);
        UNROLL for (int i = 0; i < 8 * TOKENS; ++i) {
            values[i / 8][i % 8] = __fadd_rn(values[i / 8][i % 8], biases.values[i % 8]);
        }
    }
    activate(values, product.activation);
    const T* residual = product.residual;
    const bool are_words =
        product.out_width * sizeof(T) % 16 == 0 && is_aligned(product.out) && is_aligned(residual);
    const int valid_rows = product.rows - corner.row - row;
    UNROLL for (int i = 0; i < TOKENS; ++i) {
        if (corner.token + token + STEP * i < product.tokens) {
            const size_t at =
                static_cast<size_t>(corner.token + token + STEP * i) * product.out_width + corner.row + row;
            if (are_words && valid_rows >= 8) {
                write_token<true>(values[i], residual ? residual + at : nullptr, product.out + at, 8);
            } else {
                write_token<false>(values[i], residual ? residual + at : nullptr, product.out + at, valid_rows);
            }
        }
    }
}

}  // namespace tile
