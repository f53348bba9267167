#include "bundle/sections.hpp"

#include <set>

#include "base/ascii.hpp"
#include "base/error.hpp"
#include "base/quote.hpp"

namespace tmd::internal {
namespace {

constexpr std::size_t kMaxTensors = 256;

// [[1-9]digits*]symbol: "height", "8*height".
Dimension symbolic(const Field& field, const std::string& text) {
  const auto letter = [](char c) { return is_ascii_letter(static_cast<unsigned char>(c)) || c == '_'; };
  const auto digit = [](char c) { return is_ascii_digit(static_cast<unsigned char>(c)); };
  Dimension dimension;
  const std::size_t star = text.find('*');
  bool good = true;
  if (star != std::string::npos) {
    good = star >= 1 && star <= 6 && text[0] != '0';
    for (std::size_t i = 0; i < star && good; ++i) good = digit(text[i]);
    if (good) dimension.factor = std::stoll(text.substr(0, star));
  }
  dimension.symbol = star == std::string::npos ? text : text.substr(star + 1);
  good = good && !dimension.symbol.empty() && dimension.symbol.size() <= 32 && letter(dimension.symbol[0]);
  for (const char c : dimension.symbol) good = good && (letter(c) || digit(c));
  if (!good) field.refuse("a symbolic dimension is a name such as 'height', or a multiple of one such as '8*height'");
  return dimension;
}

TensorSpec read_tensor(const Field& field) {
  Object object(field);
  TensorSpec spec;
  spec.name = object.need("name").identifier();
  spec.dtype =
      dtype_of(object.need("dtype").one_of({"float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"}));
  for (const Field& item : object.need("shape").list(0, 8)) {
    if (item.value().is_string()) {
      spec.shape.push_back(symbolic(item, item.string()));
    } else {
      spec.shape.push_back({item.integer(1, std::int64_t{1} << 31), ""});
    }
  }
  object.done();
  return spec;
}

}  // namespace

GraphInfo read_graph(const Field& field) {
  Object object(field);
  GraphInfo graph;
  graph.file = object.need("file").file_name();
  if (const Field data = object.maybe("data"); !data.is_null()) graph.data = data.file_name();
  graph.opset = object.need("opset").integer(1, 1000);
  graph.precision = object.need("precision").one_of({"fp32", "fp16", "bf16", "fp8", "int8"});
  if (const Field storage = object.maybe("storage"); !storage.is_null())
    graph.storage = storage.one_of({"fp32", "fp16", "int8"});
  for (const Field& item : object.need("inputs").list(1, kMaxTensors)) graph.inputs.push_back(read_tensor(item));
  for (const Field& item : object.need("outputs").list(1, kMaxTensors)) graph.outputs.push_back(read_tensor(item));
  if (const Field field_accuracy = object.maybe("accuracy"); !field_accuracy.is_null()) {
    Object accuracy(field_accuracy);
    if (accuracy.need("max_abs_error").number() < 0) accuracy.refuse("max_abs_error must be at least 0");
    accuracy.need("cosine").number(-1.0, 1.000001);
    accuracy.need("reference").text();
    accuracy.done();
  }
  object.done();

  constexpr std::string_view ending = ".onnx";
  if (graph.file.size() < ending.size() || graph.file.substr(graph.file.size() - ending.size()) != ending)
    object.refuse("file " + quote(graph.file) + " must end in '.onnx'");
  if (graph.data && *graph.data != graph.file + ".data")
    object.refuse("data " + quote(*graph.data) + " must be " + quote(graph.file + ".data") +
                  ": a graph has its own data file");
  std::set<std::string> names;
  for (const auto* tensors : {&graph.inputs, &graph.outputs})
    for (const TensorSpec& spec : *tensors)
      if (!names.insert(spec.name).second) object.refuse("two inputs or outputs have the same name");
  return graph;
}

DType dtype_of(const std::string& name) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::i64, DType::i32, DType::u8})
    if (name == dtype_name(dtype)) return dtype;
  return DType::boolean;
}

std::size_t item_size(DType dtype) {
  switch (dtype) {
    case DType::i64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::f16:
    case DType::bf16:
      return 2;
    case DType::u8:
    case DType::boolean:
      return 1;
  }
  return 0;
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::f16:
      return "float16";
    case DType::bf16:
      return "bfloat16";
    case DType::i64:
      return "int64";
    case DType::i32:
      return "int32";
    case DType::u8:
      return "uint8";
    case DType::boolean:
      return "bool";
  }
  return "";
}

std::vector<std::int64_t> TensorSpec::resolve(const Dims& dims) const {
  std::vector<std::int64_t> sizes;
  for (const Dimension& dimension : shape) {
    if (dimension.symbol.empty()) {
      sizes.push_back(dimension.factor);
      continue;
    }
    const auto found = dims.find(dimension.symbol);
    if (found == dims.end())
      fail_run("the tensor " + name + " of this bundle has a dimension " + quote(dimension.symbol) +
               " that this version of tmd does not know. Export the bundle again.");
    sizes.push_back(dimension.factor * found->second);
  }
  return sizes;
}

}  // namespace tmd::internal
