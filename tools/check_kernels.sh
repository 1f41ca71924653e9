#!/usr/bin/env bash
# The native kernels' tests with every memory access and every undefined operation checked, AMX's tiles in software:
# tools/check_kernels.sh [a PYTHON that has the test extra]. Fresh memory is full of NaN, so that what is read before
# it is written shows. Exits with an error where a check or a test fails.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
compiler=$("$python" -c 'from jaxllm.native.build import compiler; print(*compiler())' 2> /dev/null) || {
    echo "kernels not checked: no C++ compiler was found"
    exit 0
}
runtimes=""
for name in libasan.so libubsan.so; do
    path=$($compiler -print-file-name=$name)
    if [ ! -f "$path" ]; then # the compiler gives the bare name back
        echo "kernels not checked: $compiler has no $name"
        exit 0
    fi
    runtimes="$runtimes $path"
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m jaxllm.native.build --sanitize --soft-tiles --to "$folder/checked.so"
# Derivatives go through the definition. What a check says goes past pytest, as the process ends there: pytest names
# the test whose worker was lost.
LD_PRELOAD=$runtimes \
    ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255 \
    JAXLLM_NATIVE_LIBRARY=$folder/checked.so \
    "$python" -m pytest -n 2 --capture=sys -k "not (differentiated or tiles or test_native_alone)" tests/test_native*.py
