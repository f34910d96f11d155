#!/usr/bin/env bash
# test_example.sh PREFIX: the C example, built against the library installed there as a user would,
# classifies an image as Python does.
set -euo pipefail
prefix=$(realpath "$1")
here=$(realpath "$(dirname "$0")")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/CMakeLists.txt" <<END
cmake_minimum_required(VERSION 3.20)
project(example C CXX)
find_package(rvgg REQUIRED)
add_executable(classify $here/../examples/classify.c)
target_link_libraries(classify rvgg::rvgg)
END
cmake -S "$folder" -B "$folder/build" -DCMAKE_PREFIX_PATH="$prefix" > "$folder/log" || { cat "$folder/log"; exit 1; }
cmake --build "$folder/build" > "$folder/log" || { cat "$folder/log"; exit 1; }
expected=$("${PYTHON:-python3}" "$here/make_example.py" "$folder")
found=$("$folder/build/classify" "$folder/net.rvgg" "$folder/image.ppm")
[[ "$found" == "$expected" ]] || { echo "example: $expected needed, found $found"; exit 1; }
if "$folder/build/classify" "$folder/image.ppm" "$folder/image.ppm" 2> "$folder/error"; then exit 1; fi
grep -q "no network of this engine" "$folder/error"
echo "example: passed ($found)"
