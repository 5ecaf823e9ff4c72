#!/usr/bin/env bash
# Prints the folder of a CUDA toolkit of the version below: the one in CUDA_HOME or on PATH, or else its parts as
# NVIDIA puts them on PyPI, in a cache folder; about 100 MB. `toolkit.sh link` fetches the libraries that the program
# is linked with too, 600 MB more, and makes a libcuda.so to link with where there is no driver.
#
# 13.0: drivers of the 580 series refuse what a newer nvcc makes.
set -euo pipefail

version=13.0.88
compiler=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85)
libraries=(nvidia-cublas==13.1.0.3 nvidia-curand==10.4.0.35 nvidia-cuda-nvrtc==13.0.88)

fail() {
    echo "kernels/toolkit.sh: $*" >&2
    exit 1
}

is_wanted() { # NVCC
    [ -x "$1" ] && "$1" --version 2>/dev/null | grep -q "V${version//./\\.}$"
}

for nvcc in ${CUDA_HOME:+"$CUDA_HOME/bin/nvcc"} "$(command -v nvcc || true)"; do
    if is_wanted "$nvcc"; then
        nvcc=$(readlink -f "$nvcc")
        echo "${nvcc%/bin/nvcc}"
        exit
    fi
done

cache=${XDG_CACHE_HOME:-$HOME/.cache}/llm8/cuda-13.0
home=$cache/nvidia/cu13

# Several packages at once, each a wheel; what is fetched in part is not there.
fetch() { # MARK PACKAGE..
    local mark=$cache/$1 wheels
    shift
    [ -e "$mark" ] && return
    command -v python3 >/dev/null || fail "python3 is missing: it is needed to fetch nvcc $version (or set CUDA_HOME)"
    python3 -m pip --version >/dev/null 2>&1 ||
        fail "python3 has no pip: it is needed to fetch nvcc $version (python3-pip on Debian; or set CUDA_HOME)"
    mkdir -p "$cache"
    wheels=$(mktemp -d "$cache/wheels.XXXXXX")
    # shellcheck disable=SC2064  # The folder of now.
    trap "rm -rf '$wheels'" EXIT
    echo "fetching $*" >&2
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$wheels" "$@" \
        >&2 || fail "pip could not fetch $*"
    for wheel in "$wheels"/*.whl; do
        python3 -m zipfile -e "$wheel" "$cache"
        rm "$wheel"
    done
    # Zip files do not say what can be run.
    chmod +x "$home"/bin/* "$home"/nvvm/bin/*
    ln -sfn lib "$home/lib64"
    rmdir "$wheels"
    touch "$mark"
}

# libX.so for the linker, of libX.so.N.
link_names() {
    local library
    for library in "$home"/lib/lib*.so.*; do
        ln -sf "${library##*/}" "${library%%.so.*}.so"
    done
}

# A libcuda.so as on a machine without a GPU: the real one comes with the driver. It must be there before the first
# build: the linker is only told of folders that are there then.
stub() {
    local stubs=$home/lib/stubs
    [ -e "$stubs/libcuda.so" ] && return
    mkdir -p "$stubs"
    # Names as they are written, and as macros make them (cuMemAlloc is cuMemAlloc_v2). 100 is CUDA_ERROR_NO_DEVICE.
    # The profiler's have a header that is not among these packages.
    {
        echo CUresult cuProfilerStart CUresult cuProfilerStop
        cat "$home/include/cuda.h"
        "${CC:-cc}" -E -P -I "$home/include" "$home/include/cuda.h"
    } |
        tr '\n' ' ' | grep -oE 'CUresult +(CUDAAPI +)?cu[A-Z][A-Za-z0-9_]*' | sed 's/.* //' | sort -u |
        sed 's/.*/int &(void) { return 100; }/' >"$stubs/libcuda.c"
    "${CC:-cc}" -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$stubs/libcuda.so.1" "$stubs/libcuda.c"
    ln -sf libcuda.so.1 "$stubs/libcuda.so"
}

fetch compiler "${compiler[@]}"
if [ "${1-}" = link ]; then
    fetch libraries "${libraries[@]}"
    link_names
    stub
fi
is_wanted "$home/bin/nvcc" || fail "$home/bin/nvcc does not run, or is not $version: delete $cache and try again"
echo "$home"
