#include "text/embedding.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>

#include "base/error.hpp"
#include "bundle/files.hpp"

namespace tmd::internal {
namespace {

constexpr const char* kRemedy = " Copy the bundle again, or make it again with tmd-export.";

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the embedding table is little-endian, and so must this machine be"
#endif

float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16;
  std::uint32_t exponent = half >> 10 & 31, mantissa = half & 0x3FF, bits;
  if (exponent == 31) {
    bits = sign | 0x7F800000u | mantissa << 13;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {  // subnormal: mantissa * 2^-24, exact in float
    const float value = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float stored_to_float(const char* at, DType dtype) {
  if (dtype == DType::f32) {
    float value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  std::uint16_t half;
  std::memcpy(&half, at, sizeof half);
  if (dtype == DType::f16) return half_to_float(half);
  const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;  // bfloat16 is the upper half of a float
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

std::vector<float> read_rows(const Bundle& bundle, const EmbeddingTable& table, const std::vector<std::int64_t>& ids) {
  const std::string path = bundle.folder + "/" + table.file;
  const auto dim = static_cast<std::size_t>(table.dim), item = item_size(table.dtype), row_bytes = dim * item;
  const File file = open_regular(bundle.folder, table.file, Links::follow);
  if (file.size() != bundle.manifest.files.at(table.file).size)
    fail_run(path + " was changed after the bundle was opened." + kRemedy);
  std::map<std::int64_t, std::size_t> seen;  // id -> the row of the result that has it already: pads repeat
  std::vector<float> embeds(ids.size() * dim);
  std::vector<char> row(row_bytes);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const std::int64_t id = ids[i];
    if (id < 0 || id >= table.rows)
      fail_run("the tokenizer gave the id " + std::to_string(id) + ", and " + table.file + " has rows 0 to " +
               std::to_string(table.rows - 1) + ": they do not belong together. Export the bundle again.");
    float* to = &embeds[i * dim];
    if (const auto [before, fresh] = seen.emplace(id, i); !fresh) {
      std::copy_n(&embeds[before->second * dim], dim, to);
      continue;
    }
    std::size_t done = 0;
    while (done < row_bytes) {
      const auto offset = static_cast<off_t>(static_cast<std::size_t>(id) * row_bytes + done);
      const ssize_t got = ::pread(file.descriptor(), &row[done], row_bytes - done, offset);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) fail_run(path + " ends early." + kRemedy);
      done += static_cast<std::size_t>(got);
    }
    for (std::size_t k = 0; k < dim; ++k) to[k] = stored_to_float(&row[k * item], table.dtype);
  }
  return embeds;
}

}  // namespace tmd::internal
