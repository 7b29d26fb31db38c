#!/usr/bin/env bash
# bare.sh [pytest's arguments]: the tests as a stranger's machine would run them, `make test-bare`.
#
# Called by root: another user (nobody), who sees an empty home in place of root's. Called by anyone: a copy of the
# checkout that is no git repository and that nobody may write to, no environment variables, empty HOME and caches,
# and only the system's programs without SLURM, browsers and GPU tools. The tests' data are those of BENCH_TEST_DATA
# where it is set. PY is the interpreter of the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-.venv/bin/python}
case $PY in */*) PY=$(cd "$(dirname "$PY")" && pwd -P)/$(basename "$PY") ;; esac
[ -x "$PY" ] || { echo "bare.sh: $PY is no interpreter; run make env, or name one with PY=" >&2; exit 2; }
PREFIX=$("$PY" -c 'import sys; print(sys.base_prefix)')
PLACE=$(mktemp -d "${TMPDIR:-/tmp}/bare.XXXXXX")
trap 'chmod -R u+w "$PLACE"; rm -rf "$PLACE"' EXIT
mkdir "$PLACE"/{bin,home,tmp,checkout}

for folder in /bin /usr/bin; do
  find "$folder/" -maxdepth 1 ! -type d -exec ln -sf -t "$PLACE/bin" {} +
done
(cd "$PLACE/bin" && rm -f srun sbatch salloc scancel scontrol sinfo squeue sacct sacctmgr nvidia-smi \
  chromium* google-chrome* firefox*)
git ls-files -coz --exclude-standard | tar --null --ignore-failed-read -T - -cf - 2>/dev/null | tar -C "$PLACE/checkout" -xf -

words=("$PY" -m pytest -p no:cacheprovider -m "not faults" "$@")
bare=(
  env -i -C "$PLACE/checkout" PATH="$PLACE/bin" HOME="$PLACE/home" TMPDIR="$PLACE/tmp" GIT_CONFIG_NOSYSTEM=1
  PYTHONPATH="$PLACE/checkout" ${BENCH_TEST_DATA:+BENCH_TEST_DATA="$BENCH_TEST_DATA"}
)
chmod -R a-w,a+rX "$PLACE/checkout"
if [ "$(id -u)" != 0 ]; then
  echo "bare.sh: not root, so the tests run as $(id -un) and see this user's files outside HOME" >&2
  "${bare[@]}" "${words[@]}"
  exit
fi
chmod 755 "$PLACE"
chown -R nobody: "$PLACE"/{home,tmp}
# A mount namespace of its own: root's home, which others may not read, is empty there but for what the
# environment needs.
KEEP=("$PREFIX" "$(dirname "$(dirname "$PY")")" "$PLACE" ${BENCH_TEST_DATA:+"$BENCH_TEST_DATA"})
export PY
unshare --mount --propagation private bash -euc '
  home=$(getent passwd 0 | cut -d: -f6)
  inside=()
  while [ "$1" != -- ]; do case $1/ in "$home"/*) inside+=("$1") ;; esac; shift; done; shift
  mkdir /run/bare.$$; mount --bind "$home" /run/bare.$$
  mount -t tmpfs -o mode=755 tmpfs "$home"
  for one in "${inside[@]}"; do
    mkdir -p "$one"; mount --bind "/run/bare.$$/${one#"$home"/}" "$one"
  done
  umount /run/bare.$$; rmdir /run/bare.$$
  nobody=(setpriv --reuid nobody --regid "$(id -g nobody)" --clear-groups --no-new-privs)
  if "${nobody[@]}" "$PY" -c "import pytest" 2>/dev/null; then exec "${nobody[@]}" "$@"; fi
  echo "bare.sh: other users may not read $PY or the folders above it, so the tests run as root" >&2
  exec "$@"
' bare "${KEEP[@]}" -- "${bare[@]}" "${words[@]}"
