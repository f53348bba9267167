#include "text/mojibake.hpp"

#include <utf8proc.h>

#include <cstdint>
#include <vector>

#include "base/ascii.hpp"
#include "text/unicode.hpp"

namespace tmd::internal {
namespace {

struct Range {
  char32_t first, last;
  std::uint32_t classes;
};

constexpr Range kRanges[] = {
#include "text/mojibake_classes.inc"
};

// The order of bits is that of the table above.
enum Class : std::uint32_t {
  kCommon = 1u << 0,
  kC1 = 1u << 1,
  kBad = 1u << 2,
  kLaw = 1u << 3,
  kCurrency = 1u << 4,
  kStart = 1u << 5,
  kEnd = 1u << 6,
  kNumeric = 1u << 7,
  kKaomoji = 1u << 8,
  kUpperAccented = 1u << 9,
  kLowerAccented = 1u << 10,
  kUpperCommon = 1u << 11,
  kLowerCommon = 1u << 12,
  kBox = 1u << 13,
  // Not in the table:
  kAsciiLower = 1u << 20,
  kAsciiUpper = 1u << 21,
  kSpace = 1u << 22,
  kWord = 1u << 23,  // a letter, a digit or _
  kNoLineBreak = 1u << 24,
  kNoAsciiLetter = 1u << 25,
};
constexpr std::uint32_t kAsciiLetter = kAsciiLower | kAsciiUpper;
constexpr std::uint32_t kAccented = kLowerAccented | kUpperAccented;

// One place of a pattern: a character of one of the classes, or one of `others`.
struct Place {
  std::uint32_t classes;
  const char32_t* others = U"";
};

constexpr std::uint32_t kNextToBad = kBad | kAccented | kBox | kStart | kEnd | kCurrency | kNumeric | kLaw;
constexpr std::uint32_t kArabic = kCommon | kCurrency | kBad | kNumeric | kStart;

// Juxtapositions that hardly occur in text that was meant; each line is one alternative of ftfy's expression.
const std::vector<std::vector<Place>>& patterns() {
  static const std::vector<std::vector<Place>> list = {
      {{kC1}},
      {{kNextToBad}, {kBad}},
      {{kAsciiLetter}, {kLowerCommon | kUpperCommon}, {kBad}},
      {{kBad}, {kNextToBad & ~kBad}},
      {{kLowerAccented | kLowerCommon | kBox | kEnd | kCurrency | kNumeric}, {kUpperAccented}},
      {{kBox | kEnd | kCurrency | kNumeric}, {kLowerAccented}},
      {{kLowerAccented | kBox | kEnd}, {kCurrency}},
      {{kSpace}, {kUpperAccented}, {kCurrency}},
      {{kUpperAccented | kBox}, {kNumeric | kLaw}},
      {{kAccented | kBox | kCurrency | kEnd}, {kStart}, {kNumeric}},
      {{kAccented | kCurrency | kNumeric | kBox | kLaw}, {kEnd}, {kStart}},
      {{kCurrency | kNumeric | kBox}, {kStart}},
      {{kAsciiLower}, {kUpperAccented}, {kStart | kCurrency}},
      {{kBox}, {kKaomoji}},
      {{kAccented | kCurrency | kNumeric | kStart | kEnd | kLaw}, {kBox}},
      {{kBox}, {kEnd}},
      {{kAccented}, {kStart | kEnd}, {kWord}},
      {{0, U"Œœ"}, {kNoAsciiLetter}},
      {{kUpperAccented}, {0, U"°"}},
      {{0, U"ÂÃÎÐ"}, {kStart | kEnd, U"€œŠš¢£Ÿž\u00a0\u00ad®©°·»–—´"}},
      {{0, U"×"}, {0, U"²³"}},
      {{0, U"ØÙ"}, {kArabic, U"ŸŠ®°µ»"}, {0, U"ØÙ"}, {kArabic, U"ŸŠ®°µ»"}},
      {{0, U"à"}, {0, U"²µ¹¼½¾"}},
      {{0, U"√"}, {0, U"±∂†≠®™´≤≥¥µø"}},
      {{0, U"≈"}, {0, U"°¢"}},
      {{0, U"‚"}, {0, U"Ä"}, {0, U"ìîïòôúùû†°¢π"}},
      {{0, U"‚"}, {0, U"âó"}, {0, U"àä°ê"}},
      {{0, U"в"}, {0, U"Ђ"}},
      {{0, U"ВГРС"}, {kC1 | kBad | kStart | kEnd | kCurrency, U"°µ"}, {0, U"ВГРС"}},
      {{0, U"Г"}, {0, U"ў"}, {0, U"В"}, {0, U"Ђ"}, {0, U"В"}, {kNoLineBreak}, {kAsciiLetter, U" "}},
      {{0, U"Ã"}, {0, U"\u00a0¡"}},
      {{kAsciiLower}, {0, U"ÃÂ"}, {0, U" "}},
      {{kAsciiLower}, {kSpace}, {0, U"ÃÂ"}, {0, U" "}},
      {{kAsciiLower | kEnd, U".,?!"}, {0, U"Â"}, {kStart | kEnd, U" "}},
      {{0, U"β"}, {0, U"€"}, {0, U"™\u00a0Ά\u00ad®°"}},
      {{0, U"ΒΓΞΟ"}, {kC1 | kBad | kStart | kEnd | kCurrency, U"°"}, {0, U"ΒΓΞΟ"}},
      {{0, U"ā"}, {0, U"€"}},
  };
  return list;
}

std::uint32_t classes_of(char32_t c) {
  std::uint32_t classes = 0;
  for (const Range& range : kRanges)
    if (c >= range.first && c <= range.last) classes |= range.classes;
  if (is_ascii_lower(c)) classes |= kAsciiLower;
  if (is_ascii_upper(c)) classes |= kAsciiUpper;
  if (!is_ascii_letter(c)) classes |= kNoAsciiLetter;
  if (is_space(c)) classes |= kSpace;
  if (c != '\n') classes |= kNoLineBreak;
  if (is_word(c)) classes |= kWord;
  return classes;
}

bool fits(const Place& place, char32_t c, std::uint32_t classes) {
  return (place.classes & classes) || std::u32string_view(place.others).find(c) != std::u32string_view::npos;
}

}  // namespace

bool looks_wrongly_decoded(std::u32string_view text) {
  bool ascii = true;
  for (const char32_t c : text) ascii = ascii && c < 0x80;
  if (ascii) return false;
  // "Ã " right at the beginning counts without a letter before it.
  if (text.size() >= 2 && (text[0] == U'Ã' || text[0] == U'Â') && text[1] == ' ') return true;
  std::vector<std::uint32_t> classes;
  classes.reserve(text.size());
  for (const char32_t c : text) classes.push_back(classes_of(c));
  for (std::size_t at = 0; at < text.size(); ++at) {
    for (const std::vector<Place>& pattern : patterns()) {
      if (pattern.size() > text.size() - at) continue;
      std::size_t i = 0;
      while (i < pattern.size() && fits(pattern[i], text[at + i], classes[at + i])) ++i;
      if (i == pattern.size()) return true;
    }
  }
  return false;
}

}  // namespace tmd::internal
