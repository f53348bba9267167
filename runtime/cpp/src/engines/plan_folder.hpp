// A folder of plans that `tmd-engine build --out` made; the twin of tmd_engines.tensorrt.folder.
//
// Plans are code. A folder is read only when the application names it, and its files must be what its manifest says,
// which protects from damage and not from somebody who can write there.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "engines/compute_capability.hpp"
#include "engines/plan_key.hpp"

namespace tmd::internal {

class PlanFolder {
 public:
  struct Entry {
    std::string file;
    std::uint64_t size = 0;
    std::string sha256;
    PlanKey key;
    std::map<std::string, std::int64_t> figures;  // the builder's, in bytes: "weights", "scratch", ...
  };

  // Reads the manifest; plans are read when they are wanted. Throws Error(ENGINE) if this is no such folder.
  explicit PlanFolder(std::string path);

  const std::vector<Entry>& entries() const { return entries_; }
  // Bytes of the device that the largest plan needs while it runs, as far as the builder has said.
  std::uint64_t scratch() const;

  // The plan for this key on this GPU, whole and unchanged. Throws Error(ENGINE): it says what there is instead.
  FoundPlan find(const PlanKey& wanted, Capability gpu) const;

 private:
  std::vector<std::string> differences_of(const Entry& entry, PlanKey wanted, Capability gpu) const;
  MappedFile read(const Entry& entry) const;

  std::string path_, made_by_;
  std::vector<Entry> entries_;
};

}  // namespace tmd::internal
