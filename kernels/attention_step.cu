// Attention of a few queries over the cache, in f32 with plain sums; right for any number of queries and any head.
//
// One block takes up to four queries of a head and a part of their keys. The lanes that share a key have eight
// features of it each; every such group keeps the largest score, the sum of weights and the weighted sum of values
// of its own keys (Milakov and Gimelshein 2018, arXiv 1805.02867), so that nothing waits for anything until the
// end. Where one sequence has too few heads to fill the device, its keys are split among blocks and
// `attention_combine` puts the parts together (flash-decoding).

#include "attention.cuh"

constexpr int STEP_THREADS = 128;
constexpr int STEP_WARPS = STEP_THREADS / WARP;
/// Queries of a block.
constexpr int STEP_QUERIES = 4;
/// Features of a head that a warp holds at a time.
constexpr int STEP_FEATURES = WARP * FEATURES;

/// What is known of a query after some of its keys, less its sum of values.
struct SoftmaxPart {
    float max, sum;
};

/// Where there has been no key yet, the largest score is minus infinity, from which nothing can be subtracted.
__device__ __forceinline__ float reference(float max) { return max == -INFINITY ? 0.f : max; }

/// What the warps of a block have found.
struct StepShared {
    float vectors[STEP_WARPS][STEP_QUERIES][STEP_FEATURES];
    SoftmaxPart parts[STEP_WARPS][STEP_QUERIES];
};

template <class T, class C>
struct StepTask {
    /// (tokens, head_dim) of this batch entry and head, `token_stride` apart.
    const T* queries;
    long long token_stride;
    /// (positions, head_dim).
    const C* keys;
    const C* values;
    T* out;
    float* workspace;
    /// Rows of the output: (batch, tokens, heads). The first query's, and from a query to the next.
    size_t rows, first_row;
    int heads, head_dim;
    /// Queries of this block, and where the first stands in its sequence.
    int count, position;
    /// This block's keys.
    int first_key, end_key;
    float scale, slope;
};

/// Puts the warps' parts together, for `width` features from `first_feature` on.
template <class T, class C>
__device__ void merge_warps(const StepTask<T, C>& task, const StepShared& shared, int first_feature, int width) {
    __syncthreads();
    for (int index = threadIdx.x; index < task.count * width; index += STEP_THREADS) {
        const int query = index / width, feature = index % width;
        float max = shared.parts[0][query].max;
        for (int warp = 1; warp < STEP_WARPS; ++warp) max = fmaxf(max, shared.parts[warp][query].max);
        float sum = 0.f, value = 0.f;
        for (int warp = 0; warp < STEP_WARPS; ++warp) {
            const float weight = __expf(shared.parts[warp][query].max - reference(max));
            sum += weight * shared.parts[warp][query].sum;
            value += weight * shared.vectors[warp][query][feature];
        }
        const size_t row = task.first_row + static_cast<size_t>(query) * task.heads;
        if (gridDim.y == 1) {
            task.out[row * task.head_dim + first_feature + feature] = from_float<T>(value / sum);
        } else {
            const size_t part = row * gridDim.y + blockIdx.y;
            task.workspace[part * task.head_dim + first_feature + feature] = value;
            if (first_feature + feature == 0) {
                float* parts = task.workspace + task.rows * gridDim.y * task.head_dim;
                parts[2 * part] = max;
                parts[2 * part + 1] = sum;
            }
        }
    }
    __syncthreads();
}

/// Heads whose rows are whole pieces and fit a warp. A group has `KEYS` keys under way at a time.
template <int QUERIES, int KEYS, class T, class C>
__device__ __forceinline__ void attend_pieces(const StepTask<T, C>& task, StepShared& shared) {
    // Lanes that share a key: a power of two.
    int lanes = 1;
    while (lanes * FEATURES < task.head_dim) lanes *= 2;
    const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = STEP_THREADS / lanes;
    const int feature = lane * FEATURES;
    const bool has_features = feature < task.head_dim;

    float query[QUERIES][FEATURES] = {}, vector[QUERIES][FEATURES] = {};
    SoftmaxPart part[QUERIES];
    UNROLL
    for (int q = 0; q < QUERIES; ++q) {
        part[q] = {-INFINITY, 0.f};
        if (q < task.count && has_features) {
            const T* values = task.queries + q * task.token_stride + feature;
            UNROLL
            for (int i = 0; i < FEATURES; ++i) query[q][i] = to_float(values[i]) * task.scale;
        }
    }

    for (int first = task.first_key; first < task.end_key; first += KEYS * groups) {
        Eight<C> keys[KEYS], values[KEYS];
        UNROLL
        for (int k = 0; k < KEYS; ++k) {
            // After the last key it is read again, and not counted.
            const int key = min(first + k * groups + group, task.end_key - 1);
            const size_t place = static_cast<size_t>(key) * task.head_dim + feature;
            keys[k] = has_features ? Eight<C>::load(task.keys + place) : Eight<C>::zeros();
            values[k] = has_features ? Eight<C>::load(task.values + place) : Eight<C>::zeros();
        }
        float scores[QUERIES][KEYS];
        UNROLL
        for (int k = 0; k < KEYS; ++k) {
            float floats[FEATURES];
            keys[k].floats(floats);
            UNROLL
            for (int q = 0; q < QUERIES; ++q) {
                scores[q][k] = 0.f;
                UNROLL
                for (int i = 0; i < FEATURES; ++i) scores[q][k] += query[q][i] * floats[i];
            }
        }
        for (int step = lanes / 2; step > 0; step /= 2) {
            UNROLL
            for (int q = 0; q < QUERIES; ++q) {
                UNROLL
                for (int k = 0; k < KEYS; ++k) scores[q][k] += __shfl_xor_sync(ALL_LANES, scores[q][k], step);
            }
        }
        UNROLL
        for (int q = 0; q < QUERIES; ++q) {
            float max = part[q].max;
            UNROLL
            for (int k = 0; k < KEYS; ++k) {
                const int key = first + k * groups + group, distance = key - (task.position + q);
                // What is constant over the keys changes no softmax: from the query, the numbers stay small.
                const bool is_seen = key < task.end_key && distance <= 0;
                scores[q][k] = is_seen ? scores[q][k] + task.slope * distance : -INFINITY;
                max = fmaxf(max, scores[q][k]);
            }
            const float shrink = __expf(part[q].max - reference(max));
            part[q].max = max;
            part[q].sum *= shrink;
            UNROLL
            for (int k = 0; k < KEYS; ++k) {
                scores[q][k] = __expf(scores[q][k] - reference(max));
                part[q].sum += scores[q][k];
            }
            UNROLL
            for (int i = 0; i < FEATURES; ++i) vector[q][i] *= shrink;
        }
        UNROLL
        for (int k = 0; k < KEYS; ++k) {
            float floats[FEATURES];
            values[k].floats(floats);
            UNROLL
            for (int q = 0; q < QUERIES; ++q) {
                UNROLL
                for (int i = 0; i < FEATURES; ++i) vector[q][i] += scores[q][k] * floats[i];
            }
        }
    }

    for (int step = lanes; step < static_cast<int>(WARP); step *= 2) {
        UNROLL
        for (int q = 0; q < QUERIES; ++q) {
            const SoftmaxPart other = {__shfl_xor_sync(ALL_LANES, part[q].max, step),
                                       __shfl_xor_sync(ALL_LANES, part[q].sum, step)};
            const float max = fmaxf(part[q].max, other.max);
            const float weight = __expf(part[q].max - reference(max)), others = __expf(other.max - reference(max));
            part[q] = {max, weight * part[q].sum + others * other.sum};
            UNROLL
            for (int i = 0; i < FEATURES; ++i) {
                vector[q][i] = weight * vector[q][i] + others * __shfl_xor_sync(ALL_LANES, vector[q][i], step);
            }
        }
    }
    const int warp = threadIdx.x / WARP, place = threadIdx.x % WARP;
    if (place < lanes) {
        UNROLL
        for (int q = 0; q < QUERIES; ++q) {
            if (place == 0) shared.parts[warp][q] = part[q];
            UNROLL
            for (int i = 0; i < FEATURES; ++i) shared.vectors[warp][q][place * FEATURES + i] = vector[q][i];
        }
    }
    merge_warps(task, shared, 0, task.head_dim);
}

/// Any head: a key a warp, a query after the other, 256 features after the others. No published model needs it.
template <class T, class C>
__device__ void attend_any(const StepTask<T, C>& task, StepShared& shared) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int first_feature = 0; first_feature < task.head_dim; first_feature += STEP_FEATURES) {
        const int width = min(STEP_FEATURES, task.head_dim - first_feature);
        for (int q = 0; q < task.count; ++q) {
            const T* query = task.queries + q * task.token_stride;
            const int end_key = min(task.end_key, task.position + q + 1);
            SoftmaxPart part = {-INFINITY, 0.f};
            float vector[FEATURES] = {};
            for (int key = task.first_key + warp; key < end_key; key += STEP_WARPS) {
                const size_t place = static_cast<size_t>(key) * task.head_dim;
                float score = 0.f;
                for (int i = lane; i < task.head_dim; i += WARP) {
                    score += to_float(query[i]) * task.scale * to_float(task.keys[place + i]);
                }
                score = warp_sum(score) + task.slope * (key - (task.position + q));
                const float max = fmaxf(part.max, score);
                const float shrink = __expf(part.max - reference(max)), weight = __expf(score - reference(max));
                part = {max, shrink * part.sum + weight};
                UNROLL
                for (int i = 0; i < FEATURES; ++i) {
                    const int feature = i * WARP + lane;
                    if (feature >= width) continue;
                    vector[i] = shrink * vector[i] + weight * to_float(task.values[place + first_feature + feature]);
                }
            }
            if (lane == 0) shared.parts[warp][q] = part;
            UNROLL
            for (int i = 0; i < FEATURES; ++i) shared.vectors[warp][q][i * WARP + lane] = vector[i];
        }
        merge_warps(task, shared, first_feature, width);
    }
}

/// softmax(scale * q k^T + slope * key position) v of queries (batch, heads, tokens, head_dim) of the given strides,
/// which follow `past` tokens, over the keys up to each one's own position, to out (batch, tokens, heads * head_dim).
/// `slopes` (heads) may be null.
///
/// Grid (batch * heads, splits, ceil(tokens / 4)), block 128, no dynamic shared memory. With one split `workspace`
/// is not used, else it has room for batch * tokens * heads * splits * (head_dim + 2) floats: each part's sums of
/// values, then each part's largest score and sum of weights; `attention_combine` makes the output of it.
///
/// Splits: with blocks = batch * heads * ceil(tokens / 4) and keys = past + tokens,
/// max(1, min(4 * multiprocessors / blocks, keys / 128, 64)), all divisions rounded down.
template <class T, class C>
__device__ void attention_step(const T* queries, const C* keys, const C* values, const float* slopes, T* out,
                               float* workspace, int heads, int tokens, int head_dim, int capacity, int past,
                               float scale, long long batch_stride, long long head_stride, long long token_stride) {
    __shared__ StepShared shared;
    const int head = blockIdx.x % heads, first_token = blockIdx.z * STEP_QUERIES;
    const size_t entry = blockIdx.x / heads;
    const size_t place = static_cast<size_t>(blockIdx.x) * capacity * head_dim;
    StepTask<T, C> task;
    task.queries = queries + entry * batch_stride + head * head_stride + first_token * token_stride;
    task.token_stride = token_stride;
    task.keys = keys + place;
    task.values = values + place;
    task.out = out;
    task.workspace = workspace;
    task.rows = static_cast<size_t>(gridDim.x) * tokens;
    task.first_row = (entry * tokens + first_token) * heads + head;
    task.heads = heads;
    task.head_dim = head_dim;
    task.count = min(STEP_QUERIES, tokens - first_token);
    task.position = past + first_token;
    const int end = task.position + task.count, part = (end + gridDim.y - 1) / gridDim.y;
    task.first_key = min(end, static_cast<int>(blockIdx.y) * part);
    task.end_key = min(end, task.first_key + part);
    task.scale = scale;
    task.slope = slopes ? slopes[head] : 0.f;
    // As many keys under way as registers allow.
    constexpr int KEYS = 8 / sizeof(C);
    if (head_dim % FEATURES != 0 || head_dim > STEP_FEATURES) {
        attend_any(task, shared);
    } else if (task.count == 1) {
        attend_pieces<1, KEYS>(task, shared);
    } else {
        attend_pieces<STEP_QUERIES, KEYS / 2>(task, shared);
    }
}

/// The parts of each row of the output (batch, tokens, heads) to the output.
/// Grid (batch * tokens * heads), block 128, no dynamic shared memory.
template <class T>
__device__ void attention_combine(const float* workspace, T* out, int head_dim, int splits) {
    const size_t first = static_cast<size_t>(blockIdx.x) * splits;
    const float* parts = workspace + static_cast<size_t>(gridDim.x) * splits * head_dim + 2 * first;
    float max = parts[0];
    for (int split = 1; split < splits; ++split) max = fmaxf(max, parts[2 * split]);
    for (int feature = threadIdx.x; feature < head_dim; feature += STEP_THREADS) {
        float sum = 0.f, value = 0.f;
        for (int split = 0; split < splits; ++split) {
            const float weight = __expf(parts[2 * split] - reference(max));
            sum += weight * parts[2 * split + 1];
            value += weight * workspace[(first + split) * head_dim + feature];
        }
        out[static_cast<size_t>(blockIdx.x) * head_dim + feature] = from_float<T>(value / sum);
    }
}

#define ATTENTION_STEP(suffix, T, cache_suffix, C)                                                                    \
    extern "C" __global__ void __launch_bounds__(STEP_THREADS, 4) attention_step_##suffix##_##cache_suffix(           \
        const T* queries, const C* keys, const C* values, const float* slopes, T* out, float* workspace, int heads,   \
        int tokens, int head_dim, int capacity, int past, float scale, long long batch_stride, long long head_stride, \
        long long token_stride) {                                                                                     \
        wait_for_earlier_kernels();                                                                                   \
        attention_step(queries, keys, values, slopes, out, workspace, heads, tokens, head_dim, capacity, past, scale, \
                       batch_stride, head_stride, token_stride);                                                      \
    }
FOR_EACH_FLOAT_AND_CACHE(ATTENTION_STEP)

#define ATTENTION_COMBINE(suffix, T)                                                                                  \
    extern "C" __global__ void __launch_bounds__(STEP_THREADS)                                                        \
        attention_combine_##suffix(const float* workspace, T* out, int head_dim, int splits) {                        \
        wait_for_earlier_kernels();                                                                                   \
        attention_combine(workspace, out, head_dim, splits);                                                          \
    }
FOR_EACH_FLOAT(ATTENTION_COMBINE)
