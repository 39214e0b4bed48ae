# shellcheck shell=bash
# Makes .venv and keeps it as pyproject.toml asks; sourced by serve, test and check.
#
# A stamp in .venv says what was installed for which pyproject.toml, constraints.txt, Python and folder: where it fits,
# nothing is done.
# A venv that an interrupted install left damaged is made anew. Everything said here goes to stderr.

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
python=$venv/bin/python
constraints=$root/constraints.txt
pythons=(python3 python3.14 python3.13 python3.12 python3.11)

say() { printf 'unfog: %s\n' "$*" >&2; }

# set_up serve | set_up dev: what serving needs, or that and the development extras.
set_up() {
  local kind=$1
  # The lock is on the folder: it needs no file of its own, and pip holds it on where this script is killed.
  exec 9<"$root"
  if ! flock --nonblock 9; then
    say "waiting for another set-up of $venv"
    flock 9
  fi
  if [[ -e $venv/unfinished ]] || ! is_stamped "$kind"; then
    if ! is_sound; then
      make_venv
    fi
    install "$kind"
  fi
  exec 9<&-
}

is_stamped() {
  local now
  now=$(stamp 2>/dev/null)
  [[ -n $now && -f $venv/stamp-$1 && $(<"$venv/stamp-$1") == "$now" ]]
}

stamp() {
  "$python" -I - "$root" "$constraints" <<'PYTHON'
import hashlib, pathlib, sys
root, constraints = map(pathlib.Path, sys.argv[1:])
declared = (root / "pyproject.toml").read_bytes() + constraints.read_bytes()
print(*sys.version_info[:2], hashlib.sha256(declared).hexdigest(), root)
PYTHON
}

# Whether the venv can be installed into: its Python runs, has pip, and every installed file is there in full.
is_sound() {
  "$python" -I - 2>/dev/null <<'PYTHON'
import importlib.metadata, pathlib, sys, sysconfig
import pip
site = pathlib.Path(sysconfig.get_path("purelib"))
assert sys.version_info >= (3, 11) and sys.prefix != sys.base_prefix
assert not any(site.glob("~*"))  # what pip moved away and never moved back
for package in importlib.metadata.distributions(path=[str(site)]):
    assert package.files is not None  # pip writes the list of files last
    for file in package.files:
        assert file.size is None or file.locate().stat().st_size == file.size
PYTHON
}

make_venv() {
  local base
  base=$(find_python)
  say "making $venv with $("$base" --version)"
  rm -rf -- "$venv"
  mkdir -- "$venv"
  touch -- "$venv/unfinished"
  "$base" -m venv "$venv" >&2
}

# Prints the first of $pythons that will do.
find_python() {
  local candidate package=
  for candidate in "${pythons[@]}"; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
    package=${package:-$candidate-venv}
  done
  if [[ -n $package ]]; then
    say "${package%-venv} comes without its venv module: install the package $package"
  elif ((${#pythons[@]} == 1)); then
    say "${pythons[0]} is needed and was not found: install ${pythons[0]} and ${pythons[0]}-venv"
  else
    say "Python 3.11 or newer is needed and none was found: install python3 and python3-venv"
  fi
  return 1
}

install() {
  local kind=$1 extras='' torch=() before
  if [[ $kind == dev ]]; then
    extras='[dev]'
  fi
  touch -- "$venv/unfinished"
  before=$(packages)
  say "installing into $venv"
  if [[ -n ${UNFOG_TORCH_INDEX:-} ]]; then
    mapfile -t torch < <(torch_requirements "$kind")
    # Without the constraints: this index has few versions of PyTorch's own dependencies.
    run_pip --index-url "$UNFOG_TORCH_INDEX" "${torch[@]}"
  elif [[ $(uname -sm) == 'Linux x86_64' && $before != *$'\n'torch$'\n'* ]] && ! command -v nvidia-smi >/dev/null; then
    say "no NVIDIA GPU is seen here: UNFOG_TORCH_INDEX can name an index with PyTorch's far smaller CPU build (README)"
  fi
  run_pip --constraint "$constraints" --editable ".$extras"
  stamp > "$venv/stamp-serve"
  if [[ $kind == dev ]]; then
    stamp > "$venv/stamp-dev"
  fi
  rm -- "$venv/unfinished"
}

# Where pip gives up before it touched anything (no network), what was there stays good for its own stamp.
run_pip() {
  if ! (cd -- "$root" && "$python" -m pip install "$@" >&2); then
    if [[ $(packages) == "$before" ]]; then
      rm -f -- "$venv/unfinished"
    fi
    say "the installation failed, pip says why above; start again to go on"
    exit 1
  fi
}

packages() { ls -A -- "$venv"/lib/python*/site-packages; }

# The requirements that come from PyTorch's index: torch, for development torchvision too.
torch_requirements() {
  "$python" -I - "$1" "$root/pyproject.toml" <<'PYTHON'
import re, sys, tomllib
project = tomllib.load(open(sys.argv[2], "rb"))["project"]
wanted = project["dependencies"]
if sys.argv[1] == "dev":
    wanted += sum(project["optional-dependencies"].values(), [])
print(*(requirement for requirement in wanted if re.match(r"torch(vision)?\b", requirement)), sep="\n")
PYTHON
}
