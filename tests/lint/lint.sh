#!/bin/sh
# lint: the rules of CONTRIBUTING.md that a machine can check. Prints each breach; ends with a count.
# SPDX-License-Identifier: Apache-2.0
set -u
cd "$(dirname "$0")/../.." || exit 1
B=build/${BUILD:-release}
passed=0 failed=0

# rule NAME BREACHES
rule() {
    if [ -z "$2" ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf 'lint: %s\n%s\n' "$1" "$2"
    fi
}

each() { # each COMMAND FILE…: what the command prints for each file
    command=$1
    shift
    for f in "$@"; do $command "$f"; done
}
licence() { head -30 "$1" | grep -q 'SPDX-License-Identifier: Apache-2.0' || echo "$1"; }
length() { [ "$(wc -l <"$1")" -le 850 ] || echo "$1 has $(wc -l <"$1") lines"; }
compiles() { printf '#include "%s"\n' "$1" | ${CC:-cc} -std=gnu17 -D_GNU_SOURCE -I. -Itests/cuda_emu/include -fsyntax-only -xc - 2>/dev/null || echo "$1"; }
conflicts() { # of the tracked files, or of all in a tree without git
    marks='^(<<<<<<<|[|]{7}|>>>>>>>)( |$)'
    if [ -e .git ] && git rev-parse --git-dir >/dev/null 2>&1; then
        git grep -nIE "$marks"
    else
        grep -rnIE --exclude-dir=build --exclude-dir=.git "$marks" .
    fi
}

kernels_that_do_not_wait() { # but for one that loads weights first
    awk '/__global__/ { name = $0; kernel = 1 } first && !/^    wait_for_earlier\(\);/ { print FILENAME ": " name } { first = 0 }
         kernel && /^{$/ { first = 1; kernel = 0 }' cuda/*.cu | grep -v ' few_kernel(few_job j)'
}

sources=$(find core server config cli cuda tests -name '*.[ch]' -o -name '*.cu' -o -name '*.cpp')
product=$(find core server config cli cuda -name '*.[ch]' -o -name '*.cu')
core=$(find core -name '*.[ch]')
headers=$(find core server config cli cuda/blas.h cuda/cuda.h cuda/kernels.h cuda/pack.h -name '*.h' ! -path '*/vec*.h' ! -path '*/attn_avx*.h' ! -path '*/layouts.h')
# shellcheck disable=SC2086
{
    rule "core knows nothing of server, config and cli" "$(grep -nE '#include "(server|config|cli)/' $core)"
    rule "cuda knows of core only its interfaces" "$(grep -nE '#include "(server|config|cli|tests|core/(sched|kv|sample|text|train|device/cpu))/' cuda/*)"
    rule "a kernel's first statement is wait_for_earlier()" "$(kernels_that_do_not_wait)"
    rule "what kernels write is not read as if it stayed (__ldg, __ldcs, __restrict__)" "$(grep -nE '__ldg|__ldcs|__restrict__' cuda/* | grep -v '^cuda/launch.h')"
    rule "only the server includes microhttpd.h" "$(grep -ln 'microhttpd.h' $sources | grep -v '^server/')"
    rule "the environment is read in config/ only" "$(grep -nE '\bgetenv\(' $product | grep -v '^config/')"
    rule "nothing in core ends the process" "$(grep -nE '(^|[^_a-z])(exit|_exit|abort)\(' $core | grep -v '^core/base/status.c')"
    rule "nothing prints in core, server and config" \
        "$(grep -nE '(^|[^_a-zA-Z])(printf|puts|putchar)\(' $(find core server config -name '*.c') | grep -v '^server/main.c')"
    rule "each file names its licence" "$(each licence $sources)"
    rule "a file has at most 850 lines" "$(each length $sources)"
    rule "a line has at most 160 columns" "$(awk 'length($0) > 160 { print FILENAME ":" FNR ": " length($0) " columns" }' $sources)"
    rule "a function has at most 100 lines" \
        "$(awk 'FNR == 1 { start = 0 } /^[a-z].*\)$/ { start = FNR } /^}$/ { if (start && FNR - start > 102) print FILENAME ":" start ": " FNR - start " lines"; start = 0 }' \
            $product)"
    rule "no blanks at line ends" "$(grep -nE '[[:blank:]]$' $sources)"
    rule "no marks of an unfinished merge" "$(conflicts)"
    rule "each header compiles alone" "$(each compiles $headers)"
}
if [ -f "$B/libparley.a" ]; then
    rule "core exports names with its prefixes only" \
        "$(nm -g --defined-only "$B/libparley.a" 2>/dev/null | awk 'NF == 3 && $3 !~ /^(pl|jinja|jv|jt|ev|arg)_/ { print $3 }' | sort -u)"
fi
echo "lint: $passed passed, $failed failed"
[ "$failed" = 0 ]
