#!/bin/bash
# Install the real programs that Diskwright is tested against, by group.
#
#   install_peers.sh [--quiet] [GROUP...]      groups: qemu formats fs nbd (all, when none is named)
#
# Safe to repeat: with everything in place it only asks dpkg. Needs Debian 12 or later, and root
# when something is missing. No service is left running by a package.
set -euo pipefail
export LC_ALL=C DEBIAN_FRONTEND=noninteractive

# Packages taken from <codename>-backports where the release has an older one.
declare -A from_backports=([qemu-utils]=1:10.0 [qemu-system-x86]=1:10.0)
declare -A group_packages=(
  [qemu]="qemu-utils qemu-system-x86"
  [formats]="libvhdi-utils"
  [fs]="e2fsprogs xfsprogs btrfs-progs mount"
  [nbd]="nbdkit libnbd-bin fio"
