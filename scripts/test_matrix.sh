#!/usr/bin/env bash
# The full matrix: every model type in every weight format with the fewest, half and all slots, and long contexts; two
# tests at a time. Takes about half an hour.
#
#     bash scripts/test_matrix.sh [more arguments of pytest]
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh" dev
cd "$ROOT"
exec "$PYTHON" -m pytest -n 2 --dist load -m matrix "$@"
