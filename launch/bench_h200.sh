#!/usr/bin/env bash
# Measure the paper's stream on one accelerator, made for an H200, in less than ten minutes.
#
#     launch/bench_h200.sh       the 5B network, 1280x704, bfloat16, with random weights
#     launch/bench_h200.sh toy   a network of a few thousand parameters: does all of it work here?
#
# Needs jax with the plug-in of the accelerator, flax, numpy, pillow and what they bring, einops and
# ml_collections; with av also the figure of what is delivered as H.264. Everything lies in $OUT
# (default out/bench_h200), complete after each part, so that what has been measured stays if a
# later part fails or $LIMIT (default 580 seconds) ends it:
#
#     throughput.json, .txt   cold and warm starts, denoising alone, decoding
#     latency.json, .txt      delivered, first frame, garment switches; trace/, a profile of chunks
#     nhwc.json, .txt         decoding with convolutions whose channels lie last, if time is left
#     compiled/               the compiled programs, which all parts share
#
# The exit code is that of the first part that failed.
set -uo pipefail

SIZE=${1:-5b}
OUT=${OUT:-out/bench_h200}
LIMIT=${LIMIT:-580}
LEAST=${LEAST:-150} # seconds that the last part needs
PYTHON=${PYTHON:-.venv/bin/python}

case "$SIZE" in
    5b)
        FLAGS=(--config=configs/wan22_5b.py --repeats=3 --switches=50)
        ;;
    toy)
        FLAGS=(--config=configs/runway_tiny.py:smoke --config.video.height=32 --config.video.width=16
            --config.sampler.steps=1 --frames=33 --repeats=1 --switches=2)
        ;;
    *)
        echo "$0: size is '$SIZE'; expected 5b or toy" >&2
        exit 2
        ;;
esac

[[ -x "$PYTHON" ]] || PYTHON=python3
mkdir -p "$OUT" || exit
OUT=$(cd "$OUT" && pwd)
rm -rf "$OUT/compiled"
export JAX_COMPILATION_CACHE_DIR="$OUT/compiled" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1
CODE=0

# One part: its name, then flags of its own.
part() {
    local name=$1 left=$((LIMIT - SECONDS)) code
    shift
    if ((left < 10)); then
        echo "== $name: left out, no time is left"
        return
    fi
    echo "== $name: at most $left seconds"
    timeout "$left" "$PYTHON" -m launch.bench "${FLAGS[@]}" --weights=random \
        --out="$OUT/$name.json" "$@" | tee "$OUT/$name.txt"
    code=${PIPESTATUS[0]}
    ((code == 0)) || echo "== $name: ended with code $code" >&2
    ((CODE != 0)) || CODE=$code
}

part throughput --only=start,denoise,decode --starts=1
part latency --only=delivered,latency --profile="$OUT/trace"
if ((LIMIT - SECONDS >= LEAST)); then
    XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_force_conv_nhwc=true" part nhwc --only=decode
fi
echo "== $SECONDS seconds; everything is in $OUT"
exit "$CODE"
