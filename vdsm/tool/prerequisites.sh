#!/bin/sh
# Installs what the demo, the tests or the lab need, and nothing else.
#
#   prerequisites.sh demo|test|lab [--check]
#
# - Debian packages that are missing, of packages-demo.txt, packages-test.txt and packages-lab.txt, each purpose with
#   those before it. No service is started by them.
# - build/runtime: the agent's dependencies that Debian does not have, as pyproject.toml lists them.
# - .venv (test and lab): the same and the developers' tools.
#
# What is there already is left alone: then it takes a fraction of a second. --check changes nothing: it says what is
# missing and exits 1 if anything is. Plain sh, because a bare machine has no Python yet.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
PATH=$PATH:/usr/sbin:/sbin
PYTHON=/usr/bin/python3
POLICY=/usr/sbin/policy-rc.d
POLICY_MARK='# vdsm prerequisites: no service is started while packages are installed'

usage() {
    echo "usage: prerequisites.sh demo|test|lab [--check]" >&2
    exit 2
}

fail() {
    echo "prerequisites: $1" >&2
    exit 1
}

# The alternatives of each line of the lists, e.g. "a b" for "a | b  # reason".
wanted_packages() {
    for list in "$@"; do
        sed -e 's/#.*//' -e 's/|/ /g' -e '/^[[:space:]]*$/d' "$list"
    done
}

# Packages to install: of each line the first, when none of the line is installed.
missing_packages() {
    installed=$(dpkg-query -W -f '${db:Status-Status}:${Package}\n' 2>/dev/null | sed -n 's/^installed://p')
    wanted_packages "$@" | while read -r first others; do
        found=
        for package in $first $others; do
            if printf '%s\n' "$installed" | grep -qx "$package"; then
                found=$package
            fi
        done
        if [ -z "$found" ]; then
            echo "$first"
        fi
    done
}

# A policy that is ours may be left from a run that was killed.
ours() {
    [ -f "$POLICY" ] && grep -qsF "$POLICY_MARK" "$POLICY"
}

remove_policy() {
    if ours; then
        rm -f "$POLICY"
    fi
}

forbid_services() {
    if [ -e "$POLICY" ] && ! ours; then
        return # the machine has a policy of its own
    fi
    trap remove_policy EXIT
    trap 'exit 1' HUP INT TERM # runs when apt has ended: until then the policy is needed
    printf '#!/bin/sh\n%s\nexit 101\n' "$POLICY_MARK" >"$POLICY"
    chmod 755 "$POLICY"
}

install_packages() {
    if [ "$(id -u)" != 0 ]; then
        fail "these Debian packages are missing: $missing
Install them as root:
    apt-get update && apt-get install --no-install-recommends $missing"
    fi
    command -v apt-get >/dev/null || fail "there is no apt-get here; this project runs on Debian 12. Missing: $missing"
    echo "Installing Debian packages: $missing"
    forbid_services
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q update
    # shellcheck disable=SC2086 # a list of words
    apt-get -q install -y --no-install-recommends $missing
    remove_policy
}

# What a directory was made from: its stamp must say the same now.
fingerprint() {
    { cat "$top/pyproject.toml"; "$PYTHON" -V; } | sha256sum | cut -d' ' -f1
}

current() {
    [ -f "$1" ] && [ "$(cat "$1")" = "$(fingerprint)" ]
}

# The requirements of pyproject.toml, one a line: the runtime's, and those of the extras named.
requirements() {
    "$PYTHON" - "$top/pyproject.toml" "$@" <<'EOF'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
print(*project["dependencies"], *(one for extra in sys.argv[2:] for one in project["optional-dependencies"][extra]), sep="\n")
EOF
}

# Into a directory of its own, not a venv: the stack copies it to where its unprivileged users can read it.
make_runtime() {
    echo "Installing the agent's dependencies into build/runtime"
    work=$top/build/runtime.new
    rm -rf "$work"
    mkdir -p "$work"
    requirements >"$work/requirements.txt"
    "$PYTHON" -m venv "$work/pip"
    "$work/pip/bin/pip" install -qq --no-cache-dir --target "$work/runtime" -r "$work/requirements.txt"
    fingerprint >"$work/runtime/.made-from"
    rm -rf "$top/build/runtime"
    mv "$work/runtime" "$top/build/runtime"
    rm -rf "$work"
}

# Changed in place: tools that run from it keep running. The stamp comes last.
make_venv() {
    echo "Installing the developers' tools into .venv"
    rm -f "$venv_stamp"
    "$PYTHON" -m venv --system-site-packages "$top/.venv"
    requirements dev >"$top/.venv/requirements.txt"
    "$top/.venv/bin/pip" install -qq --no-cache-dir -r "$top/.venv/requirements.txt"
    fingerprint >"$venv_stamp"
}

report() {
    status=0
    if [ -n "$missing" ]; then
        echo "missing Debian packages: $missing"
        status=1
    fi
    if ! { [ -x "$PYTHON" ] && current "$runtime_stamp"; }; then
        echo "missing or outdated: build/runtime"
        status=1
    fi
    if [ "$purpose" != demo ] && ! { [ -x "$PYTHON" ] && current "$venv_stamp"; }; then
        echo "missing or outdated: .venv"
        status=1
    fi
    return $status
}

purpose=${1:-}
case $purpose in
    demo) set -- "${2:-}" "$here/packages-demo.txt" ;;
    test) set -- "${2:-}" "$here/packages-demo.txt" "$here/packages-test.txt" ;;
    lab) set -- "${2:-}" "$here/packages-demo.txt" "$here/packages-test.txt" "$here/packages-lab.txt" ;;
    *) usage ;;
esac
only_check=$1
shift
missing=$(missing_packages "$@" | paste -sd ' ' -)
runtime_stamp=$top/build/runtime/.made-from
venv_stamp=$top/.venv/.made-from

case $only_check in
    --check) report && exit 0 || exit 1 ;;
    '') ;;
    *) usage ;;
esac
if [ -n "$missing" ]; then
    install_packages
fi
current "$runtime_stamp" || make_runtime
if [ "$purpose" != demo ]; then
    current "$venv_stamp" || make_venv
fi
