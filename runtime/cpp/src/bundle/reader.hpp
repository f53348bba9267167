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

  // The bytes of a graph's file, right before an engine gets them: by their sha256 those that `open` has checked.
  // Throws Error(BUNDLE).
  std::string read_graph(const GraphInfo& info) const;
  std::string graph_path(const GraphInfo& info) const { return folder + "/" + info.file; }
  // Where the data file of a graph really is, links resolved: engines refuse weights elsewhere than they are told.
  // Empty: it has none.
  std::string data_path(const GraphInfo& info) const;
};

}  // namespace tmd::internal
