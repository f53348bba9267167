#include "base/utf8.hpp"

#include <cstddef>

namespace tmd::internal {
namespace {

// The code point at `position`, which moves behind it; false if the bytes there are no UTF-8 (it then moves by one).
bool next_point(std::string_view text, std::size_t* position, char32_t* point) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const std::size_t start = (*position)++;
  const unsigned char first = byte(start);
  if (first < 0x80) {
    *point = first;
    return true;
  }
  const int more = first >= 0xF0 ? 3 : first >= 0xE0 ? 2 : 1;
  if (first < 0xC2 || first > 0xF4 || text.size() - start <= static_cast<std::size_t>(more)) return false;
  char32_t value = first & (0x3F >> more);
  for (int i = 1; i <= more; ++i) {
    const unsigned char next = byte(start + static_cast<std::size_t>(i));
    if ((next & 0xC0) != 0x80) return false;
    value = value << 6 | (next & 0x3F);
  }
  const char32_t lowest = more == 3 ? 0x10000 : more == 2 ? 0x800 : 0x80;
  if (value < lowest || value > 0x10FFFF || (value >= 0xD800 && value <= 0xDFFF)) return false;
  *position = start + static_cast<std::size_t>(more) + 1;
  *point = value;
  return true;
}

}  // namespace

bool is_utf8(std::string_view text) {
  char32_t point;
  for (std::size_t position = 0; position < text.size();)
    if (!next_point(text, &position, &point)) return false;
  return true;
}

std::u32string decode_utf8(std::string_view text) {
  std::u32string out;
  out.reserve(text.size());
  for (std::size_t position = 0; position < text.size();) {
    char32_t point;
    out += next_point(text, &position, &point) ? point : U'\uFFFD';
  }
  return out;
}

std::string encode_utf8(std::u32string_view text) {
  std::string out;
  out.reserve(text.size());
  const auto put = [&](char32_t value) { out += static_cast<char>(static_cast<unsigned char>(value)); };
  for (const char32_t c : text) {
    if (c < 0x80) {
      put(c);
    } else if (c < 0x800) {
      put(0xC0 | c >> 6), put(0x80 | (c & 0x3F));
    } else if (c < 0x10000) {
      put(0xE0 | c >> 12), put(0x80 | (c >> 6 & 0x3F)), put(0x80 | (c & 0x3F));
    } else {
      put(0xF0 | c >> 18), put(0x80 | (c >> 12 & 0x3F)), put(0x80 | (c >> 6 & 0x3F)), put(0x80 | (c & 0x3F));
    }
  }
  return out;
}

}  // namespace tmd::internal
