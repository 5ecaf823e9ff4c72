//! Compiles the kernels with the host's C++ compiler; `KERNELS_SANITIZE=address,undefined` with sanitizers.

fn main() {
    println!("cargo::rerun-if-changed=..");
    println!("cargo::rerun-if-env-changed=KERNELS_SANITIZE");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").file("kernels.cpp").include("..").opt_level(1).debug(true);
    // As on the device, where products and sums are not fused unless a kernel says so.
    build.flag("-ffp-contract=off").define("LLM8_ON_HOST", None);
    // Kernels load and store several values as one vector.
    build.flag("-fno-strict-aliasing");
    build
        .flag("-Wall")
        .flag("-Wextra")
        .flag("-Wno-unknown-pragmas")
        .flag("-Wno-unused-parameter")
        // GCC minds `getcontext` in loops, which sanitizers keep it from seeing through.
        .flag_if_supported("-Wno-clobbered")
        .warnings_into_errors(true);
    if let Ok(sanitizers) = std::env::var("KERNELS_SANITIZE") {
        build
            .flag(format!("-fsanitize={sanitizers}"))
            .flag("-fno-sanitize-recover=all")
            .flag("-fno-omit-frame-pointer");
        for sanitizer in sanitizers.split(',') {
            println!("cargo::rustc-link-lib={}", if sanitizer == "address" { "asan" } else { "ubsan" });
        }
    }
    build.compile("kernels_on_host");
}
