#!/usr/bin/env bash
# The main job on the bundled demo model: a story with half of the experts in memory. Sets everything up first.
#
#     bash scripts/demo.sh [flags of mlx_moecache generate]
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh" ""

slots="--slots 30"
for argument in "$@"; do
    case "$argument" in
        --memory | --memory=*) slots="" ;; # the two exclude each other
    esac
done
prompt="Tell me a story about a little robot and a garden."
shown="" # what follows the prompt, quoted for the shell
if [ $# -gt 0 ]; then
    shown="$(printf ' %q' "$@")"
fi
say "+ python -m mlx_moecache.generate ${slots:+$slots }--prompt \"$prompt\"$shown"
# shellcheck disable=SC2086  # two words, or none
exec "$PYTHON" -m mlx_moecache.generate $slots --prompt "$prompt" "$@"
