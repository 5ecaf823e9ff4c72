// Attention of many queries over a cache in f16, by tensor cores and without a matrix of scores in memory
// (Dao et al. 2022, arXiv 2205.14135; the way of its successor, arXiv 2307.08691).
//
// A block takes 64 queries of a head, a warp 16 of them, whose fragments stay in registers; keys and values come
// in tiles of 64. While a tile's scores are worked out its values are copied, and while these are summed up the next
// tile's keys. What a warp has as sums of the first product is what it needs as a factor of the second.

#include "attention.cuh"

constexpr int PROMPT_THREADS = 128;
/// Queries of a block, and of a warp; keys of a tile.
constexpr int PROMPT_QUERIES = 64;
constexpr int WARP_QUERIES = 16;
constexpr int TILE_KEYS = 64;
constexpr float LOG2_E = 1.44269504f;

/// Pieces of 16 bytes from a row of a tile to the next: odd, so that eight rows lie in different banks.
template <int WIDTH>
constexpr int TILE_STRIDE = WIDTH / FEATURES | 1;

/// Rows (64, head_dim) from `first` on to a tile; zeros for features after them and for rows from `end` on.
template <int WIDTH>
__device__ __forceinline__ void copy_tile(int4* tile, const __half* rows, int first, int end, int head_dim) {
    constexpr int PIECES = WIDTH / FEATURES;
    UNROLL
    for (int i = 0; i < TILE_KEYS * PIECES / PROMPT_THREADS; ++i) {
        const int index = i * PROMPT_THREADS + static_cast<int>(threadIdx.x);
        const int row = index / PIECES, piece = index % PIECES;
        const bool is_there = first + row < end && piece * FEATURES < head_dim;
        const size_t place = static_cast<size_t>(first + row) * head_dim + piece * FEATURES;
        copy_async(tile + row * TILE_STRIDE<WIDTH> + piece, is_there ? rows + place : rows, is_there);
    }
    commit_copies();
}

/// Two values side by side.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
    T first, second;
};

/// softmax(scale * q k^T + slope * key position) v of queries (batch, heads, tokens, head_dim) of the given strides,
/// which follow `past` tokens, over the keys up to each one's own position, to out (batch, tokens, heads * head_dim).
/// `slopes` (heads) may be null. head_dim is a multiple of 8, at most `WIDTH`, which is the next of 32, 64, 80, 128.
/// Queries beyond f16 are brought to its end, as the cache's keys are. Other heads, and a cache in f32, are
/// `attention_step`'s for any number of tokens.
///
/// Grid (batch * heads, ceil(tokens / 64)), block 128, no dynamic shared memory.
template <int WIDTH, class T>
__device__ void attention_prompt(const T* queries, const __half* keys, const __half* values, const float* slopes,
                                 T* out, int heads, int tokens, int head_dim, int capacity, int past, float scale,
                                 long long batch_stride, long long head_stride, long long token_stride) {
    constexpr int STRIDE = TILE_STRIDE<WIDTH>;
    __shared__ int4 key_tile[TILE_KEYS * STRIDE], value_tile[TILE_KEYS * STRIDE];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = lane / 4, member = lane % 4;
    const int head = blockIdx.x % heads;
    const size_t entry = blockIdx.x / heads;
    // The last queries have the most keys: they come first.
    const int block_token = (gridDim.y - 1 - blockIdx.y) * PROMPT_QUERIES;
    const int warp_token = block_token + warp * WARP_QUERIES;
    const int end = past + min(block_token + PROMPT_QUERIES, tokens);
    keys += static_cast<size_t>(blockIdx.x) * capacity * head_dim;
    values += static_cast<size_t>(blockIdx.x) * capacity * head_dim;
    copy_tile<WIDTH>(key_tile, keys, 0, end, head_dim);

    // A lane's two queries are those of rows group and group + 8.
    queries += entry * batch_stride + head * head_stride;
    uint32_t query[WIDTH / 16][4];
    UNROLL
    for (int k = 0; k < WIDTH / 16; ++k) {
        UNROLL
        for (int i = 0; i < 4; ++i) {
            const int token = warp_token + group + 8 * (i % 2), feature = 16 * k + 8 * (i / 2) + 2 * member;
            query[k][i] = 0;
            if (token < tokens && feature < head_dim) {
                const T* place = queries + token * token_stride + feature;
                query[k][i] = pack_halves(within_half(to_float(place[0])), within_half(to_float(place[1])));
            }
        }
    }
    // Weights are powers of two.
    const float log2_scale = scale * LOG2_E, log2_slope = slopes ? slopes[head] * LOG2_E : 0.f;
    float max[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    float vector[WIDTH / 8][4] = {};

    for (int first = 0; first < end; first += TILE_KEYS) {
        // The keys are there, and all are done with the values before.
        wait_for_copies<0>();
        __syncthreads();
        copy_tile<WIDTH>(value_tile, values, first, end, head_dim);

        // Warps whose queries see nothing of the tile only copy.
        const bool sees = warp_token < tokens && first < past + warp_token + WARP_QUERIES;
        // What the lanes make of (16 queries, 64 keys): f32 sums as `mma_f16` leaves them, then f16 weights as it
        // takes them.
        uint32_t weights[TILE_KEYS / 16][4];
        if (sees) {
            float scores[TILE_KEYS / 8][4] = {};
            const int4* rows = key_tile + (lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2;
            UNROLL
            for (int k = 0; k < WIDTH / 16; ++k) {
                UNROLL
                for (int n = 0; n < TILE_KEYS / 16; ++n) {
                    uint32_t r[4];
                    load_matrices(r, rows + 16 * n * STRIDE + 2 * k);
                    mma_f16(scores[2 * n], query[k], {r[0], r[1]});
                    mma_f16(scores[2 * n + 1], query[k], {r[2], r[3]});
                }
            }
            // From a row's query to its first key of a tile.
            const int distance = first + 2 * member - (past + warp_token + group);
            UNROLL
            for (int n = 0; n < TILE_KEYS / 8; ++n) {
                UNROLL
                for (int i = 0; i < 4; ++i) scores[n][i] *= log2_scale;
            }
            if (slopes) {
                // What is constant over the keys changes no softmax: counted from near the query, here from that of
                // row group for both rows, the numbers stay small.
                const float start = distance;
                UNROLL
                for (int n = 0; n < TILE_KEYS / 8; ++n) {
                    UNROLL
                    for (int i = 0; i < 4; ++i) scores[n][i] += log2_slope * (start + (8 * n + i % 2));
                }
            }
            if (first + TILE_KEYS > past + warp_token + 1) {
                UNROLL
                for (int n = 0; n < TILE_KEYS / 8; ++n) {
                    UNROLL
                    for (int i = 0; i < 4; ++i) {
                        if (distance + 8 * n + i % 2 - 8 * (i / 2) > 0) scores[n][i] = -INFINITY;
                    }
                }
            }
            UNROLL
            for (int row = 0; row < 2; ++row) {
                // Every query sees the first key, so that the largest score is a number from the first tile on.
                float largest = max[row];
                UNROLL
                for (int n = 0; n < TILE_KEYS / 8; ++n) {
                    largest = fmaxf(largest, fmaxf(scores[n][2 * row], scores[n][2 * row + 1]));
                }
                largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
                largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
                const float shrink = exp2_approximate(max[row] - largest);
                max[row] = largest;
                sum[row] *= shrink;
                UNROLL
                for (int n = 0; n < WIDTH / 8; ++n) {
                    vector[n][2 * row] *= shrink;
                    vector[n][2 * row + 1] *= shrink;
                }
                UNROLL
                for (int n = 0; n < TILE_KEYS / 8; ++n) {
                    const float left = exp2_approximate(scores[n][2 * row] - largest);
                    const float right = exp2_approximate(scores[n][2 * row + 1] - largest);
                    // Of this lane's keys only; the four that share a row are summed at the end.
                    sum[row] += left + right;
                    weights[n / 2][n % 2 * 2 + row] = pack_halves(left, right);
                }
            }
        }

        // The values are there, and all are done with the keys.
        wait_for_copies<0>();
        __syncthreads();
        if (first + TILE_KEYS < end) copy_tile<WIDTH>(key_tile, keys, first + TILE_KEYS, end, head_dim);
        if (sees) {
            const int4* rows = value_tile + lane % 16 * STRIDE + lane / 16;
            UNROLL
            for (int k = 0; k < TILE_KEYS / 16; ++k) {
                UNROLL
                for (int n = 0; n < WIDTH / 16; ++n) {
                    uint32_t r[4];
                    load_matrices_transposed(r, rows + 16 * k * STRIDE + 2 * n);
                    mma_f16(vector[2 * n], weights[k], {r[0], r[1]});
                    mma_f16(vector[2 * n + 1], weights[k], {r[2], r[3]});
                }
            }
        }
    }

    UNROLL
    for (int row = 0; row < 2; ++row) {
        sum[row] += __shfl_xor_sync(ALL_LANES, sum[row], 1);
        sum[row] += __shfl_xor_sync(ALL_LANES, sum[row], 2);
    }
    UNROLL
    for (int row = 0; row < 2; ++row) {
        const int token = warp_token + group + 8 * row;
        if (token >= tokens) continue;
        const float inverse = 1.f / sum[row];
        T* place = out + ((entry * tokens + token) * heads + head) * head_dim;
        UNROLL
        for (int n = 0; n < WIDTH / 8; ++n) {
            if (8 * n >= head_dim) continue;
            const float left = vector[n][2 * row] * inverse, right = vector[n][2 * row + 1] * inverse;
            *reinterpret_cast<Pair<T>*>(place + 8 * n + 2 * member) = {from_float<T>(left), from_float<T>(right)};
        }
    }
}

/// As many blocks on a multiprocessor as registers allow without spilling.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int prompt_blocks(int width) { return width > 64 ? 2 : width > 32 ? 3 : 4; }
#else
constexpr int prompt_blocks(int width) { return width > 80 ? 2 : width > 32 ? 3 : 4; }
#endif

#define ATTENTION_PROMPT_OF(width, suffix, T)                                                                         \
    extern "C" __global__ void __launch_bounds__(PROMPT_THREADS, prompt_blocks(width))                                \
        attention_prompt_##width##_##suffix##_f16(                                                                    \
            const T* queries, const __half* keys, const __half* values, const float* slopes, T* out, int heads,       \
            int tokens, int head_dim, int capacity, int past, float scale, long long batch_stride,                    \
            long long head_stride, long long token_stride) {                                                          \
        wait_for_earlier_kernels();                                                                                   \
        attention_prompt<width>(queries, keys, values, slopes, out, heads, tokens, head_dim, capacity, past, scale,   \
                                batch_stride, head_stride, token_stride);                                             \
    }
#define ATTENTION_PROMPT(suffix, T)                                                                                   \
    ATTENTION_PROMPT_OF(32, suffix, T)                                                                                \
    ATTENTION_PROMPT_OF(64, suffix, T)                                                                                \
    ATTENTION_PROMPT_OF(80, suffix, T)                                                                                \
    ATTENTION_PROMPT_OF(128, suffix, T)
FOR_EACH_FLOAT(ATTENTION_PROMPT)
