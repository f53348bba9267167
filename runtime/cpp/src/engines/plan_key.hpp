// What a plan of TensorRT or TensorRT for RTX is for, as a flat list of fields: Python's keys (tmd_engines.tensorrt).
//
// This library knows every field but two: the sha256 of the lowered graph, because it lowers nothing for TensorRT, and
// the workspace that a build was allowed. Any value of these will do: the one follows from the others and from the
// version of tmd, the other limits how a plan was found and not what it computes.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "bundle/reader.hpp"
#include "engines/buffer.hpp"
#include "engines/mapped_file.hpp"

namespace tmd::internal {

using PlanKey = std::map<std::string, std::string>;
using Shapes = std::map<std::string, Shape>;  // input -> its shape

// A plan whose file is what it should be, and its whole key.
struct FoundPlan {
  PlanKey key;
  MappedFile content;
};

// What a plan is made for, beside the graph and its sizes.
struct PlanTarget {
  std::string engine;      // "tensorrt", "tensorrt-rtx"
  std::string version;     // of its library, with the build number: "10.16.1.11"
  std::string device;      // "NVIDIA H200"; "any"
  std::string capability;  // "9.0"; "rtx"
  bool weight_streaming = false;
};

// The key of the plan of a graph for inputs of these shapes, without the field "lowered".
PlanKey plan_key(const Bundle& bundle, const GraphInfo& info, const Shapes& inputs, const PlanTarget& target);

// The graph's name in its bundle: "backbone".
std::string graph_name(const Bundle& bundle, const GraphInfo& info);

// Bytes of a graph's files.
std::uint64_t stored_bytes(const Manifest& manifest, const GraphInfo& info);

// The same of all graphs that are on the GPU together with this one, itself included, in TMD_MEMORY_LOW.
std::uint64_t stored_bytes_together(const Manifest& manifest, const std::string& graph);

// One text for each field in which the key of a plan is not the wanted one: "engine: tensorrt-rtx 1.6 there,
// tensorrt-rtx 1.7.1.116 here". The sizes may be a range that has the wanted ones in it.
std::vector<std::string> differences(const PlanKey& there, const PlanKey& wanted);

std::string difference(const std::string& field, const std::string& there, const std::string& here);

// Whether the plan of `there` is of the same graph as the wanted one, and takes its sizes.
bool is_for_graph_and_sizes(const PlanKey& there, const PlanKey& wanted);

std::string value_of(const PlanKey& key, const std::string& field);  // "nothing" if it has no such field

// "x 1x16x21x60x104, y 1": shapes as keys have them.
std::string to_text(const Shapes& shapes);

}  // namespace tmd::internal
