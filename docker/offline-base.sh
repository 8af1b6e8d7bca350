#!/bin/sh
# Makes the image codeworld-base:latest from this host's own bash, core tools and Python: no registry, no network.
#
#   sh docker/offline-base.sh [IMAGE]        (about 15 s; does nothing where the image is there already)
#
# It is a root to build task images on, or to run as base="codeworld-base". base="host" does not need it. What it holds is
# what this host has: the same host makes the same image, another host may not; use a registry's image by digest where
# that matters.
set -eu

image=${1:-codeworld-base:latest}
say() { echo "offline-base: $*"; }
stop() { echo "offline-base: $*" >&2; exit 2; }

command -v docker >/dev/null || stop "no docker command on PATH; install docker.io (Debian) or docker-ce-cli"
docker version >/dev/null 2>&1 || stop "no Docker engine answers; start dockerd, or set DOCKER_HOST"
if docker image inspect "$image" >/dev/null 2>&1; then say "$image is there; docker rmi $image to make it anew"; exit 0; fi

python=/usr/bin/python3
[ -x "$python" ] || python=$(command -v python3) || stop "no python3 on this host; install it"
commands="bash sh env awk basename cat chmod chown cmp comm cp cut date dd diff dirname du echo egrep expr false fgrep find
  fold getconf git grep gunzip gzip head hostname id install join ldd ln ls md5sum mkdir mkfifo mktemp mv nl nohup nproc od
  paste patch pgrep pkill printenv printf ps pwd readlink realpath rm rmdir sed seq setsid sha1sum sha256sum sleep sort
  split stat stty sync tac tail tar tee test timeout touch tr true truncate tty uname uniq unlink wc which whoami xargs
  xxd yes"

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

copy() { # to the same real directory, the file itself where it is a link
    directory=$(readlink -f "$(dirname "$1")")
    mkdir -p "$root$directory"
    [ -e "$root$directory/${1##*/}" ] || cp -Lp "$1" "$root$directory/"
}

needed_by() { # the shared libraries of executables, by path
    ldd "$@" 2>/dev/null | sed -n 's/.*=> \(\/[^ ]*\) (.*/\1/p; s/^[[:space:]]*\(\/[^ ]*\) (.*/\1/p' | sort -u
}

say "copying core tools"
for link in bin sbin lib lib32 lib64 libx32; do
    if [ -L "/$link" ]; then ln -s "$(readlink "/$link")" "$root/$link"; fi
done
mkdir -p "$root/usr/bin" "$root/usr/lib" "$root/etc" "$root/tmp" "$root/proc" "$root/sys" "$root/dev" "$root/run" "$root/var"
files=
for name in $commands; do
    path=$(command -v "$name" || true) # a builtin's name alone is not a path
    case $path in /*) ;; *) path=/usr/bin/$name ;; esac
    if [ -x "$path" ]; then files="$files $path"; fi
done
for path in $files; do copy "$path"; done

say "copying $("$python" -V 2>&1)"
real=$(readlink -f "$python")
stdlib=$("$python" -I -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
copy "$real"
ln -sf "$real" "$root/usr/bin/python3"
ln -sf python3 "$root/usr/bin/python"
mkdir -p "$root$stdlib"
tar -C "$stdlib" --exclude=__pycache__ --exclude=./test --exclude=./idlelib --exclude=./site-packages \
    --exclude=./ensurepip --exclude='./config-*' --exclude=sitecustomize.py -cf - . | tar -C "$root$stdlib" -xf -

say "copying the shared libraries of both"
# shellcheck disable=SC2086
for path in $(needed_by $files "$real" "$stdlib"/lib-dynload/*.so); do copy "$path"; done
ln -s /tmp "$root/var/tmp"
chmod 1777 "$root/tmp"
printf 'root:x:0:0:root:/root:/bin/bash\nagent:x:1499999999:1499999999:agent:/tmp:/bin/bash\n' >"$root/etc/passwd"
printf 'root:x:0:\nagent:x:1499999999:\n' >"$root/etc/group"
printf 'passwd: files\ngroup: files\nhosts: files\n' >"$root/etc/nsswitch.conf"
ldconfig -r "$root" 2>/dev/null || true

say "importing $(du -sh "$root" | cut -f1) as $image"
tar -C "$root" --owner=0 --group=0 --numeric-owner -cf - . | docker import \
    -c 'ENV PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin' -c 'ENV LANG=C.UTF-8' -c 'CMD ["bash"]' - "$image" >/dev/null
docker run --rm --network none "$image" python3 -c 'import ctypes, json, ssl, sqlite3' 2>/dev/null ||
    say "note: not every module of Python imports in $image"
say "done: base=\"${image%:latest}\""
