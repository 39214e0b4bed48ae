# shellcheck shell=bash
# Creates .venv and installs the project into it. The other scripts source this file. audit and environments set other
# values of venv, python, pythons, constraints and automatic_torch. All messages go to stderr.

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
python=$venv/bin/python
constraints=$root/constraints.txt
pythons=(python3 python3.14 python3.13 python3.12 python3.11)
automatic_torch=yes # if empty, only UNFOG_TORCH_INDEX and pip's configuration say where PyTorch comes from
cpu_index=https://download.pytorch.org/whl/cpu

say() { printf 'unfog: %s\n' "$*" >&2; }

# set_up EXTRA: installs the project with an extra of pyproject.toml, or without an extra if EXTRA is ''. Does nothing if
# the extra is installed and `inputs` has not changed. $venv/unfinished exists while an installation changes packages. If
# it exists at the start, an earlier installation was interrupted, and the venv is created again.
set_up() {
  local stamp=$venv/stamp-$1 base before
  # The lock is on the folder, so it needs no lock file. pip inherits the lock and holds it if this script is killed.
  exec 9<"$root"
  if ! flock --nonblock 9; then
    say "waiting for another process that installs into $venv"
    flock 9
  fi
  if [[ -e $venv/unfinished || ! -f $stamp || $(<"$stamp") != "$(inputs)" ]]; then
    if [[ -e $venv/unfinished ]] || ! "$python" -I -c 'import pip' 2>/dev/null; then
      base=$(find_python)
      say "creating $venv with $("$base" --version)"
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
    inputs | tee -- "$venv/stamp-" > "$stamp" # an extra includes the base installation
    rm -- "$venv/unfinished"
  fi
  exec 9<&-
}

# Prints the values that an installation depends on: Python version, digest of the requirements, project folder.
inputs() {
  "$python" -I -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null || true
  cat -- "$root/pyproject.toml" "$constraints" | sha256sum
  printf '%s\n' "$root"
}

# Prints the first of $pythons that is 3.11 or newer and can create a venv.
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
    say "$without_venv has no module venv. Install the package $without_venv-venv"
  else
    say "no Python 3.11 or newer found (tried: ${pythons[*]}). Install ${pythons[0]} and ${pythons[0]}-venv"
  fi
  return 1
}

# install EXTRA: runs pip, with an index for PyTorch if torch_index names one.
install() {
  local name=torch index torch
  say "installing into $venv. This takes minutes if PyTorch is downloaded (CPU build: about 200 MB, CUDA build: several GB). Progress: tail -f $venv/pip.log"
  index=$(torch_index)
  if [[ -n $index ]]; then
    if [[ -n $1 ]]; then # most extras need torchvision, and its build must match that of PyTorch
      name='torch(vision)?'
    fi
    mapfile -t torch < <(grep -oE "\"$name>=[^\"]+" -- "$root/pyproject.toml" | tr -d '"')
    # Without the constraints, because this index has few versions of PyTorch's own dependencies.
    run_pip --index-url "$index" "${torch[@]}"
    before=$(packages)
  fi
  run_pip --constraint "$constraints" --editable ".${1:+[$1]}"
}

# Prints the index that PyTorch is installed from, or nothing if pip is to use its default. On x86-64 Linux, PyPI has only
# the CUDA build of PyTorch, which takes several GB. A machine without an NVIDIA GPU gets the CPU build instead. If pip's
# configuration says where packages come from, this does not change it.
torch_index() {
  if [[ -n ${UNFOG_TORCH_INDEX:-} ]]; then
    printf '%s\n' "$UNFOG_TORCH_INDEX"
  elif [[ -z $automatic_torch || $(uname -sm) != 'Linux x86_64' ]]; then
    return
  elif is_installed 'torch-*+cpu'; then
    # Newer versions and torchvision must be CPU builds, too.
    pip_has_a_source || printf '%s\n' "$cpu_index"
  elif is_installed 'torch-*'; then
    return
  elif pip_has_a_source; then
    say "installing PyTorch from the package sources in pip's configuration. To use another index, set UNFOG_TORCH_INDEX"
  elif has_nvidia_gpu; then
    say "NVIDIA GPU found. Downloading PyTorch's CUDA build (several GB). To get the CPU build, set UNFOG_TORCH_INDEX=$cpu_index"
  else
    say "no NVIDIA GPU found. Installing PyTorch's CPU build ($cpu_index). To get the CUDA build (several GB), remove $venv and start again with UNFOG_TORCH_INDEX set to an index of pytorch.org/get-started"
    printf '%s\n' "$cpu_index"
  fi
}

# is_installed PATTERN: true if the venv has a package whose NAME-VERSION matches the pattern.
is_installed() { compgen -G "$venv/lib/python*/site-packages/$1.dist-info" >/dev/null; }

# pip lists its configuration files and its PIP_* environment variables. Empty values have no effect. pypi-url is another
# name of index-url.
pip_has_a_source() {
  local option='(index-url|pypi-url|extra-index-url|find-links)=.[^'"'"'"]' no_index="no-index='(1|true|yes|on)'"
  "$python" -m pip config list | grep -iE "^(global|install|:env:)\.($option|$no_index)" >/dev/null
}

# WSL has a GPU without /dev/nvidiactl. nvidia-smi can be installed without a GPU or a driver, and fails then.
has_nvidia_gpu() { [[ -e /dev/nvidiactl ]] || timeout 30 nvidia-smi --list-gpus >/dev/null 2>&1; }

packages() { ls -A -- "$venv"/lib/python*/site-packages; }

# If pip fails before it changes a package, for example without network access, the venv is still usable.
keep_unchanged() {
  if [[ $(packages) == "$before" ]]; then
    rm -f -- "$venv/unfinished"
  fi
}

# Writes the output of pip to a file, and shows it only if pip fails.
run_pip() {
  if ! (cd -- "$root" && "$python" -m pip install "$@" >"$venv/pip.log" 2>&1); then
    cat -- "$venv/pip.log" >&2
    say "installation failed. See the output of pip above, then run the same command again"
    exit 1
  fi
}
