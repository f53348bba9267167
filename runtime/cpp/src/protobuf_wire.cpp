#include "protobuf_wire.hpp"

#include <vector>

namespace tmd::internal {
namespace {

constexpr int kStartGroup = 3, kEndGroup = 4;
constexpr std::size_t kMaxGroups = 100;

}  // namespace

bool WireReader::fail() {
  good_ = false;
  return false;
}

bool WireReader::read_varint(std::uint64_t* value) {
  std::uint64_t result = 0;
  for (int shift = 0; shift < 70; shift += 7) {
    if (at_ >= data_.size()) return fail();
    const auto byte = static_cast<unsigned char>(data_[at_++]);
    if (shift == 63 && byte > 1) return fail();
    result |= static_cast<std::uint64_t>(byte & 0x7F) << shift;
    if (byte < 0x80) {
      *value = result;
      return true;
    }
  }
  return fail();
}

bool WireReader::read_value(WireField* field) {
  const auto advance = [&](std::uint64_t count) {
    if (count > data_.size() - at_) return fail();
    field->bytes = data_.substr(at_, static_cast<std::size_t>(count));
    at_ += static_cast<std::size_t>(count);
    return true;
  };
  std::uint64_t length;
  switch (field->wire_type) {
    case 0:
      return read_varint(&field->varint);
    case 1:
      return advance(8);
    case 2:
      return read_varint(&length) && advance(length);
    case 5:
      return advance(4);
    default:
      return fail();
  }
}

bool WireReader::skip_group(std::uint32_t number) {
  std::vector<std::uint32_t> open = {number};
  while (!open.empty()) {
    std::uint64_t tag;
    if (!read_varint(&tag) || tag >> 32 || !(tag >> 3)) return fail();
    WireField inner;
    inner.number = static_cast<std::uint32_t>(tag >> 3);
    inner.wire_type = static_cast<int>(tag & 7);
    if (inner.wire_type == kStartGroup) {
      if (open.size() >= kMaxGroups) return fail();
      open.push_back(inner.number);
    } else if (inner.wire_type == kEndGroup) {
      if (open.back() != inner.number) return fail();
      open.pop_back();
    } else if (!read_value(&inner)) {
      return false;
    }
  }
  return true;
}

bool WireReader::next(WireField* field) {
  if (!good_ || at_ >= data_.size()) return false;
  std::uint64_t tag;
  if (!read_varint(&tag)) return false;
  if (tag >> 32 || !(tag >> 3)) return fail();
  *field = WireField();
  field->number = static_cast<std::uint32_t>(tag >> 3);
  field->wire_type = static_cast<int>(tag & 7);
  return field->wire_type == kStartGroup ? skip_group(field->number) : read_value(field);
}

}  // namespace tmd::internal
