#!/usr/bin/env bash
# Everything that only a CUDA device can tell, in one call of under nine minutes and without network:
#
#     scripts/gpu_check.sh OUTDIR
#
# Writes OUTDIR/{install,tests,memcheck,racecheck,bench}.log, kernels.jsonl, model.json and summary.md.
# Ends with 1 when anything was wrong, after writing what there is. GPU_CHECK_SECONDS (default 530)
# bounds the whole; steps that no longer fit are named in the summary, never passed over silently.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:?usage: scripts/gpu_check.sh OUTDIR}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root" || exit 1
python=${PYTHON:-python3}
deadline=$((SECONDS + ${GPU_CHECK_SECONDS:-530}))
failed=0
: >"$out/steps.txt"

# step NAME SECONDS COMMAND...: run within the time that is left, log, note how it ended.
step() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS code
    shift 2
    if ((left < 15)); then
        echo "$name|no time left" >>"$out/steps.txt"
        failed=1
        return 1
    fi
    ((limit > left)) && limit=$left
    echo "== $name (at most $limit s)"
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    tail -n 6 "$out/$name.log"
    if ((code == 0)); then
        echo "$name|ok|$((SECONDS - start)) s" >>"$out/steps.txt"
        return 0
    fi
    failed=1
    echo "$name|FAILED with code $code|$((SECONDS - start)) s" >>"$out/steps.txt"
    return 1
}

export ENDOR_REQUIRE_GPU=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export CUPY_CACHE_DIR=${CUPY_CACHE_DIR:-$out/.cupy}

nvidia-smi --query-gpu=name,driver_version,memory.total,pcie.link.gen.current,pcie.link.width.current \
    --format=csv >"$out/device.txt" 2>&1
if ! step install 90 "$python" -m pip install --no-build-isolation --no-deps --no-index -q -e .; then
    # An old setuptools or a read-only environment: run from the tree.
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    "$python" setup.py build_ext --inplace >>"$out/install.log" 2>&1
    "$python" -c 'import endor' >>"$out/install.log" 2>&1 || exit 1
    failed=0
    sed -i 's/^install|FAILED.*/install|run from the tree instead/' "$out/steps.txt"
fi

right=1
# Other packages' warnings (CuPy's about its CUDA path, say) are no concern here: -W default.
step tests 200 "$python" -m pytest tests/gpu -q --maxfail=20 -W default -p no:cacheprovider || right=0
if ((right)); then
    step bench 110 "$python" scripts/gpu_report.py kernels "$out"
    step model 230 "$python" scripts/gpu_report.py model "$out"
else
    echo "bench|not run: a result is wrong" >>"$out/steps.txt"
    echo "model|not run: a result is wrong" >>"$out/steps.txt"
fi
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
if [[ -n $sanitizer ]]; then
    subset="test_a_record_of_several_tensors or (test_raw and 8193 and BF16) or (test_product and 3 and BF16)"
    for tool in memcheck racecheck; do
        step "$tool" 90 "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes all \
            "$python" -m pytest tests/gpu/test_gpu_kernels.py -q -W default -p no:cacheprovider -k "$subset"
    done
else
    echo "sanitizer|not installed" >>"$out/steps.txt"
fi
"$python" scripts/gpu_report.py summary "$out"
cat "$out/summary.md"
exit "$failed"
