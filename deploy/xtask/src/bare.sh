# Runs a command in a root that is bare. The mounts are this process's own and go with it.
# Expects: ROOT, RUST (a toolchain), CHANGE_USER (options of chroot), HOME_INSIDE, and CMD; what the command's
# environment has is in the arguments, as NAME=VALUE.
set -euo pipefail
mount --bind "$ROOT" "$ROOT" # A mount point, as on a real machine: else unshare and mount refuse inside.
mkdir -p "$ROOT"/{proc,dev,sys,tmp,run,opt/rust}
mount --bind "$RUST" "$ROOT/opt/rust"
mount -o remount,ro,bind "$ROOT/opt/rust"
mount -t proc proc "$ROOT/proc"
mount --rbind /dev "$ROOT/dev"
mount --rbind /sys "$ROOT/sys"
mount -t tmpfs -o mode=1777 tmpfs "$ROOT/tmp"
# shellcheck disable=SC2086 # None, or several options.
exec chroot $CHANGE_USER "$ROOT" env -i "$@" HOME="$HOME_INSIDE" CMD="$CMD" \
    PATH=/opt/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    bash -euo pipefail -c '
        cd "$HOME"
        [ -d muster ] || git -c advice.detachedHead=false clone --quiet /checkout.bundle muster
        cd muster
        git fetch --quiet /checkout.bundle HEAD
        git checkout --quiet --force --detach FETCH_HEAD
        exec bash -c "$CMD"' </dev/null
