// Protobuf's wire format, read without protobuf.
//
// Not a protobuf library: a cursor over the fields of one message. Two reasons to have it. libprotobuf writes to
// stderr and may end the process, which this library must not do to its host; and its registry of message types is one
// per process, where a second copy of ONNX's (the engine brings its own) is a fatal error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace tmd::internal {

// What a field's bytes are on the wire; kMessage is kBytes that hold a message.
enum WireKind { kVarint, kFixed64, kBytes, kFixed32, kMessage };

struct WireField {
  std::uint32_t number = 0;
  int wire_type = 0;         // 0 varint, 1 fixed64, 2 bytes, 5 fixed32; 3 is a group, skipped as a whole
  std::uint64_t varint = 0;  // wire type 0
  std::string_view bytes;    // wire type 2
};

// One pass over the fields of a message. `next` is false at the end and at the first fault; `good` tells which.
class WireReader {
 public:
  explicit WireReader(std::string_view data) : data_(data) {}
  bool next(WireField* field);
  bool good() const { return good_; }

 private:
  bool fail();
  bool read_varint(std::uint64_t* value);
  bool skip_group(std::uint32_t number);
  bool read_value(WireField* field);

  std::string_view data_;
  std::size_t at_ = 0;
  bool good_ = true;
};

}  // namespace tmd::internal
