#!/bin/sh
# Puts hyper on the node whose root is mounted at /host, tells containerd about it, and stays.
#
# RESTART is how the node's containerd is restarted, a line for the node's own shell, run in the namespaces of its init. The pod needs
# hostPID for that.
set -eu
host=${HOST_ROOT:-/host}
restart=${RESTART:-systemctl restart containerd}
prefix=/opt/hyper
# There while containerd has not read what was written for it: a restart that failed is tried again by the next container of this pod.
pending=$host$prefix/restart-containerd

# Each file is replaced whole: machines that run keep the one that they began with.
for file in $(cd /hyper && find . -type f); do
    mkdir -p "$host$prefix/$(dirname "$file")"
    cp -p "/hyper/$file" "$host$prefix/$file.new"
    mv "$host$prefix/$file.new" "$host$prefix/$file"
done

config=/etc/containerd/config.toml
before=$(cat "$host$config" 2>/dev/null || true)
# With the node's own libraries.
chroot "$host" "$prefix/bin/hyper" install containerd --config "$config"
if [ "$before" != "$(cat "$host$config")" ]; then
    touch "$pending"
fi
if [ -e "$pending" ]; then
    echo "restarting containerd: $restart"
    nsenter --target 1 --mount --uts --ipc --net --pid -- sh -c "$restart" || {
        echo "containerd was not restarted; on a node without systemd RESTART in the DaemonSet says how that is done" >&2
        exit 1
    }
    rm "$pending"
fi
touch /run/installed
echo "hyper is installed"
exec sleep infinity
