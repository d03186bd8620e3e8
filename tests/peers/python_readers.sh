#!/bin/bash
# Other Python libraries that read disk images, in an environment of their own, to measure against.
#
#   python_readers.sh DIR      makes DIR/bin/python with dissect.hypervisor; prints its path
set -euo pipefail
[[ $# == 1 ]] || { sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 2; }
dir=$1
if [[ ! -e $dir/complete ]]; then
  rm -rf "$dir"
  "${PYTHON:-python3}" -m venv "$dir"
  "$dir/bin/python" -m pip install --quiet --disable-pip-version-check 'dissect.hypervisor>=3.14' >&2
  touch "$dir/complete"
fi
echo "$dir/bin/python"
