// Every kernel by its name, for the host.

#include "../device_prims.cuh"

#include "../int8_matmul_many.cu"
#include "../quantize.cu"

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

const std::unordered_map<std::string, std::pair<size_t, Call>> KERNELS = {
    ENTRIES(int8_matmul_many)
    ENTRIES(int8_matmul_many_medium)
    ENTRIES(int8_matmul_many_small)
    ENTRIES(quantize_activations)
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
