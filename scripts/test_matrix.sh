#!/usr/bin/env bash
# The full matrix: every model type in every weight format with the fewest, half and all slots, and long contexts. Takes
# about half an hour.
#
#     bash scripts/test_matrix.sh [more arguments of pytest]
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh" dev
cd "$ROOT"
exec "$PYTHON" -m pytest -m matrix "$@"
