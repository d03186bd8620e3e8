#!/bin/bash
# Install the real programs that Diskwright is tested against, by group.
#
#   install_peers.sh [--quiet] [GROUP...]      groups: qemu formats fs nbd guest (all, when none is
#                                              named; guest is a kernel for virtual machines too)
#
# Safe to repeat: with everything in place it only asks dpkg. Needs Debian 12 or later, and root
# when something is missing. No service is left running by a package.
set -euo pipefail
export LC_ALL=C DEBIAN_FRONTEND=noninteractive

# Packages taken from <codename>-backports where the release has an older one.
declare -A from_backports=([qemu-utils]=1:10.0 [qemu-system-x86]=1:10.0)
declare -A group_packages=(
  [qemu]="qemu-utils qemu-system-x86 strace"
  [formats]="libvhdi-utils"
  [fs]="e2fsprogs xfsprogs btrfs-progs mount"
  [nbd]="nbdkit libnbd-bin fuse3 python3-libnbd fio openssl"
  [guest]="qemu-system-x86 busybox-static cpio kmod nbd-client"
)
guest_home=/usr/local/lib/diskwright-guest   # the guest's kernel and its modules

quiet=
groups=()
for arg in "$@"; do
  case $arg in
    --quiet|-q) quiet=1 ;;
    -h|--help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) [[ -n ${group_packages[$arg]-} ]] ||
         { echo "install_peers.sh: no group '$arg' (there are: ${!group_packages[*]})" >&2; exit 2; }
       groups+=("$arg") ;;
  esac
done
[[ ${#groups[@]} -gt 0 ]] || groups=(qemu formats fs nbd guest)
say() { [[ -n $quiet ]] || printf '%s\n' "$*"; }

wanted=()
for group in "${groups[@]}"; do
  for package in ${group_packages[$group]}; do wanted+=("$package"); done
done

declare -A installed=()
look() {   # fills installed[name]=version
  installed=()
  local name state version
  while read -r name state version; do
    if [[ $state == ?i ]]; then installed[$name]=$version; fi
  done < <(dpkg-query -W -f '${Package} ${db:Status-Abbrev} ${Version}\n' "${wanted[@]}" 2>/dev/null || true)
}
missing() {   # those absent, or older than accepted
  local p
  for p in "${wanted[@]}"; do
    if [[ -z ${installed[$p]-} ]]; then echo "$p"
    elif [[ -n ${from_backports[$p]-} ]] &&
         dpkg --compare-versions "${installed[$p]}" lt "${from_backports[$p]}"; then echo "$p"
    fi
  done
}

log=$(mktemp)
policy=
at_exit() { rm -f "$log"; [[ -z $policy ]] || rm -f "$policy"; }
trap at_exit EXIT

apt() { apt-get -q -y -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@"; }

updated=
update_lists() {
  [[ -z $updated ]] || return 0
  apt update >"$log" 2>&1 || { tail -30 "$log" >&2; exit 1; }
  updated=1
}

# Add <codename>-backports, from the archive that this machine already uses.
add_backports() {
  local codename sources uri key
  codename=$(. /etc/os-release; echo "$VERSION_CODENAME")
  backports_suite=$codename-backports
  ! grep -rqsE "^[^#]*\b$backports_suite\b" /etc/apt/sources.list /etc/apt/sources.list.d || return 0
  sources=/etc/apt/sources.list.d/debian.sources
  if [[ -e $sources ]]; then
    uri=$(awk '$1=="URIs:" {u=$2} $1=="Suites:" && $0 ~ " '"$codename"'( |$)" {print u; exit}' "$sources")
    key=$(awk '$1=="Signed-By:" {print $2; exit}' "$sources")
  else
    uri=$(awk '$1=="deb" {for (i=2; i<NF; i++) if ($(i+1)=="'"$codename"'") {print $i; exit}}' /etc/apt/sources.list)
    key=
  fi
  [[ -n $uri ]] || { echo "install_peers.sh: cannot tell the Debian archive from apt's sources" >&2; exit 1; }
  {
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\n' "$uri" "$backports_suite"
    [[ -z $key ]] || printf 'Signed-By: %s\n' "$key"
  } >/etc/apt/sources.list.d/diskwright-backports.sources
  say "added $backports_suite to apt's sources"
  updated=
}

add() {   # add PACKAGES... [-t SUITE]
  say "installing: $*"
  apt install --no-install-recommends "$@" >"$log" 2>&1 || { tail -30 "$log" >&2; exit 1; }
}

available() {   # is the accepted version in the release itself?
  local version
  version=$(apt-cache policy "$1" | awk '$1=="Candidate:" {print $2}')
  [[ -n $version && $version != "(none)" ]] && dpkg --compare-versions "$version" ge "${from_backports[$1]}"
}

install_missing() {
  local need=() plain=() back=() p
  look
  mapfile -t need < <(missing)
  [[ ${#need[@]} -gt 0 ]] || return 0
  [[ $(id -u) == 0 ]] || { echo "install_peers.sh: needs root to install: ${need[*]}" >&2; exit 1; }
  if [[ ! -e /usr/sbin/policy-rc.d ]]; then   # packages must not start their daemons
    policy=/usr/sbin/policy-rc.d
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
  fi
  update_lists
  for p in "${need[@]}"; do
    if [[ -n ${from_backports[$p]-} ]] && ! available "$p"; then back+=("$p"); else plain+=("$p"); fi
  done
  if [[ ${#back[@]} -gt 0 ]]; then
    add_backports
    update_lists
    add "${back[@]}" -t "$backports_suite"
  fi
  [[ ${#plain[@]} -eq 0 ]] || add "${plain[@]}"
  look
  mapfile -t need < <(missing)
  [[ ${#need[@]} -eq 0 ]] || { echo "install_peers.sh: still missing: ${need[*]}" >&2; exit 1; }
}

command -v dpkg-query >/dev/null || { echo "install_peers.sh: this is not Debian" >&2; exit 1; }
# The guest's kernel is Debian's own, unpacked beside the system instead of
# installed: no boot loader, no initramfs, nothing of the host's boot touched.
install_kernel() {
  local package deb work version
  [[ ! -e $guest_home/complete ]] || return 0
  [[ $(id -u) == 0 ]] || { echo "install_peers.sh: needs root for the guest's kernel" >&2; exit 1; }
  update_lists
  package=$(apt-cache depends linux-image-amd64 | awk '$1=="Depends:" && $2 ~ /^linux-image-[0-9]/ {print $2; exit}')
  [[ -n $package ]] || { echo "install_peers.sh: apt knows no kernel behind linux-image-amd64" >&2; exit 1; }
  say "unpacking $package for the guest"
  work=$(mktemp -d)
  (cd "$work" && chmod 755 . && apt-get -q -o Acquire::Retries=3 -o APT::Sandbox::User=root download "$package" >"$log" 2>&1) || { tail -30 "$log" >&2; exit 1; }
  deb=$(echo "$work"/*.deb)
  rm -rf "$guest_home"
  mkdir -p "$guest_home"
  # Leave out whole families of drivers no virtual machine here has.
  dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$guest_home" \
    --exclude='*/kernel/drivers/gpu' --exclude='*/kernel/drivers/media' --exclude='*/kernel/sound' \
    --exclude='*/kernel/drivers/net/wireless' --exclude='*/kernel/drivers/infiniband' \
    --exclude='*/kernel/drivers/staging' --exclude='*/kernel/drivers/iio' --exclude='*/kernel/drivers/hwmon' \
    --exclude='*/kernel/drivers/input' --exclude='*/kernel/drivers/isdn' --exclude='./usr'
  version=$(basename "$(echo "$guest_home"/lib/modules/*)")
  depmod -b "$guest_home" "$version" 2>/dev/null
  rm -rf "$work"
  mv "$guest_home/boot/vmlinuz-$version" "$guest_home/vmlinuz"
  mv "$guest_home/boot/config-$version" "$guest_home/config" 2>/dev/null || true
  rm -rf "$guest_home/boot"
  # Unpacked once here, the kernel need not unpack itself (slowly) at every boot.
  python3 - "$guest_home/vmlinuz" "$guest_home/vmlinux" <<'PY' || cp "$guest_home/vmlinuz" "$guest_home/vmlinux"
import lzma, sys
data = open(sys.argv[1], "rb").read()
kernel = lzma.LZMADecompressor(format=lzma.FORMAT_XZ).decompress(data[data.index(b"\xfd7zXZ\0"):])
assert kernel[:4] == b"\x7fELF"
open(sys.argv[2], "wb").write(kernel)
PY
  echo "$version" >"$guest_home/complete"
}

install_missing
[[ " ${groups[*]} " != *" guest "* ]] || install_kernel
if [[ -z $quiet ]]; then
  for p in "${wanted[@]}"; do printf '%-18s %s\n' "$p" "${installed[$p]}"; done
fi
