#!/usr/bin/env bash
# Everything that the C++ library promises, from a clean build folder: build, tests, install, the examples against the
# installed library (CMake shared and static, pkg-config), and the comparison with Python.
#
#   runtime/cpp/ci.sh [BUILD_FOLDER]        default: build/cpp-ci
#
# Needs: apt install cmake ninja-build g++ pkg-config nlohmann-json3-dev libsentencepiece-dev libutf8proc-dev libssl-dev
# doctest-dev (and clang for the fuzzers, which are left out without it); a Python environment with this repository's
# package, openvino, onnxruntime, pytest and hypothesis. ONNX Runtime's header is fetched where it is not installed; if
# that fails, a line says so and the engine onnxruntime is left out. FUZZ_SECONDS (default 5) is the time of each
# fuzzer; with 0 they are built and see their first inputs once; TMD_SKIP_FUZZ=1 leaves them out. FUZZ_CORPUS (default: in the build folder) is where
# what they find is kept, and where they go on from. SANITIZE=1 also runs the tests under ASan with UBSan, and under TSan. TENSORRT_INCLUDE,
# TENSORRT_RTX_INCLUDE and CUDA_INCLUDE name the headers of TensorRT, of TensorRT for RTX and of CUDA (folders, with ;
# between several): their engines are then built as well, and tested on stand-ins for NVIDIA's libraries. TMD_SKIP_PYTEST=1 leaves out the comparison with Python, for who runs
# those tests anyway with TMD_CPP_BUILD set to the build folder.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
build=$(realpath -m "${1:-$root/build/cpp-ci}")
python=${PYTHON:-python3}
openvino=$("$python" -c "import openvino, os; print(os.path.dirname(openvino.__file__))")
jobs=$(nproc)
bundle=$root/runtime/tmd_runtime/bundles/tiny
prompt="a red circle moving right on a black background"
onnxruntime=$("$python" -c "import onnxruntime, os; print(os.path.dirname(onnxruntime.__file__))")
onnxruntime=$(echo "$onnxruntime"/capi/libonnxruntime.so.*)
say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }
engines=(-DOpenVINO_DIR="$openvino/cmake" -DTMD_ONNXRUNTIME_LIBRARY="$onnxruntime")
[ -z "${CUDA_INCLUDE:-}" ] || engines+=(-DTMD_CUDA_INCLUDE="$CUDA_INCLUDE")
[ -z "${TENSORRT_INCLUDE:-}" ] || engines+=(-DTMD_TENSORRT_INCLUDE="$TENSORRT_INCLUDE")
[ -z "${TENSORRT_RTX_INCLUDE:-}" ] || engines+=(-DTMD_TENSORRT_RTX_INCLUDE="$TENSORRT_RTX_INCLUDE")
configure() { cmake -G Ninja "${engines[@]}" "$@" >"$build/configure.log" || { cat "$build/configure.log"; exit 1; }; }
rm -rf "$build"
mkdir -p "$build"

say build
if [ ! -e /usr/include/onnxruntime/onnxruntime_c_api.h ]; then
  if header=$("$root/runtime/cpp/tools/onnxruntime_header.sh" "$build/onnxruntime" 2>"$build/onnxruntime.log"); then
    engines+=(-DTMD_ONNXRUNTIME_INCLUDE="$header")
  else
    echo "ONNX Runtime's header cannot be had ($(tail -n 1 "$build/onnxruntime.log")): its engine is neither built nor tested"
  fi
fi
configure -S "$root/runtime/cpp" -B "$build" -DCMAKE_INSTALL_PREFIX="$build/prefix" -DCMAKE_INSTALL_LIBDIR=lib
grep "tmd: " "$build/configure.log"
cmake --build "$build" -j "$jobs"

say test
ctest --test-dir "$build" --output-on-failure

say "install, and build the examples against what is installed"
cmake --install "$build" >"$build/install.log"
for kind in shared static; do
  static=$([ $kind = static ] && echo ON || echo OFF)
  configure -S "$root/runtime/cpp/examples" -B "$build/examples-$kind" -Dtmd_ROOT="$build/prefix" -DTMD_STATIC_EXAMPLES=$static
  cmake --build "$build/examples-$kind" -j "$jobs"
done
flags=$(PKG_CONFIG_PATH="$build/prefix/lib/pkgconfig" pkg-config --cflags --libs tmd)
# shellcheck disable=SC2086  # the flags are words
cc -std=c99 -Wall -Werror -o "$build/generate-pkgconfig" "$root/runtime/cpp/examples/generate.c" $flags

say "run the examples; no Python in any of them"
for program in examples-shared/tmd_generate examples-static/tmd_generate generate-pkgconfig; do
  out=$build/$(tr / - <<<"$program").rgb
  LD_LIBRARY_PATH="$build/prefix/lib" "$build/$program" "$bundle" "$prompt" "$out" --seed 1 --threads 1 2>/dev/null
  if LD_LIBRARY_PATH="$build/prefix/lib" ldd "$build/$program" | grep -i python; then exit 1; fi
done
cmp "$build/examples-shared-tmd_generate.rgb" "$build/examples-static-tmd_generate.rgb"
cmp "$build/examples-shared-tmd_generate.rgb" "$build/generate-pkgconfig.rgb"
"$build/examples-shared/tmd_two_threads" "$bundle" "$prompt" "a blue square moving left on a white background"
"$build/examples-shared/tmd_preview" "$bundle" "$prompt" | tail -n 1

if [ -z "${TMD_SKIP_PYTEST:-}" ]; then
  say "the same as Python"
  (cd "$root" && TMD_CPP_BUILD="$build" "$python" -m pytest -q -p no:cacheprovider tests/unit/cpp tests/e2e/test_cpp_frames.py)
fi

clang=$(command -v clang++ || compgen -c clang++- | sort -V | tail -n 1 || true)
fuzzer='extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }'
if [ -z "${TMD_SKIP_FUZZ:-}" ] && [ -n "$clang" ] && "$clang" -x c++ -fsanitize=fuzzer,address,undefined -o "$build/fuzzer" - <<<"$fuzzer" 2>/dev/null; then
  say fuzz
  configure -S "$root/runtime/cpp" -B "$build/fuzz" -DCMAKE_C_COMPILER="${clang/++/}" -DCMAKE_CXX_COMPILER="$clang" \
    -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DTMD_BUILD_FUZZERS=ON -DTMD_OPENVINO=OFF -DTMD_ONNXRUNTIME=OFF -DTMD_TENSORRT=OFF -DTMD_TENSORRT_RTX=OFF \
    -DTMD_BUILD_TESTS=OFF -DTMD_BUILD_EXAMPLES=OFF -DTMD_SANITIZE=address,undefined
  cmake --build "$build/fuzz" -j "$jobs"
  fuzz() {  # NAME LENGTH INPUTS: as large as the inputs, which would be cut otherwise
    local corpus=${FUZZ_CORPUS:-$build/corpus}/$1 time=-max_total_time=${FUZZ_SECONDS:-5}
    [ "${FUZZ_SECONDS:-5}" != 0 ] || time=-runs=0
    mkdir -p "$corpus"
    find "$bundle" -maxdepth 1 -name "$3" -size -"$(($2 / 1000))"k -exec cp {} "$corpus" \;
    (cd "$build" && "fuzz/fuzz/tmd_fuzz_$1" "$time" -print_final_stats=1 -rss_limit_mb=2000 -max_len="$2" "$corpus") \
      >"$build/fuzz-$1.log" 2>&1 || { tail -n 40 "$build/fuzz-$1.log"; return 1; }
    echo "$1: $(grep -c . <(ls "$corpus")) inputs kept, $(sed -n 's/stat::number_of_executed_units: *//p' "$build/fuzz-$1.log") tried"
  }
  running=()
  for target in "graph 70000 *.onnx" "manifest 40000 manifest.json" "tokenizer 300000 tokenizer.model" "prompt 40000 manifest.json"; do
    read -r name length inputs <<<"$target"
    fuzz "$name" "$length" "$inputs" & running+=($!)
    if [ ${#running[@]} -ge "$jobs" ]; then
      wait "${running[0]}"
      running=("${running[@]:1}")
    fi
  done
  for one in "${running[@]}"; do wait "$one"; done
else
  say "TMD_SKIP_FUZZ is set, or no clang, or none with libFuzzer (libclang-rt-*-dev): the fuzzers are not built"
fi

if [ -n "${SANITIZE:-}" ]; then
  export TBB_ENABLE_SANITIZERS=1  # else TBB, inside OpenVINO, loads its helper in a way that AddressSanitizer refuses
  for kind in address,undefined thread; do
    say "sanitizer $kind"
    folder=$build/${kind%%,*}  # a comma in a path ends the linker's -rpath
    configure -S "$root/runtime/cpp" -B "$folder" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DTMD_BUILD_EXAMPLES=OFF -DTMD_SANITIZE=$kind
    cmake --build "$folder" -j "$jobs"
    ASAN_OPTIONS=detect_leaks=1 LSAN_OPTIONS="suppressions=$root/runtime/cpp/tests/lsan.supp" \
      TSAN_OPTIONS="suppressions=$root/runtime/cpp/tests/tsan.supp ignore_noninstrumented_modules=1" \
      ctest --test-dir "$folder" --output-on-failure
  done
fi
say done
