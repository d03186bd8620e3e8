#!/bin/bash
# File systems on loop devices, for tests that depend on the file system.
#
#   fs.sh mount KIND DIR [SIZE]   makes DIR.img and mounts it at DIR; KIND is one of
#                                 xfs (with reflink), btrfs, ext4, ext4-4k (loop
#                                 device with 4096-byte sectors: direct I/O must
#                                 be aligned to those), full (8 MiB ext4 with no
#                                 reserve, to be filled up), ro (ext4, read-only,
#                                 holding one file "data")
#                                 SIZE: 512M unless told (a file with holes)
#   fs.sh umount DIR              unmounts, frees the loop device, removes DIR.img
#                                 and DIR; quiet when there is nothing
#   fs.sh tmpfs DIR [SIZE]        a small tmpfs: full, without a loop device
# Needs root, and a kernel that has the file system and loop devices.
set -euo pipefail
cd_here=$(cd "$(dirname "$0")" && pwd)
. "$cd_here/lib.sh"

usage() { sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2; }
[[ $# -ge 2 ]] || usage

unmount() {
  local dir=$1 loop
  dir=${dir%/}
  [[ $dir == /* ]] || dir=$PWD/$dir
  if mountpoint -q "$dir" 2>/dev/null; then umount "$dir" || umount -l "$dir"; fi
  if [[ -e $dir.img ]]; then
    while read -r loop; do
      [[ -z $loop ]] || losetup -d "$loop" 2>/dev/null || true
    done < <(losetup -n -O NAME -j "$dir.img" 2>/dev/null)
    rm -f "$dir.img"
  fi
  rmdir "$dir" 2>/dev/null || true
}

case $1 in
  umount)
    unmount "$2" ;;
  tmpfs)
    mkdir -p "$2"
    mount -t tmpfs -o "size=${3:-8M}" tmpfs "$2" ;;
  mount)
    [[ $# -ge 3 ]] || usage
    kind=$2 dir=${3%/} size=${4:-512M}
    [[ $dir == /* ]] || dir=$PWD/$dir
    [[ $(id -u) == 0 ]] || die "needs root"
    need fs mkfs.xfs mkfs.btrfs mkfs.ext4 mount
    ! mountpoint -q "$dir" 2>/dev/null || die "$dir is a mount point already"
    mkdir -p "$dir"
    trap 'unmount "$dir"' ERR
    rm -f "$dir.img"
    sector=512 options=
    [[ $kind != full || $# -ge 4 ]] || size=8M
    [[ $kind != ext4-4k ]] || sector=4096
    truncate -s "$size" "$dir.img"
    loop=$(losetup -f --show -b "$sector" "$dir.img")
    case $kind in
      xfs) mkfs.xfs -q -f -m reflink=1 "$loop" ;;
      btrfs) mkfs.btrfs -q -f "$loop" >"$dir.note" 2>&1 || { cat "$dir.note" >&2; false; }
             rm -f "$dir.note" ;;
      ext4|ext4-4k) mkfs.ext4 -q -F "$loop" ;;
      full) mkfs.ext4 -q -F -m 0 -O ^has_journal "$loop" ;;
      ro) mkfs.ext4 -q -F "$loop"
          mount "$loop" "$dir"
          head -c 1048576 /dev/zero | tr '\0' '\245' >"$dir/data"
          umount "$dir"
          options="-o ro" ;;
      *) die "no kind '$kind'" ;;
    esac
    mount $options "$loop" "$dir"
    trap - ERR
    # The loop device goes by itself when the file system is unmounted.
    losetup -d "$loop" 2>/dev/null || true ;;
  *) usage ;;
esac
