#include "text/charsmap.hpp"

#include <cstddef>
#include <cstdint>

#include "base/utf8.hpp"
#include "bundle/protobuf_wire.hpp"

namespace tmd::internal {
namespace {

// Field numbers of sentencepiece's ModelProto and NormalizerSpec.
constexpr std::uint32_t kNormalizer = 3, kDenormalizer = 5, kCharsmap = 2;

std::uint32_t word_at(std::string_view bytes, std::size_t index) {
  std::uint32_t word = 0;
  for (std::size_t i = 0; i < 4; ++i)
    word |= std::uint32_t{static_cast<unsigned char>(bytes[index * 4 + i])} << (8 * i);
  return word;
}

// Its layout is that of Darts-clone: 4 bytes with the size of the trie, the trie's units of 4 bytes, and texts that
// each end with a zero byte.
bool is_sound(std::string_view map) {
  if (map.empty()) return true;  // there is none
  if (map.size() < 4) return false;
  const std::size_t size = word_at(map, 0);
  if (size == 0 || size % 4 || size >= map.size() - 4) return false;
  const std::string_view trie = map.substr(4, size), texts = map.substr(4 + size);
  if (texts.back() != '\0' || !is_utf8(texts)) return false;
  const std::size_t units = size / 4;
  for (std::size_t i = 0; i < units; ++i) {
    const std::uint32_t unit = word_at(trie, i);
    if (unit >> 31) continue;  // a leaf: it is looked at below, by who points to it
    const std::size_t offset = std::size_t{unit >> 10} << ((unit & 1u << 9) >> 6), children = i ^ offset;
    // The next character, any byte, chooses one of 256 units.
    if ((children | 0xFF) >= units) return false;
    if ((unit >> 8 & 1) && (word_at(trie, children) & 0x7FFFFFFF) >= texts.size()) return false;
  }
  return !(word_at(trie, 0) >> 31);
}

}  // namespace

bool has_sound_charsmaps(std::string_view model) {
  WireReader reader(model);
  for (WireField field; reader.next(&field);) {
    if (field.number != kNormalizer && field.number != kDenormalizer) continue;
    // Of two, protobuf takes the last; all are checked.
    WireReader normalizer(field.bytes);
    for (WireField part; normalizer.next(&part);)
      if (part.number == kCharsmap && !is_sound(part.bytes)) return false;
    if (!normalizer.good()) return false;
  }
  return reader.good();
}

}  // namespace tmd::internal
