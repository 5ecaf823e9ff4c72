// Steps 2 to 6 of LLM.int8() for one token, as in decode, and the layer norm before them, in one launch: as fast as the
// weight comes from memory. `int8_matmul_few` gives the same bits for any columns.
//
// Every warp has two pieces of a row, of up to 2048 columns each, on their way to its registers: 64 KB a multiprocessor,
// where a latency of 1 us at 4.2 TB/s takes 32. The first are asked for before x is there, so that the memory works
// while x is normed and quantised; where earlier kernels may still run (programmatic dependent launch), before they end.
// A lane multiplies the same columns of every row, and holds their codes of x in registers: 512 codes take four dot
// products of four, and no read of shared memory.
//
// Launch: grid (min(rows, multiprocessors)), any other is right too; a block has at most 2048 rows, one after the other.
// Block: 512 threads. `cols` is a multiple of 512 up to 16384; x, the weight and the norm's vectors begin at multiples
// of 16 bytes. Dynamic shared memory: cols + cols / 8 bytes.

#include "int8_few.cuh"

namespace one {

using few::Coder, few::FourOf, few::LISTED, few::Quad, few::STEP;

constexpr int THREADS = 512, WARPS = THREADS / WARP;
constexpr int MOST_ROWS = 2048, MOST_COLS = 16384;
/// The most steps of a piece.
constexpr int STEPS = 4;
/// Four values each that a thread holds of x.
constexpr int QUADS = MOST_COLS / (4 * THREADS);
/// Of the listed outlier columns a thread asks for the codes of its first row before the sums are there.
constexpr int ASKED = 2;

/// What all kernels take, for out (rows).
template <class T>
struct Layer {
    /// (rows, cols)
    const int8_t* weight;
    /// (rows)
    const float* scales;
    /// (rows) or null
    const void* bias;
    int bias_dtype;
    /// (rows) or null
    const T* residual;
    T* out;
    int rows, cols, activation;
};

/// What a block keeps besides codes and outlier bits.
struct Kept {
    /// Of its rows.
    int sums[MOST_ROWS];
    /// The first outlier columns, ascending, what x has there, and how many there are: more than LISTED says that some
    /// are not in the list.
    int columns[LISTED];
    float values[LISTED];
    int count;
    /// Of 128 columns each.
    float partial[2][MOST_COLS / 128];
    unsigned maxima[WARPS];
};

template <class T>
__device__ __forceinline__ Quad load_quad(const T* values) {
    const FourOf<T> four = *reinterpret_cast<const FourOf<T>*>(values);
    Quad quad;
    UNROLL for (int i = 0; i < 4; ++i) quad.values[i] = to_float(four.values[i]);
    return quad;
}

__device__ __forceinline__ Quad load_vector_quad(const void* values, int dtype, int col) {
    if (dtype == 0) return load_quad(static_cast<const float*>(values) + col);
    if (dtype == 1) return load_quad(static_cast<const __half*>(values) + col);
    return load_quad(static_cast<const __nv_bfloat16*>(values) + col);
}

/// What a thread holds of x (cols): four values number i are those from column 4 * (THREADS * i + thread) on.
template <class T>
struct Held {
    FourOf<T> fours[QUADS];

    /// Calls `f(values, column)` for all of them, and keeps what it makes of the values.
    template <class F>
    __device__ __forceinline__ void each(int cols, F f) {
        UNROLL for (int i = 0; i < QUADS; ++i) {
            const int col = 4 * (THREADS * i + static_cast<int>(threadIdx.x));
            if (col >= cols) continue;
            Quad quad;
            UNROLL for (int j = 0; j < 4; ++j) quad.values[j] = to_float(fours[i].values[j]);
            f(quad, col);
            UNROLL for (int j = 0; j < 4; ++j) fours[i].values[j] = from_float<T>(quad.values[j]);
        }
    }
};

/// x as it is.
template <class T>
struct Plain {
    const T* x;

    __device__ __forceinline__ void load(Held<T>& held, Kept&, int cols) const {
        UNROLL for (int i = 0; i < QUADS; ++i) {
            const int col = 4 * (THREADS * i + static_cast<int>(threadIdx.x));
            if (col < cols) held.fours[i] = *reinterpret_cast<const FourOf<T>*>(x + col);
        }
    }
    __device__ __forceinline__ float value(int col) const { return to_float(x[col]); }
};

/// The layer norm of x, rounded to T.
template <class T>
struct Normed {
    const T* x;
    const void* weight;
    int weight_dtype;
    const void* bias;
    int bias_dtype;
    float eps;
    float mean, inverse;

    /// The sum over x of `term`, in the order of `int8_matmul_few`: by 128 columns, each in a place of `sums`.
    template <class Term>
    __device__ __forceinline__ float sum(Held<T>& held, float* sums, int cols, Term term) const {
        const int lane = threadIdx.x % WARP;
        // A warp's columns are there or not together.
        held.each(cols, [&](Quad& quad, int col) {
            float sum = 0.f;
            UNROLL for (int i = 0; i < 4; ++i) sum += term(quad.values[i]);
            sum = warp_sum(sum);
            if (lane == 0) sums[col / 128] = sum;
        });
        __syncthreads();
        float sum = 0.f;
        for (int piece = lane; piece < cols / 128; piece += WARP) sum += sums[piece];
        return warp_sum(sum);
    }

    __device__ __forceinline__ void load(Held<T>& held, Kept& kept, int cols) {
        Plain<T>{x}.load(held, kept, cols);
        const float count = static_cast<float>(cols);
        mean = __fdiv_rn(sum(held, kept.partial[0], cols, [](float x) { return x; }), count);
        const auto square = [this](float x) { return __fmul_rn(__fadd_rn(x, -mean), __fadd_rn(x, -mean)); };
        const float variance = __fdiv_rn(sum(held, kept.partial[1], cols, square), count);
        inverse = __fdiv_rn(1.f, __fsqrt_rn(__fadd_rn(variance, eps)));
        held.each(cols, [&](Quad& quad, int col) {
            const Quad weights = load_vector_quad(weight, weight_dtype, col);
            Quad biases = {};
            if (bias) biases = load_vector_quad(bias, bias_dtype, col);
            UNROLL for (int i = 0; i < 4; ++i) {
                quad.values[i] = few::normed<T>(quad.values[i], mean, inverse, weights.values[i], biases.values[i]);
            }
        });
    }
    __device__ __forceinline__ float value(int col) const {
        return few::normed<T>(to_float(x[col]), mean, inverse, vector_value(weight, weight_dtype, col),
                              bias ? vector_value(bias, bias_dtype, col) : 0.f);
    }
};

/// Lists the outlier columns of bits (words), and what x has there; for one warp.
template <class X>
__device__ __forceinline__ void list_outliers(const X& x, Kept& kept, const unsigned* bits, int words) {
    const int lane = threadIdx.x % WARP;
    int count = 0;
    _Pragma("unroll 1") for (int base = 0; base < words && count <= LISTED; base += WARP) {
        const unsigned mask = base + lane < words ? bits[base + lane] : 0;
        for (unsigned with = __ballot_sync(ALL_LANES, mask != 0); with; with &= with - 1) {
            const int word = __ffs(static_cast<int>(with)) - 1;
            const unsigned columns = __shfl_sync(ALL_LANES, mask, word);
            const int place = count + __popc(columns & ((1u << lane) - 1));
            if ((columns >> lane & 1) && place < LISTED) kept.columns[place] = 32 * (base + word) + lane;
            count += __popc(columns);
        }
    }
    if (lane == 0) kept.count = count;
    __syncwarp();
    if (lane < count) kept.values[lane] = x.value(kept.columns[lane]);
}

/// x quantised by the block, and its outlier columns listed: codes (cols), 0 in outlier columns, and bits (cols / 32) in
/// shared memory; gives the scale.
template <class T, class X>
__device__ __forceinline__ float quantize(X& x, Kept& kept, unsigned char* codes, unsigned* bits, int cols,
                                          float threshold) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int word = threadIdx.x; word < cols / 32; word += THREADS) bits[word] = 0;
    Held<T> held;
    x.load(held, kept, cols);
    __syncthreads();

    const unsigned limit = threshold > 0.f ? __float_as_uint(threshold) : 0xffffffffu;
    unsigned absmax_bits = 0;
    held.each(cols, [&](Quad& quad, int col) {
        unsigned outliers = 0;
        UNROLL for (int i = 0; i < 4; ++i) {
            const unsigned magnitude = magnitude_bits(quad.values[i]);
            absmax_bits = magnitude < limit ? max(absmax_bits, magnitude) : absmax_bits;
            outliers |= magnitude < limit ? 0u : 1u << i;
        }
        if (outliers) atomicOr(&bits[col / 32], outliers << col % 32);
    });
    absmax_bits = warp_max(absmax_bits);
    if (lane == 0) kept.maxima[warp] = absmax_bits;
    __syncthreads();

    absmax_bits = warp_max(kept.maxima[lane % WARPS]);
    const Coder coder(absmax_bits);
    held.each(cols, [&](Quad& quad, int col) {
        *reinterpret_cast<unsigned*>(codes + col) = coder.codes(quad, bits[col / 32] >> col % 32);
    });
    if (warp == WARPS - 1) list_outliers(x, kept, bits, cols / 32);
    __syncthreads();
    return coder.scale();
}

/// What a warp reads and multiplies: pieces of the block's rows, each a whole number of rows or a part of one.
struct Pieces {
    /// Parts of a row, rows of a piece, and pieces that warps work on at a time.
    int parts, rows, at_once;
    /// This warp's part of its rows: the first step, and how many.
    int first_step, steps;
    /// The first of its pieces.
    int first;

    __device__ __forceinline__ explicit Pieces(int cols) {
        const int all = cols / STEP, warp = threadIdx.x / WARP;
        parts = (all + STEPS - 1) / STEPS;
        rows = max(STEPS / all, 1);
        at_once = WARPS / parts;
        first = warp / parts;
        const int part = warp % parts;
        first_step = all * part / parts;
        steps = all * (part + 1) / parts - first_step;
    }
};

/// What the first output of a thread needs besides its sum, asked for before that is there.
template <class T>
struct Ahead {
    float scale, bias;
    T residual;
    int8_t codes[ASKED];
};

template <class T, class X>
__device__ __forceinline__ void int8_matmul(const Layer<T>& layer, X& x, float threshold) {
    __shared__ Kept kept;
    DYNAMIC_SHARED(dynamic);
    const int lane = threadIdx.x % WARP, cols = layer.cols;
    unsigned char* codes = dynamic;
    unsigned* bits = reinterpret_cast<unsigned*>(codes + cols);

    const unsigned least = layer.rows / gridDim.x, larger = layer.rows - least * gridDim.x;
    const int first_row = least * blockIdx.x + min(blockIdx.x, larger), rows = least + (blockIdx.x < larger ? 1 : 0);
    const int8_t* weight = layer.weight + static_cast<size_t>(first_row) * cols;
    const Pieces pieces(cols);
    // Warps beyond the last piece that is worked on at a time have none.
    const int end = pieces.first < pieces.at_once ? (rows + pieces.rows - 1) / pieces.rows : 0;

    const int steps = pieces.parts == 1 ? pieces.rows * pieces.steps : pieces.steps;
    // Of the lane: 16 columns of every step.
    const int8_t* own_codes = weight + pieces.first_step * STEP + lane * 16;
    const auto load = [&](int4(&loaded)[STEPS], int piece) {
        const int row = piece * pieces.rows;
        const int8_t* from = own_codes + static_cast<size_t>(row) * cols;
        // Where rows follow one another in a piece there may be fewer in the last.
        const int there = piece >= end ? 0 : pieces.parts > 1 ? steps : min(pieces.rows, rows - row) * pieces.steps;
        UNROLL for (int i = 0; i < STEPS; ++i) {
            loaded[i] = int4{0, 0, 0, 0};
            if (i < there) loaded[i] = load_streaming(from + i * STEP);
        }
    };
    // A weight is never written while there are products with it, so it need not be waited for.
    int4 even[STEPS], odd[STEPS];
    load(even, pieces.first);
    load(odd, pieces.first + pieces.at_once);
    if (pieces.parts > 1) {
        for (int row = threadIdx.x; row < rows; row += THREADS) kept.sums[row] = 0;
    }
    wait_for_earlier_kernels();
    const float x_scale = quantize<T>(x, kept, codes, bits, cols, threshold);

    const int own_row = first_row + threadIdx.x, listed = min(kept.count, LISTED);
    Ahead<T> ahead = {};
    if (static_cast<int>(threadIdx.x) < rows) {
        ahead.scale = layer.scales[own_row];
        if (layer.bias) ahead.bias = vector_value(layer.bias, layer.bias_dtype, own_row);
        if (layer.residual) ahead.residual = layer.residual[own_row];
        UNROLL for (int k = 0; k < ASKED; ++k) {
            if (k < listed) ahead.codes[k] = weight[static_cast<size_t>(threadIdx.x) * cols + kept.columns[k]];
        }
    }

    // Of step i of a piece: the lane's codes of x, and whether a row ends with it.
    int4 x_codes[STEPS];
    unsigned row_ends = 0;
    UNROLL for (int i = 0; i < STEPS; ++i) {
        const int step = pieces.first_step + (pieces.parts == 1 ? i % pieces.steps : i);
        x_codes[i] = {0, 0, 0, 0};
        if (i < steps) x_codes[i] = *reinterpret_cast<const int4*>(codes + step * STEP + lane * 16);
        row_ends |= (i + 1) % pieces.steps == 0 ? 1u << i : 0u;
    }
    const auto multiply = [&](const int4(&loaded)[STEPS], int piece) {
        int sum = 0, row = piece * pieces.rows;
        UNROLL for (int i = 0; i < STEPS; ++i) {
            if (i >= steps) continue;
            sum = __dp4a(loaded[i].x, x_codes[i].x, sum);
            sum = __dp4a(loaded[i].y, x_codes[i].y, sum);
            sum = __dp4a(loaded[i].z, x_codes[i].z, sum);
            sum = __dp4a(loaded[i].w, x_codes[i].w, sum);
            if (row_ends >> i & 1) {
                const int whole = warp_sum_of_ints(sum);
                if (lane == 0 && row < rows) {
                    if (pieces.parts > 1) {
                        atomicAdd(&kept.sums[row], whole);
                    } else {
                        kept.sums[row] = whole;
                    }
                }
                sum = 0;
                ++row;
            }
        }
    };
    _Pragma("unroll 1") for (int piece = pieces.first; piece < end; piece += 2 * pieces.at_once) {
        multiply(even, piece);
        load(even, piece + 2 * pieces.at_once);
        const int next = piece + pieces.at_once;
        if (next < end) multiply(odd, next);
        load(odd, next + 2 * pieces.at_once);
    }
    __syncthreads();

    _Pragma("unroll 1") for (int own = threadIdx.x; own < rows; own += THREADS) {
        const int row = first_row + own;
        const int8_t* own_weight = weight + static_cast<size_t>(own) * cols;
        const bool is_first = own == static_cast<int>(threadIdx.x);
        float value = 0.f;
        UNROLL for (int k = 0; k < ASKED; ++k) {
            if (k >= listed) continue;
            const int code = is_first ? ahead.codes[k] : own_weight[kept.columns[k]];
            value = __fadd_rn(value, __fmul_rn(kept.values[k], static_cast<float>(code)));
        }
        for (int k = ASKED; k < listed; ++k) {
            const int code = own_weight[kept.columns[k]];
            value = __fadd_rn(value, __fmul_rn(kept.values[k], static_cast<float>(code)));
        }
        if (kept.count > LISTED) {
            few::each_unlisted(bits, cols / 32, kept.columns[LISTED - 1], [&](int col) {
                value = __fadd_rn(value, __fmul_rn(x.value(col), static_cast<float>(own_weight[col])));
            });
        }
        value = __fadd_rn(__fmul_rn(static_cast<float>(kept.sums[own]), x_scale), value);
        value = __fmul_rn(is_first ? ahead.scale : layer.scales[row], value);
        if (layer.bias) {
            value = __fadd_rn(value, is_first ? ahead.bias : vector_value(layer.bias, layer.bias_dtype, row));
        }
        value = activated(value, layer.activation);
        if (layer.residual) value = __fadd_rn(value, to_float(is_first ? ahead.residual : layer.residual[row]));
        layer.out[row] = from_float<T>(value);
    }
}

}  // namespace one

// out (rows) for x (cols) and a weight (rows, cols).
#define INT8_MATMUL_ONE(suffix, T)                                                                                    \
    extern "C" __global__ void __launch_bounds__(one::THREADS, 1) int8_matmul_one_##suffix(                           \
        const T* x, const int8_t* weight, const float* weight_scales, const void* bias, int bias_dtype,               \
        const T* residual, T* out, int rows, int cols, float threshold, int activation) {                             \
        const one::Layer<T> layer = {weight, weight_scales, bias, bias_dtype, residual, out, rows, cols, activation}; \
        one::Plain<T> input = {x};                                                                                    \
        one::int8_matmul(layer, input, threshold);                                                                    \
    }
FOR_EACH_FLOAT(INT8_MATMUL_ONE)

// The same for the layer norm of x, rounded to T.
#define INT8_MATMUL_ONE_NORMED(suffix, T)                                                                             \
    extern "C" __global__ void __launch_bounds__(one::THREADS, 1) int8_matmul_one_normed_##suffix(                    \
        const T* x, const void* norm_weight, int norm_weight_dtype, const void* norm_bias, int norm_bias_dtype,       \
        float eps, const int8_t* weight, const float* weight_scales, const void* bias, int bias_dtype,                \
        const T* residual, T* out, int rows, int cols, float threshold, int activation) {                             \
        const one::Layer<T> layer = {weight, weight_scales, bias, bias_dtype, residual, out, rows, cols, activation}; \
        one::Normed<T> input = {x, norm_weight, norm_weight_dtype, norm_bias, norm_bias_dtype, eps, 0.f, 0.f};        \
        one::int8_matmul(layer, input, threshold);                                                                    \
    }
FOR_EACH_FLOAT(INT8_MATMUL_ONE_NORMED)
