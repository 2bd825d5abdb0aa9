#!/usr/bin/env bash
# On an NVIDIA GPU, with MLX's CUDA backend: the tests that outputs equal those of stock mlx-lm, then the doctor, which
# decodes 1,000 tokens with few slots and compares every slot with its shard. Not part of the default test run.
#
#     bash scripts/test_cuda.sh [arguments of pytest instead of these tests, with paths relative to the project's root]
#
# Needs Linux, bash, and a driver for CUDA 13; for an older one: MLX_CUDA=12. The environment in .venv-cuda is kept.
# Exit code: 0 if everything passes, 1 if something fails, 2 if it cannot be run. The authors had no GPU to run it on.
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$ROOT"
release="${MLX_CUDA:-13}"
case "$release" in
    12 | 13) ;;
    *)
        say "error: MLX_CUDA must be 12 or 13, not '$release'"
        exit 2
        ;;
esac
if ! command -v nvidia-smi >/dev/null 2>&1; then
    say "error: there is no NVIDIA driver here (no nvidia-smi); bash scripts/test.sh tests on the CPU"
    exit 2
fi
folder="$ROOT/.venv-cuda"
python="$folder/bin/python"

# mlx[cpu], which the project asks for on Linux, and mlx[cuda] bring the same library: the last one installed stays.
prepare() {
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        say "making .venv-cuda (several GB)"
        mkdir -p "$folder" || return 2
        "$PYTHON" -m venv --clear "$folder" >&2 || return 2
        printf '*\n' >"$folder/.gitignore"
    fi
    pip() { "$python" -m pip "$@" --quiet --disable-pip-version-check >&2; }
    pip install -e "$ROOT[dev]" || return 2
    version="$("$python" -c 'from importlib.metadata import version; print(version("mlx"))')" || return 2
    pip install "mlx[cuda$release]==$version" || return 2
    pip uninstall --yes mlx-cpu || return 2
    pip install --force-reinstall --no-deps "mlx==$version" "mlx-cuda-$release==$version" || return 2
}

say "installing the project with MLX for CUDA $release"
if ! prepare; then
    say "error: cannot make .venv-cuda; check the network and run the same command again"
    exit 2
fi
if ! "$python" - <<'PYTHON'; then
import sys

try:
    import mlx.core as mx
except ImportError as e:
    sys.exit(f"MLX cannot be loaded: {e}")
sys.exit(None if mx.default_device() == mx.Device(mx.gpu) else "MLX computes on the CPU")
PYTHON
    say "error: MLX cannot use the GPU; nvidia-smi shows which CUDA its driver is for (MLX_CUDA=12 or 13)"
    exit 2
fi

failed=""
if [ $# -eq 0 ]; then
    set -- tests/test_exactness.py tests/test_slots.py tests/test_look_ahead.py tests/test_optimistic.py tests/test_kv_growth.py
fi
"$python" -m pytest "$@" || failed=yes
"$python" -m mlx_moecache.doctor || failed=yes
[ -z "$failed" ]
