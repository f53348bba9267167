#!/usr/bin/env bash
# Puts ONNX Runtime's C header under FOLDER and prints the folder that CMake wants as TMD_ONNXRUNTIME_INCLUDE.
#
#   runtime/cpp/tools/onnxruntime_header.sh FOLDER
#
# Debian packages it as libonnxruntime-dev from release 13 on. On an older Debian the package is taken from there, from
# the mirror that this machine uses, with apt's own checks of signatures, and unpacked; nothing is installed, and apt's
# lists stay as they are. An older header is enough for a newer library: the table of functions grows at its end only.
set -euo pipefail
release=trixie
folder=$(realpath -m "$1")
rm -rf "$folder"
mkdir -p "$folder"/{sources,lists/partial,cache/archives/partial,package}
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")

# This machine's own entries for Debian's main archive, with the release replaced. Two formats of apt's sources.
cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
  awk -v old="$codename" -v new="$release" '
    $1 == "deb" { for (i = 2; i < NF; ++i) if ($i ~ "/debian/?$" && $(i + 1) == old) { $(i + 1) = new; print; break } }
  ' >"$folder/sources/debian.list" || true
cat /etc/apt/sources.list.d/*.sources 2>/dev/null |
  awk -v old="$codename" -v new="$release" 'BEGIN { RS = ""; ORS = "\n\n" }
    $0 ~ "(^|\n)URIs: [^\n]*/debian/?(\n|$)" && $0 ~ "(^|\n)Suites:( [^\n]*)? " old "( |\n|$)" {
      sub(/Suites: [^\n]*/, "Suites: " new); print }' >"$folder/sources/debian.sources" || true

apt=(apt-get -qq -o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$folder/sources"
  -o "Dir::State::lists=$folder/lists" -o "Dir::Cache=$folder/cache" -o APT::Sandbox::User=root)
"${apt[@]}" update >&2
cd "$folder/package"
"${apt[@]}" download libonnxruntime-dev >&2
dpkg-deb -x ./*.deb .
header=$(find "$folder/package/usr/include" -name onnxruntime_c_api.h)
rm -rf "$folder"/{lists,cache,sources}
dirname "$header"
