// Untrusted text for a message: printable ASCII with escapes, cut to a length. The same rule as Python's `quote`.
#pragma once

#include <cstdio>
#include <string>
#include <string_view>

namespace tmd::internal {

inline std::string quote(std::string_view text, std::size_t limit = 80) {
  std::string out = "'";
  for (const char each : text) {
    const auto c = static_cast<unsigned char>(each);
    if (out.size() >= limit) return out + "...";
    if (c < 0x20 || c > 0x7e || c == '\\' || c == '\'') {
      char escape[5];
      std::snprintf(escape, sizeof escape, "\\x%02x", static_cast<unsigned>(c));
      out += escape;
    } else {
      out += static_cast<char>(c);
    }
  }
  return out + "'";
}

// The same without its marks, for where they would disturb.
inline std::string bare(std::string_view text, std::size_t limit = 80) {
  const std::string quoted = quote(text, limit);
  return quoted.substr(1, quoted.size() - 2);
}

}  // namespace tmd::internal
