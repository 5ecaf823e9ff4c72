#!/usr/bin/env bash
# Checks and times llm8 on this machine's NVIDIA GPU: unpack llm8-gpu.tar.gz and run this. It needs NVIDIA's driver, 580
# or later. What is right comes first: the times are of no use without it. `run.sh checks sanitize times` is all of it.
set -uo pipefail
cd "$(dirname "$0")"
steps=" ${*:-checks sanitize times} "
for step in $steps; do
    case $step in checks | sanitize | times) ;; *) echo "$step: no such step" >&2 && exit 2 ;; esac
done
is_asked() { [[ $steps == *" $1 "* ]]; }
# The libraries that came along; where they were left out, as they are large, those that are here.
python_folders=$(python3 -c 'import site; print(*[p + "/nvidia/cu13/lib" for p in site.getsitepackages()])' 2>/dev/null)
for folder in $python_folders /usr/local/cuda*/lib64 "$PWD/lib"; do
    [ -e "$folder/libcublas.so.13" ] && LD_LIBRARY_PATH=$folder:${LD_LIBRARY_PATH:-}
done
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-} LLM8_FIXTURES=$PWD/fixtures
missing=$(ldd ./llm8 | sed -n 's/^\s*\(\S*\) => not found$/\1/p' | tr '\n' ' ')
[ -z "$missing" ] || { echo "not found here: $missing(libcuda.so.1 comes with NVIDIA's driver)" >&2; exit 1; }
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
failed=0
run() { echo "== $*"; "$@" || { echo "== FAILED: $*"; failed=1; }; }

if is_asked checks; then run ./gpu-tests --ignored --test-threads 1 --nocapture; fi

if is_asked sanitize; then
    sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    if [ -x "$sanitizer" ]; then
        for tool in memcheck racecheck; do
            # The ops alone: whole models take hours under these.
            run "$sanitizer" --tool "$tool" --error-exitcode 1 ./gpu-tests --ignored --test-threads 1 \
                weights small_products float_layers neighbours small_ops attention
        done
    else
        echo "== compute-sanitizer is not here: no memcheck, no racecheck"
    fi
fi

if is_asked times && [ $failed = 0 ]; then
    run ./layer_times
    for model in bigscience/bloom-1b7 bigscience/bloomz-7b1 facebook/opt-6.7b; do
        run ./llm8 bench -q --device cuda -m "$model" --dummy-weights --precision int8,f16 --prompt-len 2048 --gen-len 64 --context 64
        run ./llm8 bench -q --device cuda -m "$model" --dummy-weights --precision int8 --int8-head --prompt-len 0 --gen-len 64 --context 64 --batch 1,8
    done
fi
exit $failed
