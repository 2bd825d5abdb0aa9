#!/usr/bin/env bash
# All checks: lint, types, tests, two at a time. Sets everything up first.
#
#     bash scripts/test.sh [arguments of pytest, with paths relative to the project's root; -n 0: one at a time]
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh" dev
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
