// UTF-8 and code points.
#pragma once

#include <string>
#include <string_view>

namespace tmd::internal {

// Whether `text` is UTF-8 by the letter: shortest forms, no surrogates, nothing above U+10FFFF.
bool is_utf8(std::string_view text);

// Code points of text that `is_utf8`. Anything else becomes U+FFFD per byte.
std::u32string decode_utf8(std::string_view text);

std::string encode_utf8(std::u32string_view text);

}  // namespace tmd::internal
