#!/usr/bin/env bash
# The tests against the oldest and the newest mlx-lm and mlx that pyproject.toml allows. Not part of the default test run.
#
#     bash scripts/test_versions.sh [oldest|newest] [arguments of pytest, with paths relative to the project's root]
#
# Each end of the range has an environment of its own in .venv-versions, which is kept. Exit code: 0 if all tests pass,
# 1 if some fail, 2 if an environment cannot be made. Needs bash 3.2; takes as many times as long as the test run.
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh" dev
cd "$ROOT"
folder="$ROOT/.venv-versions"
trap 'exit 130' INT # pytest ends Ctrl-C in its own way, and bash would go on with the next environment

# The lower ends of the range, as requirements: "mlx==0.32.2 mlx-lm[cpu]==0.32.0".
oldest_requirements() {
    "$PYTHON" - <<'PYTHON'
import sys
import tomllib

from packaging.requirements import Requirement

with open("pyproject.toml", "rb") as file:
    lines = tomllib.load(file)["project"]["dependencies"]
pins = []
for r in map(Requirement, lines):
    if r.name in ("mlx", "mlx-lm") and (r.marker is None or r.marker.evaluate()):
        lower = [s.version for s in r.specifier if s.operator == ">="]
        extras = f"[{','.join(sorted(r.extras))}]" if r.extras else ""
        pins += [f"{r.name}{extras}=={version}" for version in lower]
if len(pins) != 2:
    sys.exit(f"error: pyproject.toml should give mlx and mlx-lm one lower end (>=) each, but gives: {pins or 'none'}")
print(*pins)
PYTHON
}

# $1: oldest or newest. Makes or updates its environment.
prepare() {
    local python="$folder/$1/bin/python" pins
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        say "making .venv-versions/$1"
        mkdir -p "$folder" || return 2
        printf '*\n' >"$folder/.gitignore"
        "$PYTHON" -m venv --clear "$folder/$1" >&2 || return 2
    fi
    if [ "$1" = oldest ]; then
        pins="$(oldest_requirements)" || exit 2
    else
        pins="--upgrade mlx mlx-lm"
    fi
    say "installing the project with the $1 mlx and mlx-lm"
    # shellcheck disable=SC2086  # several words
    "$python" -m pip install --quiet --disable-pip-version-check -e "$ROOT[dev]" $pins >&2
}

versions() {
    "$folder/$1/bin/python" -c 'from importlib.metadata import version as v; print("mlx-lm", v("mlx-lm"), "with mlx", v("mlx"))'
}

ends="oldest newest"
case "${1:-}" in
    oldest | newest)
        ends="$1"
        shift
        ;;
esac
for end in $ends; do
    if ! prepare "$end"; then
        say "error: cannot make .venv-versions/$end; check the network and run the same command again"
        exit 2
    fi
done

failed=""
summary=""
for end in $ends; do
    what="$end: $(versions "$end")"
    say "== $what"
    if "$folder/$end/bin/python" -m pytest "$@"; then
        summary="$summary
$what: passed"
    else
        summary="$summary
$what: FAILED"
        failed=yes
    fi
done
say "$summary"
[ -z "$failed" ]
