// A bundle: the folder that export writes and every engine reads, checked whole before anything of it is used.
#pragma once

#include <string>

#include "bundle/manifest.hpp"

namespace tmd::internal {

struct Bundle {
  std::string folder;
  Manifest manifest;

  // Checks everything in `path`, in the order of docs/bundle.md, reading every byte once. Throws Error(BUNDLE).
  static Bundle open(const std::string& path);

  // What the manifest says of a graph; `purpose` completes "so it cannot ...". Throws Error(RUN) if there is none.
  const GraphInfo& graph(const std::string& name, const char* purpose) const;

  // The bytes of a graph's file, checked once more, right before an engine gets them: the sha256, and that it holds
  // nothing which the check of graphs does not know. Throws Error(BUNDLE, ENGINE).
  std::string read_graph(const GraphInfo& info) const;
  std::string graph_path(const GraphInfo& info) const { return folder + "/" + info.file; }
};

}  // namespace tmd::internal
