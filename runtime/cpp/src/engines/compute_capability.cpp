#include "engines/compute_capability.hpp"

#include <algorithm>
#include <iterator>
#include <optional>
#include <vector>

#include "base/ascii.hpp"

namespace tmd::internal {
namespace {

const std::vector<Capability> kByDefault = {{8, 0}, {8, 6}, {8, 9}, {12, 0}};  // and later ones
const std::vector<Capability> kKnown = {{7, 5}, {8, 0}, {8, 6}, {8, 9}, {12, 0}, {12, 1}};
struct Since {
  const char* precision;
  Capability capability;
  const char *able, *instead;  // what to build for, what else to export
};
constexpr Since kSince[] = {{"bf16", {8, 0}, "8.0,8.6,8.9,12.0", "fp16"},
                            {"fp8", {8, 9}, "8.9,12.0", "fp16 or bf16"},
                            {"nvfp4", {12, 0}, "12.0", "fp8 (from 8.9 on) or bf16"}};
constexpr Capability kTuring = {7, 5}, kOpenEnded = {12, 0};

std::string stripped(const std::string& text) {
  const char* space = " \t\n\r\f\v";
  const std::size_t first = text.find_first_not_of(space);
  return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(space) - first + 1);
}

bool is_every_card(const std::string& text) {
  std::string lower = stripped(text);
  for (char& c : lower) c = ascii_lower(c);
  return lower == "rtx";
}

// The capabilities of a list; absent if TensorRT for RTX does not build for one of them.
std::optional<std::vector<Capability>> parse(const std::string& text) {
  if (is_every_card(text)) return kByDefault;
  std::vector<Capability> targets;
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t comma = std::min(text.find(',', at), text.size());
    const std::string part = stripped(text.substr(at, comma - at));
    const auto known = std::find_if(kKnown.begin(), kKnown.end(), [&](Capability c) { return to_text(c) == part; });
    if (known == kKnown.end()) return std::nullopt;
    targets.push_back(*known);
    at = comma + 1;
  }
  return targets;
}

}  // namespace

std::string to_text(Capability capability) {
  return std::to_string(capability.first) + "." + std::to_string(capability.second);
}

bool plan_runs_on(const std::string& stated, Capability capability) {
  const auto targets = parse(stated);
  if (!targets) return stated == to_text(capability);
  return std::any_of(targets->begin(), targets->end(), [&](Capability target) {
    return target == capability || (capability >= target && target >= kOpenEnded);
  });
}

std::string refusal_on(const std::string& precision, Capability capability) {
  const auto known =
      std::find_if(std::begin(kSince), std::end(kSince), [&](const Since& each) { return precision == each.precision; });
  if (capability == kTuring)
    return std::string("compute capability 7.5 (Turing) cannot be built for, because ") +
           (known != std::end(kSince)
                ? "it has no bfloat16 and no fp8: a bundle for it would have to be in fp16"
                : "it has no products and 3-D convolutions in float32, and graphs exported in fp16 keep a few of "
                  "them") +
           ". Use --engine onnxruntime on such a card, or name newer ones";
  if (known == std::end(kSince) || capability >= known->capability) return "";
  return "it is " + precision + ", which GPUs compute from compute capability " + to_text(known->capability) +
         " on: build with --for " + known->able + ", or export one with --precision " + known->instead;
}

}  // namespace tmd::internal
