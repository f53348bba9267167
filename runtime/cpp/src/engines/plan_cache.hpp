// TensorRT's plans in the cache that Python fills (tmd_engines.device.plan_cache): the same folder, the same keys, read
// only.
//
// A key is a flat list of fields. This library knows all of them but two: the sha256 of the lowered graph, because it
// lowers nothing for TensorRT, and the workspace that a build was allowed. Any value of these will do: the one follows
// from the others and from the version of tmd, the other limits how a plan was found and not what it computes.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "bundle/reader.hpp"
#include "engines/buffer.hpp"

namespace tmd::internal {

using PlanKey = std::map<std::string, std::string>;

// What a plan is made for, beside the graph and its sizes.
struct PlanTarget {
  std::string version;     // of TensorRT, with its build number: "10.16.1.11"
  std::string device;      // "NVIDIA H200"
  std::string capability;  // "9.0"
  bool weight_streaming = false;
};

// The key of the plan of a graph for inputs of these shapes, without the field "lowered".
PlanKey plan_key(const Bundle& bundle, const GraphInfo& info, const std::map<std::string, Shape>& inputs,
                 const PlanTarget& target);

// The file of the entry with this whole key, as Python names it.
std::string plan_file_name(const PlanKey& key);

// Where the plans are: below `cache`, which is Python's TMD_CACHE, or below ~/.cache/tmd if that is empty.
std::string plan_folder(const std::string& cache);

// The newest plan in `folder` for this key, whole and unchanged. Throws Error(ENGINE) if there is none: it says which
// fields of the nearest one differ, and how to build it.
std::string find_plan(const std::string& folder, const PlanKey& key);

}  // namespace tmd::internal
