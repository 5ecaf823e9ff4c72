// The same as `int8_matmul_many` by the tensor cores of 9.0, which take their operands from shared memory and go on while
// the warps copy what comes next.
//
// How to launch: `int8_matmul_hopper_T` and `int8_matmul_hopper_small_T` take the arguments of `int8_matmul_many_T`, with
// `cols` a multiple of 16 and codes and weight at multiples of 16 bytes, and give the same bits. For other chips than 9.0
// they stop the program.
//
//                tile (tokens, rows)   threads   dynamic shared memory
//     hopper     128, 256              256       197888 bytes
//     small      128, 128              256       99584 bytes
//
// Grid: ceil(tokens / tile tokens) * ceil(rows / tile rows) blocks in one dimension. All need
// MAX_DYNAMIC_SHARED_SIZE_BYTES to be set.
//
// The reckoning: 64 by 256 outputs by 32 columns take the tensor cores of a multiprocessor 128 cycles and 80 bytes of
// shared memory each, of which there are 128. The second cache gives 49 KB for 128 columns of the larger tile and 4.2
// million products: 6.4 TB/s at 1,100 of the 1,980 trillion operations a second that there are. Measured on an H200: 1,130
// trillion while the products last (tile 128, 256), and 3.3 us a block for what comes before and after them.

#include "int8_tile.cuh"
#include "warpgroup.cuh"

namespace hopper {

/// What a block makes, and how: 64 tokens a warpgroup.
template <int WARPGROUPS, int TILE_ROWS, int ROWS_OF_PASS, int STAGE_COUNT, int MIN_BLOCKS>
struct Tiling {
    static constexpr int TOKENS = 64 * WARPGROUPS, ROWS = TILE_ROWS;
    /// Columns of a stage.
    static constexpr int COLS = 128;
    static constexpr int STAGES = STAGE_COUNT;
    static constexpr int WARPS = 4 * WARPGROUPS, THREADS = 32 * WARPS;
    /// Blocks of a multiprocessor.
    static constexpr int BLOCKS = MIN_BLOCKS;
    static constexpr int STAGE_BYTES = (TOKENS + ROWS) * COLS;
    /// What may be missing to a multiple of 1024 at the start, the stages, and the list.
    static constexpr int SHARED_BYTES = 1024 + STAGES * STAGE_BYTES + tile::LIST_BYTES;
    static_assert((tile::OUTLIERS + WARPS) * 4 <= tile::LIST_BYTES, "the list's room");

    /// A warp's 16 tokens by so many rows at a time on their way to the lanes that write them, in place of the codes of
    /// outlier columns. Eight more from token to token, so that neighbours lie in other banks.
    static constexpr int PASS_ROWS = ROWS_OF_PASS, PITCH = PASS_ROWS + 8, PASS_BYTES = WARPS * 16 * PITCH * 4;
    /// Lanes that write 8 rows each of a token.
    static constexpr int TOKEN_LANES = PASS_ROWS / 8, TOKENS_AT_ONCE = 32 / TOKEN_LANES;
    static constexpr int OUTLIER_CODES_BYTES = (TOKENS + ROWS) * COLS;
    static constexpr int CODES_BYTES = PASS_BYTES > OUTLIER_CODES_BYTES ? PASS_BYTES : OUTLIER_CODES_BYTES;

    __device__ __forceinline__ static int token_code(int token, int index) {
        return swizzled(token, index / 16) + index % 16;
    }
    __device__ __forceinline__ static int row_code(int row, int index) {
        return TOKENS * COLS + swizzled(row, index / 16) + index % 16;
    }
    __device__ __forceinline__ static int value(int token) { return token; }
};

using Large = Tiling<2, 256, 128, 4, 1>;
using Small = Tiling<2, 128, 64, 3, 2>;
static_assert(Large::THREADS == 256 && Large::SHARED_BYTES == 197888, "as stated above");
static_assert(Small::THREADS == 256 && Small::SHARED_BYTES == 99584, "as stated above");
static_assert(tile::Epilogue<Large>::BYTES <= Large::STAGES * Large::STAGE_BYTES, "the stages' room");
static_assert(tile::Epilogue<Small>::BYTES <= Small::STAGES * Small::STAGE_BYTES, "the stages' room");

/// What a thread copies of codes (count, cols), of which the tile has LEN rows from `first` on: 16 columns of every
/// so manieth row, stage by stage. Zeros stand for what is beyond the ends.
template <class Tile, int LEN>
struct Copier {
    static constexpr int PARTS = Tile::COLS / 16, STEP = Tile::THREADS / PARTS;
    static_assert(STEP % 8 == 0 && LEN % STEP == 0, "the pieces of all of a thread's rows have one order");
    /// The thread's first row, from its columns of the next stage on.
    const int8_t* source;
    /// Rows from there to the end of the codes.
    int rows;

    __device__ __forceinline__ Copier(const int8_t* codes, int first, int count, int cols) {
        const int row = threadIdx.x / PARTS, part = threadIdx.x % PARTS;
        source = codes + static_cast<size_t>(first + row) * cols + 16 * part;
        rows = count - first - row;
    }

    /// `cols` are left from the thread's on.
    __device__ __forceinline__ void copy(unsigned char* tile, int cols, int width) {
        unsigned char* place = tile + swizzled(threadIdx.x / PARTS, threadIdx.x % PARTS);
        const int8_t* codes = source;
        UNROLL for (int i = 0; i < LEN / STEP; ++i, codes += STEP * width) {
            copy_async(place + STEP * Tile::COLS * i, codes, cols > 0 && STEP * i < rows);
        }
        source += Tile::COLS;
    }
};

#if HAS_WARPGROUP_PRODUCTS

/// A warpgroup's products of 32 columns from `step` * 32 on of a stage.
template <class Tile>
__device__ __forceinline__ void multiply(int (&sums)[Tile::ROWS / 8][4], const unsigned char* stage, int step) {
    const unsigned char* tokens = stage + threadIdx.x / 128 * 64 * Tile::COLS;
    warpgroup_mma_s8(sums, tokens + 32 * step, stage + Tile::TOKENS * Tile::COLS + 32 * step);
}

template <class Tile, class T>
__device__ __forceinline__ void int8_matmul(const tile::Product<T>& product) {
    using tile::OUTLIERS;
    DYNAMIC_SHARED(dynamic);
    unsigned char* shared = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;
    int* list = reinterpret_cast<int*>(shared + Tile::STAGES * Tile::STAGE_BYTES);
    const int cols = product.cols;
    const tile::Corner corner = tile::corner<Tile>(product.tokens, product.rows);

    Copier<Tile, Tile::TOKENS> token_copier(product.codes, corner.token, product.tokens, cols);
    Copier<Tile, Tile::ROWS> row_copier(product.weight, corner.row, product.rows, cols);
    // From this thread's first column of the next stage on.
    int cols_left = cols - static_cast<int>(threadIdx.x) % (Tile::COLS / 16) * 16;
    const auto next_of = [&](unsigned char* stage) {
        stage += Tile::STAGE_BYTES;
        return stage == shared + Tile::STAGES * Tile::STAGE_BYTES ? shared : stage;
    };
    unsigned char* next_stage = shared;
    const auto copy_next = [&] {
        token_copier.copy(next_stage, cols_left, cols);
        row_copier.copy(next_stage + Tile::TOKENS * Tile::COLS, cols_left, cols);
        commit_copies();
        cols_left -= Tile::COLS;
        next_stage = next_of(next_stage);
    };
    // The stage of the products under way and the one before are not to be written.
    constexpr int AHEAD = Tile::STAGES - 2;
    UNROLL for (int i = 0; i < AHEAD; ++i) copy_next();

    // What the outputs will take is asked for while the first copies are under way.
    const tile::Own own = tile::Own::load(product, corner, Tile::ROWS, Tile::TOKENS);
    const auto bits = tile::OutlierBits::of<Tile>(product, corner.token);
    const int outliers = product.outlier_bits ? tile::collect_outliers<Tile>(list, bits, 0) : 0;

    int sums[Tile::ROWS / 8][4] = {};
    unsigned char* stage = shared;
#pragma unroll 1
    for (int left = cols; left > 0; left -= Tile::COLS) {
        wait_for_copies<AHEAD - 1>();
        show_to_products();
        // The stage is there, and all warpgroups have read the one before the last to its end.
        __syncthreads();
        begin_products();
        UNROLL for (int step = 0; step < Tile::COLS / 32; ++step) multiply<Tile>(sums, stage, step);
        commit_products();
        copy_next();
        wait_for_products<1>();
        stage = next_of(stage);
    }
    wait_for_products<0>();
    wait_for_copies<0>();
    __syncthreads();

    const tile::Epilogue<Tile> epilogue(shared);
    own.store(epilogue);
    // The codes that small values have in outlier columns go out of the sums again.
#pragma unroll 1
    for (int first = 0; first < outliers; first += OUTLIERS) {
        if (first > 0) tile::collect_outliers<Tile>(list, bits, first);
        epilogue.template load_outliers<Tile::BLOCKS == 1 ? 4 : 1, true>(product, list, min(outliers - first, OUTLIERS), corner);
        show_to_products();
        __syncthreads();
        begin_products();
        multiply<Tile>(sums, epilogue.codes, 0);
        commit_products();
        wait_for_products<0>();
        __syncthreads();
    }
    if (outliers == 0) __syncthreads();

    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int* pass_sums = reinterpret_cast<int*>(epilogue.codes) + warp * 16 * Tile::PITCH;
#pragma unroll 1
    for (int pass = 0; pass < Tile::ROWS / Tile::PASS_ROWS; ++pass) {
        constexpr int BLOCKS = Tile::PASS_ROWS / 8;
        __syncwarp();
        UNROLL for (int block = 0; block < Tile::ROWS / 8; ++block) {
            // Registers have no index.
            if (block / BLOCKS != pass) continue;
            int* place = pass_sums + lane / 4 * Tile::PITCH + block % BLOCKS * 8 + lane % 4 * 2;
            *reinterpret_cast<int2*>(place) = {sums[block][0], sums[block][1]};
            *reinterpret_cast<int2*>(place + 8 * Tile::PITCH) = {sums[block][2], sums[block][3]};
        }
        __syncwarp();
        constexpr int STEP = Tile::TOKENS_AT_ONCE;
        const int row = pass * Tile::PASS_ROWS + lane % Tile::TOKEN_LANES * 8;
#pragma unroll 1
        for (int first_token = 0; first_token < 16; first_token += 2 * STEP) {
            // Of the warp's: the first of two tokens of which the lane writes 8 rows.
            const int token = first_token + lane / Tile::TOKEN_LANES;
            float values[2][8] = {};
            tile::add_all_outliers<STEP>(values, product, epilogue, corner, bits, list, outliers,
                                         epilogue.values + 16 * warp + token, epilogue.weights + row);
            const int* whole = pass_sums + token * Tile::PITCH + lane % Tile::TOKEN_LANES * 8;
            tile::write_outputs<STEP>(product, epilogue, corner, 16 * warp + token, row, values, [&](int i) {
                return *reinterpret_cast<const tile::EightOf<int>*>(whole + STEP * i * Tile::PITCH);
            });
        }
    }
}

#endif

}  // namespace hopper

#if HAS_WARPGROUP_PRODUCTS
#define INT8_MATMUL_HOPPER_BODY(Tile, T)                                                                              \
    wait_for_earlier_kernels();                                                                                       \
    hopper::int8_matmul<hopper::Tile, T>({codes, x_scales, outlier_bits, x, weight, weight_scales, bias, bias_dtype,  \
                                          residual, out, tokens, rows, cols, out_width, tokens_per_sequence,          \
                                          activation});
#else
#define INT8_MATMUL_HOPPER_BODY(Tile, T) __trap();
#endif
#define INT8_MATMUL_HOPPER(name, Tile, T)                                                                             \
    extern "C" __global__ void __launch_bounds__(hopper::Tile::THREADS, hopper::Tile::BLOCKS)                         \
        name(const int8_t* codes, const float* x_scales, const unsigned* outlier_bits, const T* x,                    \
             const int8_t* weight, const float* weight_scales, const void* bias, int bias_dtype, const T* residual,   \
             T* out, int tokens, int rows, int cols, int out_width, int tokens_per_sequence, int activation) {        \
        INT8_MATMUL_HOPPER_BODY(Tile, T)                                                                              \
    }
#define INT8_MATMUL_HOPPER_TILES(suffix, T)                 \
    INT8_MATMUL_HOPPER(int8_matmul_hopper_##suffix, Large, T) \
    INT8_MATMUL_HOPPER(int8_matmul_hopper_small_##suffix, Small, T)
FOR_EACH_FLOAT(INT8_MATMUL_HOPPER_TILES)
