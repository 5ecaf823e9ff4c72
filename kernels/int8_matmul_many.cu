// Steps 4 to 6 of LLM.int8() for many tokens, on tensor cores: codes times codes summed exactly, and straight
// from the sums in registers to outputs; no matrix of sums is written.
//
// A block makes a tile of outputs (tokens, rows of the weight). Its codes come through a ring of stages in
// shared memory, each some columns wide; every warp multiplies a part of the tile by `mma_s8`.
//
// How to launch: `int8_matmul_many_T`, `int8_matmul_many_medium_T` and `int8_matmul_many_small_T` take the same
// arguments and give the same bits.
//
//                tile (tokens, rows)   threads   dynamic shared memory
//     many       128, 256              256       98560 bytes
//     medium     128, 128              128       49408 bytes
//     small       64,  64              128       49408 bytes
//
// Grid: ceil(tokens / tile tokens) * ceil(rows / tile rows) blocks in one dimension. All need
// MAX_DYNAMIC_SHARED_SIZE_BYTES to be set; the first does not fit compute capability 7.5. Which: `small` for
// up to 64 tokens; else, on 9.0, `int8_matmul_hopper` where it can; else the first of the list that has blocks for three
// quarters of the multiprocessors, else `small`.
//
// The reckoning, for a multiprocessor that has `mma_s8` every 1.6 (9.0) or 2 (8.0) cycles and 128 bytes of
// shared memory a cycle. A warp's 64 by 64 outputs take 4 KB of fragments for 32 products: 128 bytes a product,
// and filling the stages adds 48 (tile 128, 256) or 64 (128, 128): 86 % and 94 % of the time of the products on
// 9.0, 69 % and 75 % on 8.0. The second cache gives 384 bytes for 2^15 products of codes (tile 128, 256) or 512
// for as many (128, 128): 132 multiprocessors ask for 4000 or 5300 bytes a cycle, which is why the wide tile
// comes first. Measured on an H200: 840 trillion operations a second while the products last. Registers: 128 for
// the sums, 64 for two sets of fragments; at most 255 and none spilled, two warps for each scheduler.

#include "int8_tile.cuh"

namespace many {

/// Where 16 codes of a row lie in a tile of so many columns. `order` numbers the rows that `load_matrices`
/// takes together, of which no two may lie in the same banks.
template <int COLS>
__device__ __forceinline__ int place(int row, int order, int part) {
    constexpr int PARTS = COLS / 16;
    return row * COLS + 16 * (part ^ (order / (8 / PARTS) % PARTS));
}

template <int COLS>
__device__ __forceinline__ int token_place(int token, int part) {
    return place<COLS>(token, token, part);
}

/// Of 32 rows, matrix j of four has rows 8 * i + 2 * j and the next, i from 0 to 3: a lane's sums are then those
/// of 8 rows that follow each other, which it writes at once.
template <int COLS>
__device__ __forceinline__ int row_place(int row, int part) {
    return place<COLS>(row, row % 2 + row / 8 % 4 * 2, part);
}

/// What a block makes, and how.
template <int TILE_TOKENS, int TILE_ROWS, int STAGE_COLS, int STAGE_COUNT, int TOKENS_OF_WARP, int ROWS_OF_WARP,
          int MIN_BLOCKS>
struct Tiling {
    static constexpr int TOKENS = TILE_TOKENS, ROWS = TILE_ROWS;
    /// Columns of a stage.
    static constexpr int COLS = STAGE_COLS;
    static constexpr int STAGES = STAGE_COUNT;
    static constexpr int WARP_TOKENS = TOKENS_OF_WARP, WARP_ROWS = ROWS_OF_WARP;
    static constexpr int WARPS = TOKENS / WARP_TOKENS * (ROWS / WARP_ROWS), THREADS = 32 * WARPS;
    /// Blocks of a multiprocessor.
    static constexpr int BLOCKS = MIN_BLOCKS;
    static constexpr int STAGE_BYTES = (TOKENS + ROWS) * COLS;
    static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + tile::LIST_BYTES;
    /// A warp finishes its outputs (32 tokens, 32 rows) at a time.
    static constexpr int ROW_SLICES = WARP_ROWS / 32, SLICES = WARP_TOKENS / 32 * ROW_SLICES;
    static_assert((tile::OUTLIERS + WARPS) * 4 <= tile::LIST_BYTES, "the list's room");

    /// Codes of outlier columns: (tokens, OUTLIERS) and (rows, OUTLIERS).
    static constexpr int CODES_BYTES = (TOKENS + ROWS) * tile::OUTLIERS;

    __device__ __forceinline__ static int token_code(int token, int index) {
        return token_place<tile::OUTLIERS>(token, index / 16) + index % 16;
    }
    __device__ __forceinline__ static int row_code(int row, int index) {
        return TOKENS * tile::OUTLIERS + row_place<tile::OUTLIERS>(row, index / 16) + index % 16;
    }
    /// A warp's values in the order in which lanes have them.
    __device__ __forceinline__ static int value(int token) {
        constexpr int SPAN = WARP_TOKENS;
        return token / SPAN * SPAN + token % 8 * (SPAN / 8) + token % SPAN / 8;
    }
};

using Large = Tiling<128, 256, 64, 4, 64, 64, 1>;
using Medium = Tiling<128, 128, 64, 3, 64, 64, 2>;
using Small = Tiling<64, 64, 128, 3, 32, 32, 3>;
static_assert(Large::THREADS == 256 && Large::SHARED_BYTES == 98560, "as stated above");
static_assert(Medium::THREADS == 128 && Medium::SHARED_BYTES == 49408, "as stated above");
static_assert(Small::THREADS == 128 && Small::SHARED_BYTES == 49408, "as stated above");
static_assert(tile::Epilogue<Large>::BYTES <= Large::STAGES * Large::STAGE_BYTES, "the stages' room");
static_assert(tile::Epilogue<Medium>::BYTES <= Medium::STAGES * Medium::STAGE_BYTES, "the stages' room");
static_assert(tile::Epilogue<Small>::BYTES <= Small::STAGES * Small::STAGE_BYTES, "the stages' room");

/// What a warp's products take of 32 columns.
template <class Tile>
struct Fragments {
    uint32_t tokens[Tile::WARP_TOKENS / 16][4];
    uint32_t rows[Tile::WARP_ROWS / 16][4];
};

/// Where a lane reads the fragments of a tile of so many columns.
template <class Tile, int COLS>
struct Reader {
    int token, row;

    __device__ __forceinline__ Reader(int warp_token, int warp_row) {
        const int lane = threadIdx.x % WARP;
        token = token_place<COLS>(warp_token + lane % 16, lane / 16);
        row = row_place<COLS>(warp_row + lane % 8 / 2 * 8 + lane / 16 * 2 + lane % 2, lane / 8 % 2);
    }

    /// Columns from 32 * step on of codes (tokens, COLS) and, behind them, (rows, COLS).
    __device__ __forceinline__ void read(Fragments<Tile>& fragments, const unsigned char* stage, int step) const {
        UNROLL for (int i = 0; i < Tile::WARP_TOKENS / 16; ++i) {
            load_matrices(fragments.tokens[i], stage + (token ^ 32 * step) + 16 * COLS * i);
        }
        stage += Tile::TOKENS * COLS;
        UNROLL for (int i = 0; i < Tile::WARP_ROWS / 16; ++i) {
            load_matrices(fragments.rows[i], stage + (row ^ 32 * step) + (i / 2 * 32 + i % 2 * 4) * COLS);
        }
    }
};

/// A warp's sums: by slices of (32 tokens, 32 rows), of each two times 16 tokens and four matrices of rows.
template <class Tile>
using Sums = int[Tile::SLICES][2][4][4];

template <class Tile>
__device__ __forceinline__ void multiply(Sums<Tile>& sums, const Fragments<Tile>& fragments) {
    UNROLL for (int i = 0; i < Tile::WARP_TOKENS / 16; ++i) {
        UNROLL for (int j = 0; j < Tile::WARP_ROWS / 8; ++j) {
            const uint32_t(&two)[4] = fragments.rows[j / 2];
            const uint32_t row[2] = {two[j % 2 * 2], two[j % 2 * 2 + 1]};
            mma_s8(sums[i / 2 * Tile::ROW_SLICES + j / 4][i % 2][j % 4], fragments.tokens[i], row);
        }
    }
}

/// What a thread copies of codes (count, cols), of which the tile has LEN rows from `first` on: 16 columns of every
/// so manieth row, stage by stage. Zeros stand for what is beyond the ends.
template <class Tile, int LEN, bool IS_WEIGHT>
struct Copier {
    static constexpr int PARTS = Tile::COLS / 16, STEP = Tile::THREADS / PARTS;
    /// The thread's first row, from its columns of the next stage on.
    const int8_t* source;
    /// Rows from there to the end.
    int rows;
    /// The thread's place in a tile.
    int place;

    __device__ __forceinline__ Copier(const int8_t* codes, int first, int count, int cols) {
        const int row = threadIdx.x / PARTS, part = threadIdx.x % PARTS;
        source = codes + static_cast<size_t>(first + row) * cols + 16 * part;
        rows = count - first - row;
        place = place_of(row, part);
    }

    __device__ __forceinline__ static int place_of(int row, int part) {
        return IS_WEIGHT ? row_place<Tile::COLS>(row, part) : token_place<Tile::COLS>(row, part);
    }

    /// Where copy number i goes. 32 rows further the order of a row's parts is the same.
    __device__ __forceinline__ int place_at(int i) const {
        if (STEP % 32 == 0) return place + STEP * Tile::COLS * i;
        return place_of(threadIdx.x / PARTS + STEP * i, threadIdx.x % PARTS);
    }

    /// Of rows whose starts are aligned; `cols` are left from the thread's on.
    __device__ __forceinline__ void copy(unsigned char* tile, int cols, int width) const {
        UNROLL for (int i = 0; i < LEN / STEP; ++i) {
            copy_async(tile + place_at(i), source + static_cast<size_t>(STEP * i) * width, cols > 0 && STEP * i < rows);
        }
    }

    /// Of any rows; four codes at a time, as registers are short where this is done.
    __device__ __forceinline__ void copy_bytes(unsigned char* tile, int cols, int width) const {
#pragma unroll 1
        for (int i = 0; i < LEN / STEP; ++i) {
            const int8_t* bytes = source + static_cast<size_t>(STEP * i) * width;
#pragma unroll 1
            for (int first = 0; first < 16; first += 4) {
                uint32_t four = 0;
                UNROLL for (int byte = 0; byte < 4; ++byte) {
                    const bool is_there = first + byte < cols && STEP * i < rows;
                    four |= is_there ? static_cast<uint32_t>(static_cast<uint8_t>(bytes[first + byte])) << 8 * byte : 0;
                }
                *reinterpret_cast<uint32_t*>(tile + place_at(i) + first) = four;
            }
        }
    }
};

template <class Tile, class T>
__device__ __forceinline__ void int8_matmul(const tile::Product<T>& product) {
    using tile::OUTLIERS;
    DYNAMIC_SHARED(shared);
    int* list = reinterpret_cast<int*>(shared + Tile::STAGES * Tile::STAGE_BYTES);

    const int tokens = product.tokens, rows = product.rows, cols = product.cols;
    const tile::Corner corner = tile::corner<Tile>(tokens, rows);
    const int warp = threadIdx.x / WARP;
    const int warp_token = warp / (Tile::ROWS / Tile::WARP_ROWS) * Tile::WARP_TOKENS;
    const int warp_row = warp % (Tile::ROWS / Tile::WARP_ROWS) * Tile::WARP_ROWS;

    Copier<Tile, Tile::TOKENS, false> token_copier(product.codes, corner.token, tokens, cols);
    Copier<Tile, Tile::ROWS, true> row_copier(product.weight, corner.row, rows, cols);
    // From this thread's first column of the next stage on.
    int cols_left = cols - static_cast<int>(threadIdx.x) % (Tile::COLS / 16) * 16;
    unsigned char* next_stage = shared;
    const bool are_pieces =
        (cols | reinterpret_cast<uintptr_t>(product.codes) | reinterpret_cast<uintptr_t>(product.weight)) % 16 == 0;
    const auto copy_next = [&] {
        if (are_pieces) {
            token_copier.copy(next_stage, cols_left, cols);
            row_copier.copy(next_stage + Tile::TOKENS * Tile::COLS, cols_left, cols);
        } else {
            token_copier.copy_bytes(next_stage, cols_left, cols);
            row_copier.copy_bytes(next_stage + Tile::TOKENS * Tile::COLS, cols_left, cols);
        }
        commit_copies();
        token_copier.source += Tile::COLS;
        row_copier.source += Tile::COLS;
        cols_left -= Tile::COLS;
        next_stage += Tile::STAGE_BYTES;
        next_stage = next_stage == shared + Tile::STAGES * Tile::STAGE_BYTES ? shared : next_stage;
    };
    UNROLL for (int i = 0; i < Tile::STAGES - 1; ++i) copy_next();

    // What the outputs will take is asked for while the first copies are under way.
    const tile::Own own = tile::Own::load(product, corner, Tile::ROWS, Tile::TOKENS);
    const auto bits = tile::OutlierBits::of<Tile>(product, corner.token);
    const int outliers = product.outlier_bits ? tile::collect_outliers<Tile>(list, bits, 0) : 0;

    Sums<Tile> sums = {};
    {
        const Reader<Tile, Tile::COLS> reader(warp_token, warp_row);
        constexpr int STEPS = Tile::COLS / 32;
        static_assert(STEPS % 2 == 0, "a stage begins with the first fragments");
        Fragments<Tile> fragments[2];
        wait_for_copies<Tile::STAGES - 2>();
        __syncthreads();
        const unsigned char* stage = shared;
        reader.read(fragments[0], stage, 0);
        // Fragments are read one step ahead. Those after the last stage are whatever is there; nobody takes them.
#pragma unroll 1
        for (int left = cols; left > 0; left -= Tile::COLS) {
            UNROLL for (int step = 0; step < STEPS; ++step) {
                if (step + 1 == STEPS) {
                    // The next stage is there, and everybody has read this one to its end.
                    wait_for_copies<Tile::STAGES - 2>();
                    __syncthreads();
                    stage += Tile::STAGE_BYTES;
                    stage = stage == shared + Tile::STAGES * Tile::STAGE_BYTES ? shared : stage;
                }
                reader.read(fragments[(step + 1) % 2], stage, (step + 1) % STEPS);
                if (step == 0) copy_next();
                multiply<Tile>(sums, fragments[step % 2]);
            }
        }
        wait_for_copies<0>();
        __syncthreads();
    }

    const tile::Epilogue<Tile> epilogue(shared);
    own.store(epilogue);
    // The codes that small values have in outlier columns go out of the sums again.
#pragma unroll 1
    for (int first = 0; first < outliers; first += OUTLIERS) {
        if (first > 0) {
            __syncthreads();
            tile::collect_outliers<Tile>(list, bits, first);
        }
        epilogue.template load_outliers<4, true>(product, list, min(outliers - first, OUTLIERS), corner);
        Fragments<Tile> fragments;
        const Reader<Tile, OUTLIERS> reader(warp_token, warp_row);
        reader.read(fragments, epilogue.codes, 0);
        multiply<Tile>(sums, fragments);
    }
    if (outliers == 0) __syncthreads();

    const int group_of_lane = threadIdx.x % WARP / 4, member = threadIdx.x % 4;
#pragma unroll 1
    for (int slice = 0; slice < Tile::SLICES; ++slice) {
        // Of the tile: the first of the lane's 4 tokens, 8 apart, and of its 8 rows.
        const int token_part = slice / Tile::ROW_SLICES;
        const int token = warp_token + 32 * token_part + group_of_lane;
        const int row = warp_row + slice % Tile::ROW_SLICES * 32 + 8 * member;
        float values[4][8] = {};
        tile::add_all_outliers<1>(values, product, epilogue, corner, bits, list, outliers,
                                  epilogue.values + Tile::value(token), epilogue.weights + row);
        tile::write_outputs<8>(product, epilogue, corner, token, row, values, [&](int i) {
            tile::EightOf<int> whole;
            UNROLL for (int j = 0; j < 8; ++j) whole.values[j] = sums[0][i / 2][j / 2][i % 2 * 2 + j % 2];
            return whole;
        });
        // The next slice moves up: registers have no index.
        UNROLL for (int next = 1; next < Tile::SLICES; ++next) {
            UNROLL for (int i = 0; i < 32; ++i) {
                sums[next - 1][i / 16][i / 4 % 4][i % 4] = sums[next][i / 16][i / 4 % 4][i % 4];
            }
        }
    }
}

}  // namespace many

#define INT8_MATMUL_MANY(name, Tile, T)                                                                               \
    extern "C" __global__ void __launch_bounds__(many::Tile::THREADS, many::Tile::BLOCKS)                             \
        name(const int8_t* codes, const float* x_scales, const unsigned* outlier_bits, const T* x,                    \
             const int8_t* weight, const float* weight_scales, const void* bias, int bias_dtype, const T* residual,   \
             T* out, int tokens, int rows, int cols, int out_width, int tokens_per_sequence, int activation) {        \
        wait_for_earlier_kernels();                                                                                   \
        many::int8_matmul<many::Tile, T>({codes, x_scales, outlier_bits, x, weight, weight_scales, bias, bias_dtype,  \
                                          residual, out, tokens, rows, cols, out_width, tokens_per_sequence,          \
                                          activation});                                                               \
    }
#define INT8_MATMUL_MANY_TILES(suffix, T)                         \
    INT8_MATMUL_MANY(int8_matmul_many_##suffix, Large, T)         \
    INT8_MATMUL_MANY(int8_matmul_many_medium_##suffix, Medium, T) \
    INT8_MATMUL_MANY(int8_matmul_many_small_##suffix, Small, T)
FOR_EACH_FLOAT(INT8_MATMUL_MANY_TILES)
