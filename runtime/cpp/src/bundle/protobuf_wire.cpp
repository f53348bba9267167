#include "bundle/protobuf_wire.hpp"

#include <algorithm>
#include <cstring>

namespace tmd::internal {

bool WireReader::fail() {
  good_ = false;
  return false;
}

bool WireReader::read_varint(std::uint64_t* value) {
  std::uint64_t result = 0;
  for (int shift = 0; shift < 70; shift += 7) {
    if (at_ >= data_.size()) return fail();
    const auto byte = static_cast<unsigned char>(data_[at_++]);
    if ((shift == 63 && byte > 1) || (shift && !byte)) return fail();  // beyond 64 bits; longer than it need be
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

bool WireReader::next_number(std::uint64_t* value) { return good_ && at_ < data_.size() && read_varint(value); }

bool WireReader::next(WireField* field) {
  if (!good_ || at_ >= data_.size()) return false;
  const std::size_t start = at_;
  std::uint64_t tag;
  if (!read_varint(&tag)) return false;
  if (tag >> 32 || !(tag >> 3)) return fail();
  *field = WireField();
  field->number = static_cast<std::uint32_t>(tag >> 3);
  field->wire_type = static_cast<int>(tag & 7);
  if (!read_value(field)) return false;
  field->whole = data_.substr(start, at_ - start);
  return true;
}

std::optional<WireField> last_field(std::string_view data, std::uint32_t number, int wire_type) {
  std::optional<WireField> found;
  WireReader reader(data);
  for (WireField field; reader.next(&field);)
    if (field.number == number && field.wire_type == wire_type) found = field;
  return found;
}

std::size_t count_fields(std::string_view data, std::uint32_t number) {
  std::size_t count = 0;
  WireReader reader(data);
  for (WireField field; reader.next(&field);) count += field.number == number;
  return count;
}

std::vector<std::string_view> all_fields(std::string_view data, std::uint32_t number) {
  std::vector<std::string_view> found;
  WireReader reader(data);
  for (WireField field; reader.next(&field);)
    if (field.number == number && field.wire_type == 2) found.push_back(field.bytes);
  return found;
}

std::string_view last_text(std::string_view data, std::uint32_t number) {
  const std::optional<WireField> field = last_field(data, number, 2);
  return field ? field->bytes : std::string_view();
}

std::int64_t last_number(std::string_view data, std::uint32_t number) {
  const std::optional<WireField> field = last_field(data, number, 0);
  return field ? static_cast<std::int64_t>(field->varint) : 0;
}

std::string in_field_order(std::string_view data) {
  std::vector<WireField> fields;
  WireReader reader(data);
  for (WireField field; reader.next(&field);) fields.push_back(field);
  std::stable_sort(fields.begin(), fields.end(), [](auto& a, auto& b) { return a.number < b.number; });
  std::string ordered;
  ordered.reserve(data.size());
  for (const WireField& field : fields) ordered.append(field.whole);
  return ordered;
}

void WireWriter::varint(std::uint64_t value) {
  for (; value >= 0x80; value >>= 7) data_ += static_cast<char>((value & 0x7F) | 0x80);
  data_ += static_cast<char>(value);
}

void WireWriter::number(std::uint32_t field, std::uint64_t value) {
  varint(std::uint64_t{field} << 3);
  varint(value);
}

void WireWriter::real(std::uint32_t field, float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  varint(std::uint64_t{field} << 3 | 5);
  for (int shift = 0; shift < 32; shift += 8) data_ += static_cast<char>((bits >> shift) & 0xFF);
}

void WireWriter::bytes(std::uint32_t field, std::string_view content) {
  varint(std::uint64_t{field} << 3 | 2);
  varint(content.size());
  data_.append(content);
}

}  // namespace tmd::internal
