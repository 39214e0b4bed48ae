# shellcheck shell=bash
# Makes .venv and installs the project into it. The other scripts source this file. audit and environments set other
# values of venv, python, pythons and constraints. All messages go to stderr.

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
python=$venv/bin/python
constraints=$root/constraints.txt
pythons=(python3 python3.14 python3.13 python3.12 python3.11)

say() { printf 'unfog: %s\n' "$*" >&2; }

# set_up EXTRA: installs the project with an extra of pyproject.toml, or without one for ''. Does nothing if this was done
# before and `inputs` has not changed. $venv/unfinished exists while an installation changes packages. If it exists at the
# start, an installation was interrupted in the middle, and a new venv is made.
set_up() {
  local stamp=$venv/stamp-$1 base before
  # The lock is on the folder, so it needs no file. pip inherits it and keeps it if this script is killed.
  exec 9<"$root"
  if ! flock --nonblock 9; then
    say "waiting for another set-up of $venv"
    flock 9
  fi
  if [[ -e $venv/unfinished || ! -f $stamp || $(<"$stamp") != "$(inputs)" ]]; then
    if [[ -e $venv/unfinished ]] || ! "$python" -I -c 'import pip' 2>/dev/null; then
      base=$(find_python)
      say "making $venv with $("$base" --version)"
      rm -rf -- "$venv"
      mkdir -- "$venv"
      touch -- "$venv/unfinished"
      "$base" -m venv "$venv" >&2
    fi
    touch -- "$venv/unfinished"
    before=$(packages)
    trap keep_unchanged EXIT
    install "$1"
    trap - EXIT
    inputs | tee -- "$venv/stamp-" > "$stamp" # with an extra, the base is installed, too
    rm -- "$venv/unfinished"
  fi
  exec 9<&-
}

# Prints what an installation depends on.
inputs() {
  "$python" -I -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null || true
  cat -- "$root/pyproject.toml" "$constraints" | sha256sum
  printf '%s\n' "$root"
}

# Prints the first of $pythons that can make a venv.
find_python() {
  local candidate without_venv=
  for candidate in "${pythons[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
        printf '%s\n' "$candidate"
        return
      fi
      without_venv=${without_venv:-$candidate}
    fi
  done
  if [[ -n $without_venv ]]; then
    say "$without_venv has no module venv: install the package $without_venv-venv"
  else
    say "no Python 3.11 or newer was found: install ${pythons[0]} and ${pythons[0]}-venv"
  fi
  return 1
}

# install EXTRA
install() {
  local name=torch torch
  say "installing into $venv"
  if [[ -n ${UNFOG_TORCH_INDEX:-} ]]; then
    if [[ $1 == dev ]]; then
      name='torch(vision)?'
    fi
    mapfile -t torch < <(grep -oE "\"$name>=[^\"]+" -- "$root/pyproject.toml" | tr -d '"')
    # Without the constraints: this index has few versions of PyTorch's own dependencies.
    run_pip --index-url "$UNFOG_TORCH_INDEX" "${torch[@]}"
    before=$(packages)
  elif [[ $(uname -sm) == 'Linux x86_64' && $before != *$'\n'torch$'\n'* ]] && ! command -v nvidia-smi >/dev/null; then
    say "no NVIDIA GPU is seen here: UNFOG_TORCH_INDEX can name an index with PyTorch's far smaller CPU build (README)"
  fi
  run_pip --constraint "$constraints" --editable ".${1:+[$1]}"
}

packages() { ls -A -- "$venv"/lib/python*/site-packages; }

# If pip fails or is interrupted before it has changed a package, such as without a network, the venv is still good.
keep_unchanged() {
  if [[ $(packages) == "$before" ]]; then
    rm -f -- "$venv/unfinished"
  fi
}

run_pip() {
  if ! (cd -- "$root" && "$python" -m pip install "$@" >&2); then
    say "the installation failed, pip says why above; start again to go on"
    exit 1
  fi
}
