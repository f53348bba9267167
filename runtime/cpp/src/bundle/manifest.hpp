// The manifest of a bundle, schema version 2, as types. The rules are those of docs/bundle.md and of Python's
// tmd_engines.bundle.manifest: what one refuses, the other refuses, and tests compare their verdicts.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "bundle/family.hpp"
#include "bundle/sections.hpp"

namespace tmd::internal {

inline constexpr const char* kManifestName = "manifest.json";
inline constexpr std::size_t kMaxManifestBytes = std::size_t{1} << 20;
inline constexpr std::int64_t kSchemaVersion = 2;

struct Manifest {
  const Family* family = nullptr;              // what knows how to run such a model; never null once parsed
  std::shared_ptr<const ModelInfo> model;      // of the family's own type
  std::shared_ptr<const SamplerInfo> sampler;  // the same
  LatentInfo latents;
  VideoInfo video;
  TextInfo text;
  std::optional<DrawsInfo> draws;
  std::map<std::string, GraphInfo> graphs;
  std::map<std::string, FileInfo> files;
  std::string source;  // provenance.source

  std::int64_t classes() const { return family->classes(*model); }
  bool holds_first_frame() const { return family->holds_first_frame(*model); }
};

// Checked manifest from the bytes of manifest.json; `where` names the file in messages. Throws Error(BUNDLE) only.
Manifest parse_manifest(std::string_view data, const std::string& where);

}  // namespace tmd::internal
