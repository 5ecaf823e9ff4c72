// Every kernel by its name, for the host.

#include "../device_prims.cuh"

#include "../attention_cache.cu"
#include "../attention_prompt.cu"
#include "../attention_step.cu"
#include "../dequantize_rows.cu"
#include "../elementwise.cu"
#include "../int8_matmul_few.cu"
#include "../int8_matmul_hopper.cu"
#include "../int8_matmul_many.cu"
#include "../int8_matmul_one.cu"
#include "../layer_norm.cu"
#include "../quantize.cu"
#include "../quantize_weight.cu"

#include <string>
#include <unordered_map>

namespace {

using Call = std::function<void(void**)>;

/// A kernel that takes its arguments as `cuLaunchKernel` does: a pointer to each.
template <class... Args, size_t... Index>
Call callable(void (*kernel)(Args...), std::index_sequence<Index...>) {
    return [kernel](void** args) { kernel(*static_cast<Args*>(args[Index])...); };
}
template <class... Args>
std::pair<size_t, Call> entry(void (*kernel)(Args...)) {
    return {sizeof...(Args), callable(kernel, std::index_sequence_for<Args...>{})};
}

#define ENTRY(name) {#name, entry(name)},
#define ENTRIES(name) ENTRY(name##_f32) ENTRY(name##_f16) ENTRY(name##_bf16)
#define F16_CACHE_ENTRIES(name) ENTRY(name##_f32_f16) ENTRY(name##_f16_f16) ENTRY(name##_bf16_f16)
#define CACHE_ENTRIES(name) F16_CACHE_ENTRIES(name) ENTRY(name##_f32_f32) ENTRY(name##_f16_f32) ENTRY(name##_bf16_f32)

const std::unordered_map<std::string, std::pair<size_t, Call>> KERNELS = {
    CACHE_ENTRIES(attention_write)
    CACHE_ENTRIES(attention_step)
    ENTRIES(attention_combine)
    F16_CACHE_ENTRIES(attention_prompt_32)
    F16_CACHE_ENTRIES(attention_prompt_64)
    F16_CACHE_ENTRIES(attention_prompt_80)
    F16_CACHE_ENTRIES(attention_prompt_128)
    ENTRIES(finish)
    ENTRIES(dequantize_rows)
    ENTRIES(layer_norm)
    ENTRIES(layer_norm_quantize)
    ENTRIES(int8_matmul_few)
    ENTRIES(int8_matmul_few_codes)
    ENTRIES(int8_matmul_few_normed)
    ENTRIES(int8_matmul_hopper)
    ENTRIES(int8_matmul_hopper_small)
    ENTRIES(int8_matmul_many)
    ENTRIES(int8_matmul_many_medium)
    ENTRIES(int8_matmul_many_small)
    ENTRIES(int8_matmul_one)
    ENTRIES(int8_matmul_one_normed)
    ENTRIES(quantize_activations)
    ENTRIES(quantize_rows)
};

}  // namespace

/// Runs a kernel; -1 when there is none of this name, else the number of its arguments, without a run unless it
/// is `count`.
extern "C" int kernels_on_host_launch(const char* name, const unsigned grid[3], const unsigned block[3], unsigned shared_bytes,
                                      void** args, size_t count, unsigned seed) {
    const auto found = KERNELS.find(name);
    if (found == KERNELS.end()) return -1;
    const auto& [wanted, call] = found->second;
    if (wanted == count) {
        shim::order.seed(seed);
        shim::launch({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared_bytes, [&] { call(args); });
    }
    return static_cast<int>(wanted);
}
