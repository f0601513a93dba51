#!/usr/bin/env bash
# Makes .venv: the pinned dependencies, this project (editable), and the fast JPEG decoder and FFCV where their system
# libraries are at hand; as root, or with sudo that asks nothing, it installs those that are missing.
# `make` calls it; on a cluster, run it once on a file system that every node sees.
#   launch/setup.sh              everything
#   FFCV=0 launch/setup.sh       without FFCV (everything but data.format=ffcv works)
#   PYTHON=python3.12 launch/setup.sh
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv
python=${PYTHON:-python3}
say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

command -v "$python" >/dev/null || fail "$python is not there; install Python >= 3.11 or name one: PYTHON=/path/to/python3 make setup"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) && [[ $version =~ ^[0-9]+\.[0-9]+$ ]] \
  || fail "$python is not a Python interpreter: name one: PYTHON=/path/to/python3 make setup"
[[ ${version%.*} -gt 3 || ( ${version%.*} = 3 && ${version#*.} -ge 11 ) ]] \
  || fail "$python is Python $version, too old: Python >= 3.11 is needed (PYTHON=/path/to/python3 make setup)"
case ${FFCV:-1} in 0 | 1) ;; *) fail "FFCV=$FFCV: 0 leaves it out, 1 builds it where it can be built" ;; esac
[ "${VENV:-$venv}" -ef $venv ] || [ "${VENV:-$venv}" = $venv ] || fail "VENV=$VENV: setup makes $venv here; VENV is for the launchers"
if [ -n "${PYTHON:-}" ] && [ -x $venv/bin/python ]; then
  there=$($venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)
  [ "$there" = "$version" ] || fail "$venv is of Python ${there:-unknown}, and PYTHON=$python is $version: rm -r $venv, then again"
fi
[ -x $venv/bin/pip ] || "$python" -m venv $venv \
  || fail "'$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv"

jpeg_packages=(gcc libc6-dev libjpeg-dev python3-dev)
jpeg_hint="the fast JPEG decoder is not built: ${jpeg_packages[*]} (Debian names, libjpeg-turbo 2.0.6 or later) have to be installed first, then 'launch/setup.sh' again. All works without; decoding is slower."
ffcv_packages=(g++ pkg-config libturbojpeg0-dev libopencv-core-dev libopencv-imgproc-dev libgl1 libglib2.0-0)
ffcv_hint="FFCV is left out: ${ffcv_packages[*]} (Debian names; headers of Python too) have to be installed first, then 'launch/setup.sh' again. All but data.format=ffcv works."

find_opencv() { # prints the include folder that holds opencv2/core.hpp
  for dir in $(pkg-config --variable=includedir opencv4 2>/dev/null || true) /usr/include/opencv4 /usr/local/include/opencv4 ${CONDA_PREFIX:+"$CONDA_PREFIX/include/opencv4"}; do
    for sub in "$dir" "$dir/opencv4"; do
      if [ -e "$sub/opencv2/core.hpp" ] && [ -e "$sub/opencv2/imgproc.hpp" ]; then echo "$sub"; return; fi
    done
  done
  return 1
}
have_ffcv_libraries() {
  command -v g++ >/dev/null && command -v pkg-config >/dev/null \
    && pkg-config --exists libturbojpeg && find_opencv >/dev/null
}
have_jpeg_libraries() {
  printf '#include <Python.h>\n#include <stdio.h>\n#include <jpeglib.h>\n' \
    | ${CC:-cc} -E -I"$($venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')" - >/dev/null 2>&1
}
install_libraries() { # what for, packages
  command -v apt-get >/dev/null || return 1
  local what=$1 as_root=
  shift
  if [ "$(id -u)" != 0 ]; then sudo -n true 2>/dev/null || return 1; as_root="sudo -n"; fi
  say "installing the system libraries of $what: $*"
  $as_root apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
    $as_root apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}
build_ffcv() {
  local include shim
  include=$(find_opencv)
  shim=$PWD/$venv/share/opencv-shim
  # Debian ships opencv4.pc and opencv2/opencv.hpp only with the 150 MB meta package; FFCV needs two modules of it.
  if ! pkg-config --exists opencv4; then
    mkdir -p "$shim/include/opencv2"
    printf '#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n' >"$shim/include/opencv2/opencv.hpp"
    printf 'Name: opencv4\nDescription: core and imgproc\nVersion: 4\nLibs: -lopencv_imgproc -lopencv_core\nCflags: -I%s -I%s\n' \
      "$shim/include" "$include" >"$shim/opencv4.pc"
    export PKG_CONFIG_PATH="$shim${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}"
  fi
  say "building FFCV (about a minute)"
  $venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ffcv]' || return 1
  # The desktop build of opencv-python wants libGL; servers without it get the headless build of the same version.
  if ! $venv/bin/python -c 'import cv2' 2>/dev/null; then
    version=$($venv/bin/pip show opencv-python | sed -n 's/^Version: //p')
    $venv/bin/pip uninstall --quiet -y opencv-python
    $venv/bin/pip install --quiet --disable-pip-version-check "opencv-python-headless==$version" || return 1
  fi
  $venv/bin/python -c 'import ffcv' || return 1
}

[ -e "${WNSEARCHDIR:-/usr/share/wordnet}/data.noun" ] || install_libraries "evaluation by WordNet's tree" wordnet-base \
  || say "WordNet is left out: with wordnet-base (Debian's name) installed, evaluations join 22K classes by its tree"
# Before pip: installing this project builds the decoder.
have_jpeg_libraries || install_libraries "the JPEG decoder" "${jpeg_packages[@]}" || true
# An interrupted download leaves pip able to go on; nothing counts as done before the stamp in the Makefile.
say "installing the pinned packages into $venv (about 7 GB and some minutes the first time)"
# Of what pip tells, what takes long: the large files, and that they are unpacked.
$venv/bin/pip install --progress-bar off --disable-pip-version-check -c constraints.txt -e '.[demo,dev,export,s3,slurm]' \
  | sed -unE 's#^ *(Downloading|Using cached|Processing) ([^ ]*/)?([^ /]+\.whl) \(([0-9]{3,}\.[0-9] MB)\).*#setup:   \3 (\4)#p
    s#^Installing collected packages:.*,.*#setup:   unpacking them#p' \
  || fail "pip could not install the packages above; mend that and run 'make setup' again"

$venv/bin/python -c 'import pipeline.data._jpeg' 2>/dev/null || say "$jpeg_hint"

if [ "${FFCV:-1}" = 0 ]; then
  say "FFCV left out (FFCV=0)"
elif $venv/bin/python -c 'import ffcv' 2>/dev/null; then
  say "FFCV is there"
elif { have_ffcv_libraries || { install_libraries FFCV "${ffcv_packages[@]}" && have_ffcv_libraries; }; } && build_ffcv; then
  say "FFCV built"
else
  say "$ffcv_hint"
fi
say "done: $($venv/bin/python -c 'import sys, torch, timm; print("Python", sys.version.split()[0], "torch", torch.__version__, "timm", timm.__version__)')"
