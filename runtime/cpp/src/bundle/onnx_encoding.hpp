// The one encoding in which an ONNX file is read: what protobuf itself would write of the same content.
//
// Other encodings of a graph (fields in another order or twice, long numbers, unknown parts) can mean different things
// to two parsers, and an engine has a parser of its own. Python compares the file with what protobuf writes; here the
// rules of protobuf's writer are checked one by one. Tests compare the verdicts.
#pragma once

#include <functional>
#include <string_view>

namespace tmd::internal {

// Whether `data` is a canonically encoded ModelProto: known fields only, in the order of their numbers, numbers as
// short as they go, text in UTF-8, nested no deeper than protobuf reads.
bool is_canonical_onnx(std::string_view data);

// Calls `visit` with every TensorProto anywhere in a canonical ModelProto, wherever the format allows one.
void for_each_tensor(std::string_view model, const std::function<void(std::string_view)>& visit);

}  // namespace tmd::internal
