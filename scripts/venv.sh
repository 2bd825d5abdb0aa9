# Sourced by demo.sh and test.sh. Makes or reuses .venv in the project's root and installs the project into it:
#
#     . scripts/venv.sh [dev]     sets ROOT and PYTHON; "dev" adds what the tests need
#
# Installs again only if pyproject.toml has changed or the folder has moved. Needs bash 3.2 and Python 3.11.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$ROOT/.venv/bin/python"

say() { printf '%s\n' "$*" >&2; }

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

make_venv() {
    local python
    for python in python3.13 python3.12 python3.11 python3 python3.14; do
        if command -v "$python" >/dev/null 2>&1 && is_recent "$python"; then
            say "making .venv with $("$python" --version 2>&1)"
            if "$python" -m venv --clear "$ROOT/.venv" >&2 && "$PYTHON" -m pip --version >/dev/null 2>&1; then
                return 0
            fi
            rm -rf "$ROOT/.venv"
            say "error: $python cannot make a virtual environment; on Debian and Ubuntu: sudo apt install python3-venv"
            return 2
        fi
    done
    say "error: no Python 3.11 or newer found; install one, for example with 'brew install python@3.13' on a Mac"
    return 2
}

# $1: "" or "dev". What was installed last stands in .venv, together with where the project was then.
install_project() {
    local extra="${1:+[$1]}" stamp="$ROOT/.venv/installed${1:+-$1}" now
    now="$ROOT
$(cat "$ROOT/pyproject.toml")"
    if [ -z "$1" ] && [ -f "$ROOT/.venv/installed-dev" ]; then
        stamp="$ROOT/.venv/installed-dev"
        extra="[dev]"
    fi
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$now" ]; then
        return 0
    fi
    say "installing mlx_moecache$extra into .venv (once; takes some minutes)"
    if ! "$PYTHON" -m pip install --quiet --disable-pip-version-check -e "$ROOT$extra" >&2; then
        say "error: the installation failed; check the network and run the same command again"
        return 2
    fi
    printf '%s\n' "$now" >"$stamp"
}

if ! is_recent "$PYTHON"; then
    make_venv || exit $?
fi
install_project "${1:-}" || exit $?
