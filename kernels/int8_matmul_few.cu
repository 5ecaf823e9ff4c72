// Steps 2 to 6 of LLM.int8() for few tokens, as in decode: as fast as the weight comes from memory. One token of most
// models goes by `int8_matmul_one`.
//
// The reckoning, for an H100: 3.35 TB/s times a latency of 0.7 to 1 us are 2.3 to 3.4 MB that must be under way at
// any time, 18 to 26 KB a multiprocessor. One block of 32 warps a multiprocessor, six loads of 16 bytes a lane, has
// 96 KB under way (four loads from two tokens on: 64 KB; the 16 warps of the variant with codes have 32 to 64 KB).
// A block is alone on its multiprocessor and quantises x once for it; before that it asks for the first 128 bytes a
// thread of its rows, so that the memory works meanwhile: of a weight (4096, 4096) these are all there are. The
// memory takes about 35 cycles for a multiprocessor's share of one load by a warp; x from shared memory takes 4 of
// them a token, or 2 where two rows share it, and the dot products take 2 a token.
//
// Launch: grid (min(rows, multiprocessors)), any other is right too: a block has the rows from rows * block / grid
// on. Where a block has fewer rows than warps, several warps share the columns of a row.

#include "int8_few.cuh"

namespace few {

/// Threads of a block: any power of two from 256 to these.
constexpr unsigned FUSED_THREADS = 1024;
constexpr unsigned CODES_THREADS = 512;

/// What all variants take: the weight, and what follows the sums.
template <class T>
struct Layer {
    /// (rows, cols)
    const int8_t* weight;
    /// (rows)
    const float* scales;
    /// (rows) or null
    const void* bias;
    int bias_dtype;
    /// (tokens, rows), `out_width` from token to token, or null
    const T* residual;
    T* out;
    int tokens, rows, cols, out_width, tokens_per_sequence, activation;
};

/// What a block keeps besides codes and outlier bits.
template <int TOKENS, int SUMS>
struct Kept {
    /// Of warps that share rows.
    int sums[SUMS];
    /// The first outlier columns of any sequence, ascending.
    int columns[LISTED];
    /// What tokens have there, and 0 where the column is none of the token's sequence: it changes no sum.
    float values[TOKENS][LISTED];
    int codes[TOKENS][LISTED];
    /// How many columns are listed; more than LISTED says that there are others.
    int listed;
    float x_scales[TOKENS], means[TOKENS], inverses[TOKENS];
    unsigned maxima[WARP];
};

/// Whether rows (.., cols) can be read four values at a time.
template <class T>
__device__ __forceinline__ bool is_aligned(const T* rows, int cols) {
    return cols % 4 == 0 && reinterpret_cast<uintptr_t>(rows) % sizeof(FourOf<T>) == 0;
}

/// Four values of a row (cols) from `col` on, zeros beyond the row's end.
template <class T>
__device__ __forceinline__ Quad load_quad(const T* row, int col, int cols, bool aligned) {
    Quad quad = {};
    if (aligned) {
        const FourOf<T> four = *reinterpret_cast<const FourOf<T>*>(row + col);
        UNROLL for (int i = 0; i < 4; ++i) quad.values[i] = to_float(four.values[i]);
    } else {
        UNROLL for (int i = 0; i < 4; ++i) {
            if (col + i < cols) quad.values[i] = to_float(row[col + i]);
        }
    }
    return quad;
}

/// A vector's value as it is in memory: nothing waits for it until it is made a float.
__device__ __forceinline__ unsigned raw_vector_value(const void* values, int dtype, int index) {
    return dtype == 0 ? static_cast<const unsigned*>(values)[index] : static_cast<const uint16_t*>(values)[index];
}
__device__ __forceinline__ float float_of_raw(unsigned raw, int dtype) {
    const uint16_t narrow = static_cast<uint16_t>(raw);
    const void* at = dtype == 0 ? static_cast<const void*>(&raw) : &narrow;
    return vector_value(at, dtype, 0);
}

__device__ __forceinline__ Quad load_vector_quad(const void* values, int dtype, int col, int cols) {
    if (dtype == 0) {
        const float* floats = static_cast<const float*>(values);
        return load_quad(floats, col, cols, is_aligned(floats, cols));
    }
    FourOf<uint16_t> four = {};
    const uint16_t* narrow = static_cast<const uint16_t*>(values);
    if (is_aligned(narrow, cols)) {
        four = *reinterpret_cast<const FourOf<uint16_t>*>(narrow + col);
    } else {
        UNROLL for (int i = 0; i < 4; ++i) {
            if (col + i < cols) four.values[i] = narrow[col + i];
        }
    }
    Quad quad;
    UNROLL for (int i = 0; i < 4; ++i) quad.values[i] = float_of_raw(four.values[i], dtype);
    return quad;
}

// Where x comes from.

/// x (tokens, cols) as it is.
template <class T>
struct Plain {
    const T* x;
    int cols;
    bool aligned;

    __device__ Plain(const T* x, int cols) : x(x), cols(cols), aligned(is_aligned(x, cols)) {}

    template <class K>
    __device__ __forceinline__ void prepare(K&, float*, int, int, int, int) {}

    __device__ __forceinline__ Quad quad(int token, int col) const {
        return load_quad(x + static_cast<size_t>(token) * cols, col, cols, aligned);
    }

    template <class K>
    __device__ __forceinline__ float value(const K&, int token, int col) const {
        return to_float(x[static_cast<size_t>(token) * cols + col]);
    }
};

/// The layer norm of x (tokens, cols), rounded to T.
template <class T>
struct Normed {
    Plain<T> plain;
    const void* weight;
    int weight_dtype;
    const void* bias;
    int bias_dtype;
    float eps;
    /// Of the token that this warp quantises.
    float mean, inverse;

    __device__ Normed(const T* x, int cols, const void* weight, int weight_dtype, const void* bias, int bias_dtype,
                      float eps)
        : plain(x, cols), weight(weight), weight_dtype(weight_dtype), bias(bias), bias_dtype(bias_dtype), eps(eps),
          mean(0.f), inverse(0.f) {}

    /// The sum over a token's values of `term`. `sums` has a place for every 128 columns: they are added in one
    /// order however many warps a token has, so that what else is in a batch does not change it.
    template <class Term>
    __device__ __forceinline__ float sum(float* sums, int token, int part, int parts, bool is_there, Term term) const {
        const int lane = threadIdx.x % WARP, cols = plain.cols, pieces = (cols + 127) / 128;
        if (is_there) {
            _Pragma("unroll 1") for (int piece = part; piece < pieces; piece += parts) {
                const int col = 128 * piece + 4 * lane;
                float sum = 0.f;
                if (col < cols) {
                    const Quad quad = plain.quad(token, col);
                    UNROLL for (int i = 0; i < 4; ++i) sum += col + i < cols ? term(quad.values[i]) : 0.f;
                }
                sum = warp_sum(sum);
                if (lane == 0) sums[piece] = sum;
            }
        }
        __syncthreads();
        float sum = 0.f;
        if (is_there) {
            for (int piece = lane; piece < pieces; piece += WARP) sum += sums[piece];
        }
        return warp_sum(sum);
    }

    template <class K>
    __device__ __forceinline__ void prepare(K& kept, float* scratch, int tokens, int token, int part, int parts) {
        const int pieces = (plain.cols + 127) / 128;
        const bool is_there = token < tokens;
        const float count = static_cast<float>(plain.cols);
        float* sums = scratch + static_cast<size_t>(token) * pieces;
        mean = __fdiv_rn(sum(sums, token, part, parts, is_there, [](float x) { return x; }), count);
        sums += static_cast<size_t>(tokens) * pieces;
        const auto square = [this](float x) { return __fmul_rn(__fadd_rn(x, -mean), __fadd_rn(x, -mean)); };
        const float variance = __fdiv_rn(sum(sums, token, part, parts, is_there, square), count);
        inverse = __fdiv_rn(1.f, __fsqrt_rn(__fadd_rn(variance, eps)));
        if (is_there && part == 0 && threadIdx.x % WARP == 0) {
            kept.means[token] = mean;
            kept.inverses[token] = inverse;
        }
    }

    __device__ __forceinline__ Quad quad(int token, int col) const {
        const int cols = plain.cols;
        const Quad x = plain.quad(token, col), weights = load_vector_quad(weight, weight_dtype, col, cols);
        Quad biases = {};
        if (bias) biases = load_vector_quad(bias, bias_dtype, col, cols);
        Quad quad;
        UNROLL for (int i = 0; i < 4; ++i) {
            quad.values[i] =
                col + i < cols ? normed<T>(x.values[i], mean, inverse, weights.values[i], biases.values[i]) : 0.f;
        }
        return quad;
    }

    template <class K>
    __device__ __forceinline__ float value(const K& kept, int token, int col) const {
        return normed<T>(plain.value(kept, token, col), kept.means[token], kept.inverses[token],
                      vector_value(weight, weight_dtype, col), bias ? vector_value(bias, bias_dtype, col) : 0.f);
    }
};

/// Lists the outlier columns of bits (sequences, words), and what tokens have there; for one warp.
template <class K, class Value, class Code>
__device__ __forceinline__ void list_outliers(K& kept, const unsigned* bits, int words, int tokens,
                                              int tokens_per_sequence, Value value, Code code) {
    const int lane = threadIdx.x % WARP, sequences = (tokens + tokens_per_sequence - 1) / tokens_per_sequence;
    int count = 0;
    for (int base = 0; base < words && count <= LISTED; base += WARP) {
        unsigned mask = 0;
        if (base + lane < words) {
            for (int sequence = 0; sequence < sequences; ++sequence) mask |= bits[sequence * words + base + lane];
        }
        for (unsigned with = __ballot_sync(ALL_LANES, mask != 0); with; with &= with - 1) {
            const int word = __ffs(static_cast<int>(with)) - 1;
            const unsigned columns = __shfl_sync(ALL_LANES, mask, word);
            const int place = count + __popc(columns & ((1u << lane) - 1));
            if ((columns >> lane & 1) && place < LISTED) kept.columns[place] = 32 * (base + word) + lane;
            count += __popc(columns);
        }
    }
    if (lane == 0) kept.listed = count;
    __syncwarp();
    if (lane < count) {
        const int col = kept.columns[lane];
        for (int token = 0; token < tokens; ++token) {
            const bool own = bits[token / tokens_per_sequence * words + col / 32] >> col % 32 & 1;
            kept.values[token][lane] = own ? value(token, col) : 0.f;
            kept.codes[token][lane] = own ? code(token, col) : 0;
        }
    }
}

/// x quantised here, by all warps of the block.
template <class T, class X, class K>
struct Quantized {
    /// Codes have no part in outlier columns.
    static constexpr bool NEEDS_CORRECTION = false;
    X x;
    K& kept;
    /// Tokens that there is room for: 1, 2, 4 or 8.
    int places;
    /// (steps, places, STEP): neighbouring lanes read neighbouring bytes, tokens at fixed distances.
    unsigned char* codes;
    /// (sequences, words)
    unsigned* bits;
    float threshold;

    __device__ Quantized(const X& x, K& kept, unsigned char* dynamic, int tokens, int cols, float threshold)
        : x(x), kept(kept), places(tokens <= 2 ? tokens : tokens <= 4 ? 4 : 8), codes(dynamic),
          bits(reinterpret_cast<unsigned*>(dynamic + static_cast<size_t>((cols + STEP - 1) / STEP) * places * STEP)),
          threshold(threshold) {}

    __device__ __forceinline__ void prepare(const Layer<T>& layer) {
        const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        const int tokens = layer.tokens, cols = layer.cols, words = (cols + 31) / 32;
        // Every token has warps of its own.
        const int parts = warps / places, token = warp / parts, part = warp % parts;
        const int sequences = (tokens + layer.tokens_per_sequence - 1) / layer.tokens_per_sequence;
        for (int word = threadIdx.x; word < sequences * words; word += blockDim.x) bits[word] = 0;
        // The codes' place is free until the absmax is known.
        x.prepare(kept, reinterpret_cast<float*>(codes), tokens, token, part, parts);
        __syncthreads();

        const unsigned limit = threshold > 0.f ? __float_as_uint(threshold) : 0xffffffffu;
        unsigned* own_bits = bits + token / layer.tokens_per_sequence * words;
        unsigned absmax_bits = 0;
        if (token < tokens) {
            _Pragma("unroll 1") for (int quad = 32 * part + lane; 4 * quad < cols; quad += 32 * parts) {
                const Quad at = x.quad(token, 4 * quad);
                unsigned outliers = 0;
                UNROLL for (int i = 0; i < 4; ++i) {
                    const unsigned magnitude = magnitude_bits(at.values[i]);
                    absmax_bits = magnitude < limit ? max(absmax_bits, magnitude) : absmax_bits;
                    outliers |= magnitude < limit ? 0u : 1u << i;
                }
                if (outliers) atomicOr(&own_bits[quad / 8], outliers << quad % 8 * 4);
            }
        }
        absmax_bits = warp_max(absmax_bits);
        if (lane == 0) kept.maxima[warp] = absmax_bits;
        __syncthreads();

        if (token < tokens) {
            for (int other = 0; other < parts; ++other) {
                absmax_bits = max(absmax_bits, kept.maxima[token * parts + other]);
            }
            const Coder coder(absmax_bits);
            if (part == 0 && lane == 0) kept.x_scales[token] = coder.scale();
            _Pragma("unroll 1") for (int quad = 32 * part + lane; 4 * quad < cols; quad += 32 * parts) {
                const Quad at = x.quad(token, 4 * quad);
                const unsigned outliers = own_bits[quad / 8] >> quad % 8 * 4;
                const unsigned four = coder.codes(at, outliers);
                const int step = 4 * quad / STEP;
                *reinterpret_cast<unsigned*>(codes + (step * places + token) * STEP + 4 * quad % STEP) = four;
            }
        }
        if (warp == warps - 1) {
            const auto value = [this](int token, int col) { return x.value(kept, token, col); };
            list_outliers(kept, bits, words, tokens, layer.tokens_per_sequence, value, [](int, int) { return 0; });
        }
        __syncthreads();
    }

    /// This lane's 16 codes of a token. Tokens that are not there have any; nobody asks for their sums.
    template <int TOKENS, bool WIDE>
    __device__ __forceinline__ int4 sixteen(const Layer<T>&, int token, int step) const {
        const int from_step = WIDE ? TOKENS : places;
        return *reinterpret_cast<const int4*>(codes + (step * from_step + token) * STEP + threadIdx.x % WARP * 16);
    }
    __device__ __forceinline__ float value(int token, int col) const { return x.value(kept, token, col); }
    __device__ __forceinline__ int code(const Layer<T>&, int, int) const { return 0; }
};

/// 16 codes of a row, of which so many are left: zeros after them.
__device__ __forceinline__ int4 load_bytes(const int8_t* codes, int left) {
    int words[4];
    UNROLL for (int word = 0; word < 4; ++word) {
        unsigned four = 0;
        UNROLL for (int i = 4 * word; i < 4 * word + 4; ++i) {
            if (i < left) four |= static_cast<unsigned>(static_cast<uint8_t>(codes[i])) << i % 4 * 8;
        }
        words[word] = static_cast<int>(four);
    }
    return {words[0], words[1], words[2], words[3]};
}

/// Codes (tokens, cols) and scales (tokens) that `quantize_activations` made: the first cache keeps them.
template <class T, class K>
struct Codes {
    /// Outlier columns have codes where another token of the sequence has the outlier.
    static constexpr bool NEEDS_CORRECTION = true;
    const int8_t* codes;
    const float* scales;
    /// (sequences, words) or null
    const unsigned* bits;
    /// (tokens, cols)
    const T* x;
    int cols;
    K& kept;

    __device__ __forceinline__ void prepare(const Layer<T>& layer) const {
        const int thread = threadIdx.x;
        if (thread < layer.tokens) kept.x_scales[thread] = scales[thread];
        if (thread / WARP == blockDim.x / WARP - 1) {
            if (bits) {
                const auto value = [this](int token, int col) { return this->value(token, col); };
                const auto code = [this, &layer](int token, int col) { return this->code(layer, token, col); };
                list_outliers(kept, bits, (cols + 31) / 32, layer.tokens, layer.tokens_per_sequence, value, code);
            } else if (thread % WARP == 0) {
                kept.listed = 0;
            }
        }
        __syncthreads();
    }

    template <int TOKENS, bool WIDE>
    __device__ __forceinline__ int4 sixteen(const Layer<T>& layer, int token, int step) const {
        const int col = step * STEP + threadIdx.x % WARP * 16;
        if (!WIDE) return load_bytes(codes + token * cols + min(col, cols), cols - col);
        const bool is_there = token < layer.tokens && col < cols;
        return is_there ? *reinterpret_cast<const int4*>(codes + (token * cols + col)) : int4{0, 0, 0, 0};
    }
    __device__ __forceinline__ float value(int token, int col) const {
        return to_float(x[static_cast<size_t>(token) * cols + col]);
    }
    __device__ __forceinline__ int code(const Layer<T>&, int token, int col) const {
        return codes[static_cast<size_t>(token) * cols + col];
    }
};

/// What an output needs besides its sum, asked for before that is there: ROWS * TOKENS outputs a warp.
template <class T, int ROWS, int OUTPUTS>
struct Ahead {
    float scales[OUTPUTS];
    unsigned biases[OUTPUTS];
    T residuals[OUTPUTS];
    /// The weight's codes in the listed outlier column of this lane's number.
    int outliers[ROWS];
};

/// The rows (first, end) of this block.
template <class T>
__device__ __forceinline__ int2 rows_of_block(const Layer<T>& layer) {
    const long long rows = layer.rows;
    return {static_cast<int>(rows * blockIdx.x / gridDim.x), static_cast<int>(rows * (blockIdx.x + 1) / gridDim.x)};
}

/// Asks for the beginning of the block's rows, 128 bytes a thread. Then what follows may depend on earlier kernels.
template <class T>
__device__ __forceinline__ void begin(const Layer<T>& layer) {
    constexpr size_t SECTOR = 32;
    const int2 rows = rows_of_block(layer);
    const size_t bytes = static_cast<size_t>(rows.y - rows.x) * layer.cols;
    const int8_t* codes = layer.weight + static_cast<size_t>(rows.x) * layer.cols;
    UNROLL for (int i = 0; i < 4; ++i) {
        const size_t at = (i * blockDim.x + threadIdx.x) * SECTOR;
        if (at < bytes) prefetch(codes + at);
    }
    wait_for_earlier_kernels();
}

/// The block's rows, ROWS at a time a warp, for TOKENS tokens from `first_token` on, of which some may not be
/// there; BATCH loads of each row are under way. WIDE: rows of the weight begin at multiples of 16 bytes.
template <int TOKENS, int ROWS, int BATCH, bool WIDE, class T, class X>
__device__ __forceinline__ void multiply(const Layer<T>& layer, const X& x, int first_token) {
    constexpr int OUTPUTS = (ROWS * TOKENS + 31) / 32;
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int cols = layer.cols, first_row = rows_of_block(layer).x, end_row = rows_of_block(layer).y;
    const int groups = (end_row - first_row + ROWS - 1) / ROWS, steps = (cols + STEP - 1) / STEP;
    int parts = 1;
    while (2 * parts * groups <= warps && 2 * parts <= steps && 2 * parts <= warps) parts *= 2;
    // This warp's first rows are those of `slot`; of each it has the steps of `part`. Where warps share rows there
    // are no more groups than slots, and every warp has one, if of no rows.
    const int part = warp % parts, slot = warp / parts, slots = warps / parts;
    const int end_group = parts > 1 ? slots : groups;
    const int first_step = steps * part / parts, end_step = steps * (part + 1) / parts;
    const int end_col = min(end_step * STEP, cols);

    int4 loaded[ROWS][BATCH];
    const auto load = [&](int group, int step) {
        UNROLL for (int j = 0; j < ROWS; ++j) {
            const int row = first_row + group * ROWS + j, col = step * STEP + lane * 16;
            const int8_t* codes = layer.weight + static_cast<size_t>(row) * cols + col;
            UNROLL for (int i = 0; i < BATCH; ++i) {
                loaded[j][i] = int4{0, 0, 0, 0};
                if (row < end_row && col + i * STEP < end_col) {
                    loaded[j][i] = WIDE ? load_streaming(codes + i * STEP)
                                        : load_bytes(codes + i * STEP, end_col - col - i * STEP);
                }
            }
        }
    };

    // Of a group's outputs, number 32 * i + lane is that of row number / TOKENS and token number % TOKENS.
    const int token = first_token + lane % TOKENS;
    const auto row_of = [&](int group, int i) { return first_row + group * ROWS + (lane + 32 * i) / TOKENS; };
    const auto is_output = [&](int group, int i) {
        return lane + 32 * i < ROWS * TOKENS && token < layer.tokens && row_of(group, i) < end_row;
    };
    const auto place_of = [&](int group, int i) {
        return static_cast<size_t>(token) * layer.out_width + row_of(group, i);
    };
    Ahead<T, ROWS, OUTPUTS> ahead = {};
    const auto ask = [&](int group) {
        UNROLL for (int i = 0; i < OUTPUTS; ++i) {
            if (!is_output(group, i)) continue;
            ahead.scales[i] = layer.scales[row_of(group, i)];
            if (layer.bias) ahead.biases[i] = raw_vector_value(layer.bias, layer.bias_dtype, row_of(group, i));
            if (layer.residual) ahead.residuals[i] = layer.residual[place_of(group, i)];
        }
        UNROLL for (int j = 0; j < ROWS; ++j) {
            const int row = first_row + group * ROWS + j;
            if (lane < x.kept.listed && row < end_row) {
                ahead.outliers[j] = layer.weight[static_cast<size_t>(row) * cols + x.kept.columns[lane]];
            }
        }
    };

    int group = slot, step = first_step;
    if (group < end_group) {
        load(group, step);
        ask(group);
    }
    int sums[ROWS][TOKENS] = {};
    while (group < end_group) {
        UNROLL for (int i = 0; i < BATCH; ++i) {
            if (step + i >= end_step) continue;
            UNROLL for (int t = 0; t < TOKENS; ++t) {
                const int4 codes = x.template sixteen<TOKENS, WIDE>(layer, first_token + t, step + i);
                UNROLL for (int j = 0; j < ROWS; ++j) {
                    sums[j][t] = __dp4a(loaded[j][i].x, codes.x, sums[j][t]);
                    sums[j][t] = __dp4a(loaded[j][i].y, codes.y, sums[j][t]);
                    sums[j][t] = __dp4a(loaded[j][i].z, codes.z, sums[j][t]);
                    sums[j][t] = __dp4a(loaded[j][i].w, codes.w, sums[j][t]);
                }
            }
        }
        const int done = group;
        step += BATCH;
        const bool is_end = step >= end_step;
        if (is_end) {
            group += slots;
            step = first_step;
        }
        if (group < end_group) load(group, step);
        if (!is_end) continue;

        int own_sums[OUTPUTS] = {};
        UNROLL for (int number = 0; number < ROWS * TOKENS; ++number) {
            const int sum = warp_sum_of_ints(sums[number / TOKENS][number % TOKENS]);
            if (lane == number % 32) own_sums[number / 32] = sum;
            sums[number / TOKENS][number % TOKENS] = 0;
        }
        if (parts > 1) {
            UNROLL for (int i = 0; i < OUTPUTS; ++i) {
                if (lane + 32 * i < ROWS * TOKENS) x.kept.sums[warp * ROWS * TOKENS + lane + 32 * i] = own_sums[i];
            }
            __syncthreads();
            if (part != 0) break;
            for (int other = warp + 1; other < warp + parts; ++other) {
                UNROLL for (int i = 0; i < OUTPUTS; ++i) {
                    const int output = lane + 32 * i;
                    if (output < ROWS * TOKENS) own_sums[i] += x.kept.sums[other * ROWS * TOKENS + output];
                }
            }
        }

        const int listed = min(x.kept.listed, LISTED);
        unsigned outliers = 0;
        UNROLL for (int j = 0; j < ROWS; ++j) outliers |= (static_cast<unsigned>(ahead.outliers[j]) & 0xffu) << 8 * j;
        UNROLL for (int i = 0; i < OUTPUTS; ++i) {
            const int row = row_of(done, i), shift = (lane + 32 * i) / TOKENS % ROWS * 8;
            float value = 0.f;
            for (int k = 0; k < listed; ++k) {
                const int code = static_cast<int8_t>(__shfl_sync(ALL_LANES, outliers, k) >> shift);
                // Lanes without an output show their codes to others all the same.
                const int any_token = min(token, layer.tokens - 1);
                value = __fadd_rn(value, __fmul_rn(x.kept.values[any_token][k], static_cast<float>(code)));
                if (X::NEEDS_CORRECTION) own_sums[i] -= x.kept.codes[any_token][k] * code;
            }
            if (!is_output(done, i)) continue;
            if (x.kept.listed > LISTED) {
                const int words = (cols + 31) / 32;
                const unsigned* bits = x.bits + token / layer.tokens_per_sequence * words;
                each_unlisted(bits, words, x.kept.columns[LISTED - 1], [&](int col) {
                    const int code = layer.weight[static_cast<size_t>(row) * cols + col];
                    value = __fadd_rn(value, __fmul_rn(x.value(token, col), static_cast<float>(code)));
                    if (X::NEEDS_CORRECTION) own_sums[i] -= x.code(layer, token, col) * code;
                });
            }
            value = __fadd_rn(__fmul_rn(static_cast<float>(own_sums[i]), x.kept.x_scales[token]), value);
            value = __fmul_rn(ahead.scales[i], value);
            if (layer.bias) value = __fadd_rn(value, float_of_raw(ahead.biases[i], layer.bias_dtype));
            value = activated(value, layer.activation);
            if (layer.residual) value = __fadd_rn(value, to_float(ahead.residuals[i]));
            layer.out[place_of(done, i)] = from_float<T>(value);
        }
        if (group < end_group) ask(group);
    }
}

/// Widths that are no multiple of 16: a token at a time.
template <class T, class X>
__device__ __forceinline__ void multiply_narrow(const Layer<T>& layer, const X& x) {
    for (int token = 0; token < layer.tokens; ++token) {
        multiply<1, 1, 1, false>(layer, x, token);
        __syncthreads();
    }
}

template <class T>
__device__ __forceinline__ bool is_wide(const Layer<T>& layer) {
    return (reinterpret_cast<uintptr_t>(layer.weight) | layer.cols) % 16 == 0;
}

using FusedKept = Kept<8, FUSED_THREADS / WARP * 16>;
using CodesKept = Kept<16, CODES_THREADS / WARP * 64>;

template <class T, class X>
__device__ __forceinline__ void fused(const Layer<T>& layer, const X& x, float threshold) {
    __shared__ FusedKept kept;
    DYNAMIC_SHARED(dynamic);
    begin(layer);
    Quantized<T, X, FusedKept> input(x, kept, dynamic, layer.tokens, layer.cols, threshold);
    input.prepare(layer);
    if (!is_wide(layer)) {
        multiply_narrow(layer, input);
    } else if (input.places == 1) {
        multiply<1, 1, 6, true>(layer, input, 0);
    } else if (input.places == 2) {
        multiply<2, 2, 2, true>(layer, input, 0);
    } else if (input.places == 4) {
        multiply<4, 1, 4, true>(layer, input, 0);
    } else {
        multiply<8, 2, 2, true>(layer, input, 0);
    }
}

template <class T>
__device__ __forceinline__ void from_codes(const Layer<T>& layer, const int8_t* codes, const float* x_scales,
                                           const unsigned* outlier_bits, const T* x) {
    __shared__ CodesKept kept;
    begin(layer);
    const Codes<T, CodesKept> input = {codes, x_scales, outlier_bits, x, layer.cols, kept};
    input.prepare(layer);
    if (!is_wide(layer) || reinterpret_cast<uintptr_t>(codes) % 16 != 0) {
        multiply_narrow(layer, input);
    } else if (layer.tokens == 1) {
        multiply<1, 1, 8, true>(layer, input, 0);
    } else if (layer.tokens == 2) {
        multiply<2, 1, 8, true>(layer, input, 0);
    } else if (layer.tokens <= 4) {
        multiply<4, 2, 4, true>(layer, input, 0);
    } else if (layer.tokens <= 8) {
        multiply<8, 4, 2, true>(layer, input, 0);
    } else {
        multiply<16, 2, 2, true>(layer, input, 0);
    }
}

}  // namespace few

// out (tokens, rows) for x (tokens, cols) and a weight (rows, cols), up to 8 tokens. Block: 1024 threads. Dynamic
// shared memory: P * ceil(cols / 512) * 512 + sequences * ceil(cols / 32) * 4 bytes, P the power of two from
// `tokens` on and sequences = ceil(tokens / tokens_per_sequence); where it is more than 43 KB, take the variant
// with codes (what a block has beyond that is static).
#define INT8_MATMUL_FEW(suffix, T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(few::FUSED_THREADS, 1) int8_matmul_few_##suffix(                      \
        const T* x, const int8_t* weight, const float* weight_scales, const void* bias, int bias_dtype,                \
        const T* residual, T* out, int tokens, int rows, int cols, int out_width, int tokens_per_sequence,             \
        float threshold, int activation) {                                                                             \
        const few::Layer<T> layer = {weight, weight_scales, bias,      bias_dtype,          residual,  out, tokens,    \
                                     rows,   cols,          out_width, tokens_per_sequence, activation};               \
        few::fused(layer, few::Plain<T>(x, cols), threshold);                                                          \
    }
FOR_EACH_FLOAT(INT8_MATMUL_FEW)

// The same for the layer norm of x, rounded to T; launched as that is.
#define INT8_MATMUL_FEW_NORMED(suffix, T)                                                                              \
    extern "C" __global__ void __launch_bounds__(few::FUSED_THREADS, 1) int8_matmul_few_normed_##suffix(               \
        const T* x, const void* norm_weight, int norm_weight_dtype, const void* norm_bias, int norm_bias_dtype,        \
        float eps, const int8_t* weight, const float* weight_scales, const void* bias, int bias_dtype,                 \
        const T* residual, T* out, int tokens, int rows, int cols, int out_width, int tokens_per_sequence,             \
        float threshold, int activation) {                                                                             \
        const few::Layer<T> layer = {weight, weight_scales, bias,      bias_dtype,          residual,  out, tokens,    \
                                     rows,   cols,          out_width, tokens_per_sequence, activation};               \
        const few::Normed<T> normed(x, cols, norm_weight, norm_weight_dtype, norm_bias, norm_bias_dtype, eps);         \
        few::fused(layer, normed, threshold);                                                                          \
    }
FOR_EACH_FLOAT(INT8_MATMUL_FEW_NORMED)

// The same from what `quantize_activations` made of x, up to 16 tokens. Block: 512 threads; no dynamic shared memory.
#define INT8_MATMUL_FEW_CODES(suffix, T)                                                                               \
    extern "C" __global__ void __launch_bounds__(few::CODES_THREADS, 1) int8_matmul_few_codes_##suffix(                \
        const int8_t* codes, const float* x_scales, const unsigned* outlier_bits, const T* x, const int8_t* weight,    \
        const float* weight_scales, const void* bias, int bias_dtype, const T* residual, T* out, int tokens, int rows, \
        int cols, int out_width, int tokens_per_sequence, int activation) {                                            \
        const few::Layer<T> layer = {weight, weight_scales, bias,      bias_dtype,          residual,  out, tokens,    \
                                     rows,   cols,          out_width, tokens_per_sequence, activation};               \
        few::from_codes(layer, codes, x_scales, outlier_bits, x);                                                      \
    }
FOR_EACH_FLOAT(INT8_MATMUL_FEW_CODES)
