#!/usr/bin/env bash
# Compiles every kernel for every chip that the program has machine code for, and prints what each takes of a
# multiprocessor. Fails on any warning, and where a kernel that time is spent in keeps values in memory that should be
# in registers ("spills").
set -euo pipefail
cd "$(dirname "$0")"

# The same lists are in crates/int8-ops/build.rs.
chips=(75 80 86 89 90a)
virtual_chips=(75 80 90)
hot='^(int8_matmul|float_matmul|attention|quantize|layer_norm)'

command -v "${CXX:-g++}" >/dev/null || { echo "a C++ compiler (g++) is missing: nvcc needs one" >&2; exit 1; }
CUDA_HOME=$(./toolkit.sh)
export CUDA_HOME
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

flags=(-std=c++17 -O3 -Werror all-warnings -Xptxas -v)
for chip in "${chips[@]}"; do flags+=("-gencode=arch=compute_$chip,code=sm_$chip"); done
for chip in "${virtual_chips[@]}"; do flags+=("-gencode=arch=compute_$chip,code=compute_$chip"); done

compile() {
    local source=$1
    shift
    "$CUDA_HOME/bin/nvcc" "$@" -fatbin -o "$logs/$source.fatbin" "$source" >"$logs/$source.log" 2>&1 ||
        { cat "$logs/$source.log"; return 1; }
}
export logs
export -f compile
printf '%s\0' *.cu | xargs -0 -P "$(nproc)" -I {} bash -c 'compile "$@"' compile {} "${flags[@]}"

# Products of warpgroups that wait for each other, which is no warning to nvcc.
! grep -h 'C7510\|serialized' "$logs"/*.log >&2 || exit 1

cat "$logs"/*.log | awk -v hot="$hot" -v chips="${chips[*]}" '
    function number_before(word,    at) {
        for (at = 2; at <= NF; ++at) if (index($at, word) == 1) return $(at - 1)
        return 0
    }
    { gsub(",", "") }
    /Compiling entry function/ {
        for (at = 1; at <= NF; ++at) if ($at == "function") { kernel = $(at + 1); chip = $(at + 3) }
        gsub("\047", "", kernel)
        gsub(/\047|sm_/, "", chip)
        kernels[kernel]
    }
    # Of the kernel, and of functions that it calls.
    /bytes spill stores/ {
        sub(/.*stack frame */, "")
        spills[kernel, chip] += $1 + $5
    }
    / Used .* registers/ {
        registers[kernel, chip] = number_before("registers")
        if ($0 ~ /bytes smem/) { sub(/ bytes smem.*/, ""); if ($NF > shared[kernel]) shared[kernel] = $NF + 0 }
    }
    END {
        count = split(chips, chip_of, " ")
        printf "%-36s", "registers on chip"
        for (at = 1; at <= count; ++at) printf " %6s", "sm_" chip_of[at]
        printf " %8s %s\n", "shared", "spills (bytes)"
        sorter = "sort"
        for (kernel in kernels) {
            line = sprintf("%-36s", kernel)
            spilled = ""
            for (at = 1; at <= count; ++at) {
                line = line sprintf(" %6s", registers[kernel, chip_of[at]])
                bytes = spills[kernel, chip_of[at]]
                if (bytes > 0) spilled = spilled " sm_" chip_of[at] ": " bytes
            }
            print line sprintf(" %8d %s", shared[kernel], spilled == "" ? "-" : spilled) | sorter
            if (spilled != "" && kernel ~ hot) bad = bad " " kernel
        }
        close(sorter)
        if (bad != "") { print "these kernels spill:" bad > "/dev/stderr"; exit 1 }
    }'
