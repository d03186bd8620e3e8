# Shared by the scripts in this folder; to be sourced, not run.

die() { echo "$(basename "$0"): $*" >&2; exit 1; }

need() {   # need GROUP COMMAND...: install the group if a command is absent
  local group=$1 command
  shift
  for command in "$@"; do
    if ! command -v "$command" >/dev/null 2>&1; then
      "$(dirname "${BASH_SOURCE[0]}")/install_peers.sh" --quiet "$group" >&2 ||
        die "cannot install group $group (for $command)"
      return 0
    fi
  done
}
