#!/usr/bin/env bash
# Makes .venv and installs what the repository needs. Run it as often as you like: when nothing changed it only looks.
#
#   bash scripts/setup.sh                  # everything to train and evaluate; torch for this machine
#   bash scripts/setup.sh dev=true         # also what the tests need
#   bash scripts/setup.sh kernels=true     # also builds mamba_ssm and causal_conv1d (needs nvcc and a CUDA build of torch)
#   bash scripts/setup.sh system=true      # keep the torch and triton this Python already has (a container, a cluster module)
#   bash scripts/setup.sh python=python3.12
#
# Without a network, wheels in a folder will do: PIP_NO_INDEX=1 PIP_FIND_LINKS=folder bash scripts/setup.sh
set -euo pipefail
cd "$(dirname "$0")/.."

dev=false
kernels=false
system=false
python=python3
quiet=--quiet
if [ -t 1 ]; then quiet=""; fi # a person sees the progress of a download of gigabytes

stop() {
    echo "setup: $*" >&2
    exit 2
}

for argument in "$@"; do
    argument=${argument#--}
    case "$argument" in
        dev=true | dev=false | kernels=true | kernels=false | system=true | system=false | python=?*)
            printf -v "${argument%%=*}" %s "${argument#*=}" ;;
        *) stop "unknown argument '$argument'; known: dev=true kernels=true system=true python=COMMAND" ;;
    esac
done

make_environment() {
    command -v "$python" >/dev/null || stop "there is no '$python' here; name yours with python=COMMAND"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        stop "'$python' is no working Python 3.10 or newer; name another with python=COMMAND"
    local packages=""
    if [ "$system" = true ]; then
        "$python" - <<'PY' || stop "system=true keeps this Python's torch, which has to be there and at least 2.11"
import sys, torch
version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
sys.exit(version < (2, 11))
PY
        # its pip too: the one that venv brings comes with an old setuptools, which would hide the installed one
        packages="--system-site-packages --without-pip"
    fi
    echo "setup: making .venv with $("$python" --version)"
    "$python" -m venv --clear $packages .venv ||
        stop "'$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv"
    link_outer_packages
}

# A Python that is itself inside a virtual environment hands on only what lies below it; with system=true its own packages count.
link_outer_packages() {
    [ "$system" = true ] || return 0
    "$python" - .venv/bin/python <<'PY'
import pathlib, site, subprocess, sys, sysconfig
if sys.prefix != sys.base_prefix:
    inner = subprocess.check_output([sys.argv[1], "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    pathlib.Path(inner.strip(), "outer_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
PY
}

# The file that was installed is kept as the stamp: same file, nothing to do.
install() {
    local file=$1
    shift
    local stamp=.venv/installed-$file
    if cmp -s "$file" "$stamp"; then return 0; fi
    echo "setup: installing $file"
    local wanted=.venv/wanted-$file
    if [ -e .venv/system ]; then grep -vE '^(torch|triton)[=<>]' "$file" >"$wanted"; else cp "$file" "$wanted"; fi
    .venv/bin/python -m pip install $quiet --disable-pip-version-check "$@" -r "$wanted" ||
        stop "pip could not install $file (above). What is there already stays; run this again when that is mended"
    rm -f "$wanted"
    cp "$file" "$stamp.new"
    mv "$stamp.new" "$stamp"
}

build_kernels() {
    if cmp -s requirements-kernels.txt .venv/installed-requirements-kernels.txt; then return 0; fi
    command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] ||
        stop "kernels=true compiles CUDA code and found no nvcc; install the CUDA toolkit of torch's version (or set CUDA_HOME), or do without: the Triton and torch implementations need no compiler"
    .venv/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
        stop "kernels=true needs a CUDA build of torch and .venv has a CPU build; do without: the torch implementations run on CPUs"
    .venv/bin/python -m pip install $quiet --disable-pip-version-check setuptools wheel ninja packaging einops
    # the packages try to fetch a ready build first; a local build fits the installed torch for certain
    MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE install requirements-kernels.txt --no-build-isolation --no-deps
}

look_at_gpu() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU || return 0
    .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || cat >&2 <<'TEXT'
setup: warning: this machine has an NVIDIA GPU that the installed torch cannot use. Either its driver is older than
setup: the CUDA version of that torch (update the driver, or install a torch >= 2.11 that suits it and run
setup: 'bash scripts/setup.sh system=true'), or pip chose a CPU build (name the index of the CUDA builds in PIP_INDEX_URL).
TEXT
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    make_environment
    if [ "$system" = true ]; then touch .venv/system; fi
fi
if [ "$system" = true ] && [ ! -e .venv/system ]; then
    stop "there is a .venv with a torch of its own; delete it first (rm -r .venv), then system=true makes another"
fi
if cmp -s requirements.txt .venv/installed-requirements.txt; then fresh=no; else fresh=yes; fi
install requirements.txt
if [ "$dev" = true ]; then install requirements-dev.txt; fi
if [ "$kernels" = true ]; then build_kernels; fi
if [ "$fresh" = yes ]; then look_at_gpu; fi
echo "setup: .venv is ready"
