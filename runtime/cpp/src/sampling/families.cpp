// The list of all families. A new one is a file beside this one and stands here twice.
#include "sampling/family.hpp"

namespace tmd::internal {

// Each in the file of its name.
const RuntimeFamily& tmd_family();
const RuntimeFamily& wan_family();
const RuntimeFamily& anyflow_family();
const RuntimeFamily& tim_family();

namespace {

using MakeFamily = const RuntimeFamily& (*)();
constexpr MakeFamily kFamilies[] = {tmd_family, wan_family, anyflow_family, tim_family};

}  // namespace

const Family* find_family(const std::string& name) {
  for (const MakeFamily family : kFamilies)
    if (name == family().name()) return &family();
  return nullptr;
}

std::string family_names() {
  std::string names;
  for (const MakeFamily family : kFamilies) names += (names.empty() ? "" : ", ") + std::string(family().name());
  return names;
}

}  // namespace tmd::internal
