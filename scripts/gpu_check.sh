#!/usr/bin/env bash
# What only a CUDA device can tell, without network, in calls of under nine minutes:
#
#     scripts/gpu_check.sh OUT                       # as much as fits 530 s, in the order below
#     scripts/gpu_check.sh OUT --part kernels        # one part, with all of the time
#
#     kernels    every kernel's bits against the reference, in one process
#     bench      kernels, then the link, beside the card's own copy bandwidth
#     model      models on the device, then a model under a VRAM cap beside other systems
#     sanitizer  a subset of `kernels` under compute-sanitizer's memcheck and racecheck
#     pruning    calibrated pruning on the device (only when asked for)
#
# Leaves three files in OUT, whatever happens: summary.md, results.json and logs.tar.gz; all else goes to a
# scratch folder. Ends with 1 when a result of Endor's was wrong or a step of it did not end. What was
# skipped or had no time left, and other systems that failed, are named in the summary and fail nothing.
# GPU_CHECK_SECONDS (default 530) bounds the whole, PYTHON is the interpreter.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
usage="usage: scripts/gpu_check.sh OUT [--part kernels|bench|model|sanitizer|pruning]..."
out=${1:?$usage}
shift
parts=()
while (($#)); do
    case "$1 ${2-}" in
    "--part kernels" | "--part bench" | "--part model" | "--part sanitizer" | "--part pruning") parts+=("$2") ;;
    *)
        echo "$usage" >&2
        exit 2
        ;;
    esac
    shift 2
done
((${#parts[@]})) || parts=(kernels bench model sanitizer)
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$root" || exit 1
scratch=$(mktemp -d "${TMPDIR:-/tmp}/endor-gpu-check-XXXXXX") || exit 1
logs=$scratch/logs
mkdir "$logs"
python=${PYTHON:-python3}
deadline=$((SECONDS + ${GPU_CHECK_SECONDS:-530}))
failed=0

finish() {
    "$python" "$root/scripts/gpu_report.py" summary "$logs" || failed=1
    mv -f "$logs/summary.md" "$logs/results.json" "$out/" || failed=1
    tar -czf "$out/logs.tar.gz" -C "$scratch" logs
    rm -rf "$scratch"
    cat "$out/summary.md"
    exit "$failed"
}

note() { echo "$1|$2|${3-}" >>"$logs/steps.txt"; }

# step NAME SECONDS COMMAND...: run within the time that is left, log, note how it ended.
step() {
    local name=$1 limit=$2 left=$((deadline - SECONDS - 10)) start=$SECONDS code
    shift 2
    if ((left < 15)); then
        note "$name" "no time left"
        return 1
    fi
    ((limit > left)) && limit=$left
    echo "== $name (at most $limit s)"
    timeout --kill-after=10 "$limit" "$@" >"$logs/$name.log" 2>&1
    code=$?
    tail -n 6 "$logs/$name.log"
    case $code in
    0) note "$name" ok "$((SECONDS - start)) s" && return 0 ;;
    124 | 137) note "$name" "NOT ENDED after $limit s" "$((SECONDS - start)) s" ;;
    *) note "$name" "FAILED with code $code" "$((SECONDS - start)) s" ;;
    esac
    failed=1
    return 1
}

export ENDOR_REQUIRE_GPU=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# The tree itself is used, whatever is installed.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export CUPY_CACHE_DIR=${CUPY_CACHE_DIR:-$scratch/cupy}

nvidia-smi --query-gpu=name,driver_version,memory.total,pcie.link.gen.current,pcie.link.width.current \
    --format=csv >"$logs/device.txt" 2>&1 || echo "nvidia-smi: not there" >>"$logs/device.txt"
# The C kernels where a compiler is at hand; without them the numpy reference encodes, more slowly.
timeout 150 "$python" setup.py build_ext --inplace >"$logs/build.log" 2>&1 || note build "no C kernels (build.log): numpy encodes"
step device 60 "$python" -c 'from endor.kernels import gpu_device as gpu; gpu.require("cuda"); print(gpu.describe())' || {
    failed=1
    finish
}

# Warnings of other packages (CuPy's about its CUDA path, say) are no concern here: -W default.
pytest=("$python" -m pytest -q -W default -p no:cacheprovider --maxfail=20)
spread=()
"$python" -c 'import xdist' 2>/dev/null && spread=(-n 4)

for part in "${parts[@]}"; do
    case $part in
    kernels)
        # One process: each kernel is compiled once. Wrong bits make all that follows worthless.
        step kernels 300 "${pytest[@]}" tests/gpu/test_gpu_kernels.py || {
            note "all other parts" "not run: kernels did not pass"
            finish
        }
        ;;
    bench)
        step bench-kernels 150 "$python" scripts/gpu_report.py kernels "$logs"
        step bench-link 60 "$python" scripts/gpu_report.py link "$logs"
        ;;
    model)
        step model-tests 200 "${pytest[@]}" "${spread[@]}" tests/gpu/test_gpu_model.py tests/gpu/test_gpu_bench.py
        step model 280 "$python" scripts/gpu_report.py model "$logs"
        ;;
    sanitizer)
        sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
        if [[ -z $sanitizer ]]; then
            note sanitizer "skipped: compute-sanitizer is not installed"
            continue
        fi
        subset="test_a_record_of_several_tensors or (test_raw and 8193 and BF16) or (test_product and 3 and BF16)"
        for tool in memcheck racecheck; do
            # torch's allocator hands out parts of large blocks, in which an overrun would go unseen.
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 200 "$sanitizer" --tool "$tool" --error-exitcode 9 \
                --target-processes all "${pytest[@]}" tests/gpu/test_gpu_kernels.py -k "$subset"
        done
        ;;
    pruning)
        step pruning 400 "${pytest[@]}" "${spread[@]}" tests/gpu/test_gpu_pruning.py
        ;;
    esac
done
finish
