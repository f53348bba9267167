// What a graph takes and gives, held against the table that Python's families give (signatures.inc); the twin of
// tmd_engines.bundle.families.signature.
#pragma once

#include <string>

#include "bundle/manifest.hpp"

namespace tmd::internal {

// Why a graph of the manifest is not what its family says: an unknown graph, a tensor too many or too few, another type
// or shape than the manifest's sizes give, or two graphs that do not pass the same tensors. "" if all is well.
std::string interface_problem(const Manifest& manifest);

}  // namespace tmd::internal
