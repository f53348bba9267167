#include "text/html_entities.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "base/ascii.hpp"

namespace tmd::internal {
namespace {

struct Entity {
  const char* name;    // without '&'
  char32_t value[4];   // ended by 0
  bool only_capitals;  // not of HTML: a capital spelling that only unescape_clear_references knows
};

constexpr Entity kEntities[] = {
#include "text/html_entities.inc"
};

// What HTML says of numbers 0x80 to 0x9F: they mean Windows-1252.
constexpr char32_t kWindows1252[32] = {0x20AC, 0x81,   0x201A, 0x192,  0x201E, 0x2026, 0x2020, 0x2021,
                                       0x2C6,  0x2030, 0x160,  0x2039, 0x152,  0x8D,   0x17D,  0x8F,
                                       0x90,   0x2018, 0x2019, 0x201C, 0x201D, 0x2022, 0x2013, 0x2014,
                                       0x2DC,  0x2122, 0x161,  0x203A, 0x153,  0x9D,   0x17E,  0x178};

bool is_hex(char32_t c) { return is_ascii_digit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F'); }

const Entity* find(std::u32string_view name, bool with_capitals) {
  std::string key;
  for (const char32_t c : name) {
    if (c >= 0x80) return nullptr;
    key += static_cast<char>(c);
  }
  const auto* end = std::end(kEntities);
  const auto* found = std::lower_bound(std::begin(kEntities), end, key, [](const Entity& entity, const std::string& k) {
    return std::strcmp(entity.name, k.c_str()) < 0;
  });
  return found != end && key == found->name && (with_capitals || !found->only_capitals) ? found : nullptr;
}

// The characters of a numeric reference, `digits` being only digits of its base.
std::u32string numeric(std::u32string_view digits, unsigned base) {
  char32_t number = 0;
  for (const char32_t c : digits) {
    const char32_t digit = is_ascii_digit(c) ? c - '0' : (c | 0x20) - 'a' + 10;
    number = std::min<char32_t>(number * base + digit, 0x110000);  // beyond Unicode it stays there
  }
  if (number == 0) return U"\uFFFD";
  if (number >= 0x80 && number <= 0x9F) return std::u32string(1, kWindows1252[number - 0x80]);
  if ((number >= 0xD800 && number <= 0xDFFF) || number > 0x10FFFF) return U"\uFFFD";
  const bool control = number < 0x20 && number != '\t' && number != '\n' && number != '\f' && number != '\r';
  if (control || number == 0x7F || (number >= 0xFDD0 && number <= 0xFDEF) || (number & 0xFFFE) == 0xFFFE) return {};
  return std::u32string(1, number);
}

// The end of the digits that follow "&#" or "&#x"; writes the base.
std::size_t digits_end(std::u32string_view text, std::size_t* start, unsigned* base) {
  *base = 10;
  if (*start < text.size() && (text[*start] == 'x' || text[*start] == 'X')) ++*start, *base = 16;
  std::size_t end = *start;
  while (end < text.size() && (*base == 16 ? is_hex(text[end]) : is_ascii_digit(text[end]))) ++end;
  return end;
}

bool ends_name(char32_t c) {
  return c == '\t' || c == '\n' || c == '\f' || c == ' ' || c == '<' || c == '&' || c == '#' || c == ';';
}

}  // namespace

std::u32string html_unescape(std::u32string_view text) {
  std::u32string out;
  for (std::size_t at = 0; at < text.size();) {
    if (text[at] != '&') {
      out += text[at++];
      continue;
    }
    std::size_t start = at + 1;
    if (start < text.size() && text[start] == '#') {
      unsigned base;
      ++start;
      std::size_t end = digits_end(text, &start, &base);
      if (end == start) {
        out += text[at++];
        continue;
      }
      out += numeric(text.substr(start, end - start), base);
      at = end < text.size() && text[end] == ';' ? end + 1 : end;
      continue;
    }
    std::size_t end = start;
    while (end < text.size() && end - start < 32 && !ends_name(text[end])) ++end;
    if (end > start && end < text.size() && text[end] == ';') ++end;
    // The whole of it, or the longest beginning that HTML knows, of at least two letters.
    const Entity* entity = end > start ? find(text.substr(start, end - start), false) : nullptr;
    std::size_t used = end;
    for (std::size_t length = end - start; !entity && length-- > 2;) {
      entity = find(text.substr(start, length), false);
      used = start + length;
    }
    if (entity) {
      out += entity->value;
    } else {
      used = end > start ? end : start;
      out += text.substr(at, used - at);
    }
    if (entity) out += text.substr(used, end - used);
    at = end > start ? end : start;
  }
  return out;
}

std::u32string unescape_clear_references(std::u32string_view text) {
  std::u32string out;
  for (std::size_t at = 0; at < text.size();) {
    std::size_t start = at + 1;
    const bool number = text[at] == '&' && start < text.size() && text[start] == '#';
    if (number) ++start;
    std::size_t end = start;
    while (text[at] == '&' && end < text.size() && end - start < 24 &&
           (is_ascii_digit(text[end]) || is_ascii_letter(text[end])))
      ++end;
    if (text[at] != '&' || end == start || end >= text.size() || text[end] != ';') {
      out += text[at++];
      continue;
    }
    const std::u32string_view whole = text.substr(at, end + 1 - at);
    if (number) {
      const std::u32string value = html_unescape(whole);
      // A semicolon that is still there was not part of a number.
      out += value.find(U';') == std::u32string::npos ? std::u32string_view(value) : whole;
    } else {
      const Entity* entity = find(whole.substr(1), true);
      out += entity ? std::u32string_view(entity->value) : whole;
    }
    at = end + 1;
  }
  return out;
}

}  // namespace tmd::internal
