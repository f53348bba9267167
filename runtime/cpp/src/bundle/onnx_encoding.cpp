#include "bundle/onnx_encoding.hpp"

#include <array>
#include <cstdint>

#include "base/utf8.hpp"
#include "bundle/protobuf_wire.hpp"

namespace tmd::internal {
namespace {

enum FieldKind { kInt32, kInt64, kEnum, kFixed32, kFixed64, kBytes, kText, kMessage };
enum FieldCount { kOnce, kRepeated, kPacked };

struct FieldRule {
  int message;
  std::uint32_t number;
  FieldKind kind;
  int inner;  // message
  FieldCount count;
  int choice;            // of the fields of a message with the same choice only one may be there; 0: none
  std::uint64_t values;  // of an enum: bit k is set if k is one
};

#include "bundle/onnx_schema.inc"

// Protobuf reads so many messages inside one another, the outermost not counted.
constexpr int kMaxDepth = 100;
constexpr std::uint32_t kNumbers = 32;  // above every field number

using RuleTable = std::array<std::array<const FieldRule*, kNumbers>, kNoMessage>;

constexpr RuleTable rule_table() {
  RuleTable table{};
  for (const FieldRule& rule : kFieldRules) table[static_cast<std::size_t>(rule.message)][rule.number] = &rule;
  return table;
}

const FieldRule* rule_of(int message, std::uint32_t number) {
  static constexpr RuleTable table = rule_table();
  return number < kNumbers ? table[static_cast<std::size_t>(message)][number] : nullptr;
}

int wire_type(const FieldRule& rule) {
  if (rule.count == kPacked) return 2;
  switch (rule.kind) {
    case kInt32:
    case kInt64:
    case kEnum:
      return 0;
    case kFixed64:
      return 1;
    case kFixed32:
      return 5;
    default:
      return 2;
  }
}

bool is_number_of(const FieldRule& rule, std::uint64_t value) {
  if (rule.kind == kEnum) return value < 64 && (rule.values >> value & 1);
  // Negative ones are written with 64 bits.
  if (rule.kind == kInt32)
    return value == static_cast<std::uint64_t>(static_cast<std::int64_t>(static_cast<std::int32_t>(value)));
  return true;
}

bool is_packed(const FieldRule& rule, std::string_view bytes) {
  if (bytes.empty()) return false;  // would not be written
  if (rule.kind == kFixed32) return bytes.size() % 4 == 0;
  if (rule.kind == kFixed64) return bytes.size() % 8 == 0;
  WireReader reader(bytes);
  for (std::uint64_t value; reader.next_number(&value);)
    if (!is_number_of(rule, value)) return false;
  return reader.good();
}

bool is_canonical(std::string_view data, int message, int depth) {
  if (depth > kMaxDepth) return false;
  std::uint32_t last = 0, chosen = 0;
  WireReader reader(data);
  for (WireField field; reader.next(&field);) {
    const FieldRule* rule = rule_of(message, field.number);
    if (!rule || field.wire_type != wire_type(*rule)) return false;
    if (field.number < last || (field.number == last && rule->count != kRepeated)) return false;
    last = field.number;
    if (rule->choice) {
      if (chosen >> rule->choice & 1) return false;
      chosen |= 1u << rule->choice;
    }
    if (rule->count == kPacked) {
      if (!is_packed(*rule, field.bytes)) return false;
    } else if (rule->kind == kMessage) {
      if (!is_canonical(field.bytes, rule->inner, depth + 1)) return false;
    } else if (rule->kind == kText) {
      if (!is_utf8(field.bytes)) return false;
    } else if (field.wire_type == 0 && !is_number_of(*rule, field.varint)) {
      return false;
    }
  }
  return reader.good();
}

void visit_tensors(std::string_view data, int message, const std::function<void(std::string_view)>& visit) {
  if (message == TensorProto) return visit(data);
  WireReader reader(data);
  for (WireField field; reader.next(&field);) {
    const FieldRule* rule = rule_of(message, field.number);
    if (rule && rule->kind == kMessage) visit_tensors(field.bytes, rule->inner, visit);
  }
}

}  // namespace

bool is_canonical_onnx(std::string_view data) { return is_canonical(data, ModelProto, 0); }

void for_each_tensor(std::string_view model, const std::function<void(std::string_view)>& visit) {
  visit_tensors(model, ModelProto, visit);
}

}  // namespace tmd::internal
