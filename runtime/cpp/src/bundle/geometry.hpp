// What the graphs themselves say of patches and blocks, against what the manifest says.
//
// Nothing of a graph's interface depends on these numbers, and still a run does: rotary tables follow the grid of
// patches, and with the sides of a patch exchanged they would be wrong without any error. The rules are those of
// tmd_engines.bundle.geometry.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <string_view>

#include "bundle/manifest.hpp"

namespace tmd::internal {

// Of one graph: what it divides the frames, height and width of its latents by, and how many attentions it has.
struct GraphFacts {
  std::array<std::set<std::int64_t>, 3> divisors;
  std::int64_t attentions = 0;
};

bool is_denoiser(std::string_view graph);  // the graphs that facts are of

// Of an ONNX file that check_graph has accepted.
GraphFacts facts_of(std::string_view data, const GraphInfo& info);

// Throws Error(BUNDLE) if the patches or the blocks of the manifest, `where`, are not those of its graphs. A graph that
// divides no side says nothing of patches. Of blocks, which only the reported number of evaluations depends on, the two
// graphs that they are in must have the manifest's shares.
void check_geometry(const Manifest& manifest, const std::map<std::string, GraphFacts>& known, const std::string& where);

}  // namespace tmd::internal
