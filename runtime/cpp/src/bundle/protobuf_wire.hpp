// Protobuf's wire format, read and written without protobuf.
//
// Not a protobuf library: a cursor over the fields of one message, and its counterpart. Two reasons to have it.
// libprotobuf writes to stderr and may end the process, which this library must not do to its host; and its registry of
// message types is one per process, where a second copy of ONNX's (the engine brings its own) is a fatal error.
// Of the encodings that protobuf reads only the one that it writes is read here: numbers in as few bytes as they go,
// and no groups.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace tmd::internal {

struct WireField {
  std::uint32_t number = 0;
  int wire_type = 0;         // 0 varint, 1 fixed64, 2 bytes, 5 fixed32
  std::uint64_t varint = 0;  // wire type 0
  std::string_view bytes;    // wire type 2
  std::string_view whole;    // the field as it stands, tag included
};

// One pass over the fields of a message. `next` is false at the end and at the first fault; `good` tells which.
class WireReader {
 public:
  explicit WireReader(std::string_view data) : data_(data) {}
  bool next(WireField* field);
  bool next_number(std::uint64_t* value);  // of a packed field
  bool good() const { return good_; }

 private:
  bool fail();
  bool read_varint(std::uint64_t* value);
  bool read_value(WireField* field);

  std::string_view data_;
  std::size_t at_ = 0;
  bool good_ = true;
};

// The last value of a field, as protobuf has it; absent if it does not occur in this wire type.
std::optional<WireField> last_field(std::string_view data, std::uint32_t number, int wire_type);
std::size_t count_fields(std::string_view data, std::uint32_t number);
// The bytes of every field of this number that has any.
std::vector<std::string_view> all_fields(std::string_view data, std::uint32_t number);
// The bytes of the last one; empty if there is none.
std::string_view last_text(std::string_view data, std::uint32_t number);
// The last whole number; 0 if there is none.
std::int64_t last_number(std::string_view data, std::uint32_t number);

// The fields of a message in the order of their numbers, as protobuf writes them.
std::string in_field_order(std::string_view data);

// Puts a message together, field by field.
class WireWriter {
 public:
  void number(std::uint32_t field, std::uint64_t value);
  void real(std::uint32_t field, float value);
  void bytes(std::uint32_t field, std::string_view content);
  void copy(const WireField& field) { data_.append(field.whole); }
  const std::string& data() const { return data_; }

 private:
  void varint(std::uint64_t value);
  std::string data_;
};

}  // namespace tmd::internal
