#include "text/clean_prompt.hpp"

#include "base/ascii.hpp"
#include "base/error.hpp"
#include "base/utf8.hpp"
#include "text/html_entities.hpp"
#include "text/mojibake.hpp"
#include "text/unicode.hpp"

namespace tmd::internal {
namespace {

constexpr std::size_t kMaxBytes = 1000000;  // ftfy takes longer lines apart at this many characters

const char32_t* ligature(char32_t c) {
  switch (c) {
    case 0x0132:
      return U"IJ";
    case 0x0133:
      return U"ij";
    case 0x0149:
      return U"\u02BCn";
    case 0x01F1:
      return U"DZ";
    case 0x01F2:
      return U"Dz";
    case 0x01F3:
      return U"dz";
    case 0x01C4:
      return U"D\u017D";
    case 0x01C5:
      return U"D\u017E";
    case 0x01C6:
      return U"d\u017E";
    case 0x01C7:
      return U"LJ";
    case 0x01C8:
      return U"Lj";
    case 0x01C9:
      return U"lj";
    case 0x01CA:
      return U"NJ";
    case 0x01CB:
      return U"Nj";
    case 0x01CC:
      return U"nj";
    case 0xFB00:
      return U"ff";
    case 0xFB01:
      return U"fi";
    case 0xFB02:
      return U"fl";
    case 0xFB03:
      return U"ffi";
    case 0xFB04:
      return U"ffl";
    case 0xFB05:
      return U"\u017Ft";
    case 0xFB06:
      return U"st";
    default:
      return nullptr;
  }
}

bool is_dropped(char32_t c) {
  return c <= 0x08 || c == 0x0B || (c >= 0x0E && c <= 0x1F) || c == 0x7F || (c >= 0x206A && c <= 0x206F) ||
         c == 0xFEFF || (c >= 0xFFF9 && c <= 0xFFFC);
}

// Ligatures, wide and narrow letters, quotes: one character at a time, in ftfy's order.
std::u32string replace_characters(std::u32string_view text) {
  std::u32string plain;
  for (const char32_t c : text) {
    if (const char32_t* letters = ligature(c)) {
      plain += letters;
    } else {
      plain += c;
    }
  }
  std::u32string out;
  for (const char32_t c : plain) {
    if (c == 0x3000) {
      out += U' ';
    } else if (c >= 0xFF01 && c <= 0xFFEF) {
      out += normalize_nfkc(std::u32string_view(&c, 1));
    } else if (c >= 0x201C && c <= 0x201F) {
      out += U'"';
    } else if (c == 0x02BC || (c >= 0x2018 && c <= 0x201B)) {
      out += U'\'';
    } else {
      out += c;
    }
  }
  return out;
}

std::u32string unify_line_breaks(std::u32string_view text) {
  std::u32string out;
  for (std::size_t at = 0; at < text.size(); ++at) {
    const char32_t c = text[at];
    if (c == '\r' && at + 1 < text.size() && text[at + 1] == '\n') continue;
    out += c == '\r' || c == 0x2028 || c == 0x2029 || c == 0x85 ? U'\n' : c;
  }
  return out;
}

// ESC [ numbers letter: what colours a terminal.
std::u32string remove_terminal_escapes(std::u32string_view text) {
  std::u32string out;
  for (std::size_t at = 0; at < text.size(); ++at) {
    if (text[at] == 0x1B && at + 1 < text.size() && text[at + 1] == '[') {
      std::size_t end = at + 2;
      while (end < text.size() && (text[end] == ';' || is_decimal(text[end]))) ++end;
      if (end < text.size() && is_ascii_letter(text[end])) {
        at = end;
        continue;
      }
    }
    out += text[at];
  }
  return out;
}

std::u32string remove_control_characters(std::u32string_view text) {
  std::u32string out;
  for (const char32_t c : text)
    if (!is_dropped(c)) out += c;
  return out;
}

// ftfy.fix_text of one line, except that text which it would decode anew is refused.
std::u32string fix_line(std::u32string text, bool unescape) {
  for (;;) {
    const std::u32string before = text;
    if (unescape) text = unescape_clear_references(text);
    if (looks_wrongly_decoded(text))
      refuse_usage(
          "the prompt looks as if it was decoded with the wrong character set (such as '\xC3\x83\xC2\xA9' for "
          "'\xC3\xA9'): hand it over as it was written, in UTF-8.");
    text = remove_control_characters(remove_terminal_escapes(unify_line_breaks(replace_characters(text))));
    text = normalize_nfc(text);
    if (text == before) return text;
  }
}

std::u32string fix_text(std::u32string_view text) {
  std::u32string out;
  bool unescape = true;
  while (!text.empty()) {
    const std::size_t end = text.find(U'\n');
    const std::u32string_view line = text.substr(0, end == std::u32string_view::npos ? text.size() : end + 1);
    // Where there are tags, references are meant as they stand; from the first such line on.
    if (line.find(U'<') != std::u32string_view::npos) unescape = false;
    out += fix_line(std::u32string(line), unescape);
    text.remove_prefix(line.size());
  }
  return out;
}

}  // namespace

void check_prompt(std::string_view prompt) {
  if (prompt.size() > kMaxBytes)
    refuse_usage("the prompt has more than a million bytes: describe the video in a few words.");
  if (!is_utf8(prompt)) refuse_usage("the prompt is not UTF-8: convert it before it is handed over.");
}

std::string clean_prompt(std::string_view prompt) {
  check_prompt(prompt);
  const std::u32string text = html_unescape(html_unescape(fix_text(decode_utf8(prompt))));
  std::u32string out;
  for (std::size_t at = 0; at < text.size();) {
    if (is_space(text[at])) {
      ++at;
      continue;
    }
    if (!out.empty()) out += U' ';
    while (at < text.size() && !is_space(text[at])) out += text[at++];
  }
  return encode_utf8(out);
}

}  // namespace tmd::internal
