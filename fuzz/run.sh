#!/bin/sh
# Builds the fuzz targets with libFuzzer and runs each for SECONDS (default 20), starting from a copy of its corpus.
# Fails when one finds a fault; the input that shows it lies in build-fuzz/found/ then.
#   fuzz/run.sh [SECONDS [TARGET …]]
set -eu
cd "$(dirname "$0")/.."
seconds=${1:-20}
[ $# -eq 0 ] || shift
targets=${*:-idx csv job safetensors manifest event fault segment shared_state control}

cmake -S . -B build-fuzz -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_COMPILER=clang++ \
  -DCMAKE_C_COMPILER=clang -DLOCKSTEP_FUZZ=ON -DLOCKSTEP_WITH_TORCH=OFF -DLOCKSTEP_TESTS=OFF >/dev/null
ninja -C build-fuzz $(for target in $targets; do echo "${target}_fuzz"; done)

mkdir -p build-fuzz/found
status=0
for target in $targets; do
  rm -rf "build-fuzz/corpus/$target"
  mkdir -p "build-fuzz/corpus"
  cp -r "fuzz/corpus/$target" "build-fuzz/corpus/$target"
  echo "${target}_fuzz: $seconds s"
  if ! "build-fuzz/${target}_fuzz" -max_total_time="$seconds" -max_len=4096 -timeout=10 -rss_limit_mb=2048 \
      -artifact_prefix="build-fuzz/found/$target-" -print_final_stats=1 \
      "build-fuzz/corpus/$target" >"build-fuzz/$target.log" 2>&1; then
    status=1
    tail -n 40 "build-fuzz/$target.log"
  fi
  grep -E 'number_of_executed_units|new_units_added' "build-fuzz/$target.log" || true
done
exit $status
