// Compiled graphs of this user, in the cache that Python fills (tmd_engines.device.plan_cache): the same folder, the
// same keys. Plans are only read here; kernels that a GPU's library compiled for them are kept too.
#pragma once

#include <string>
#include <string_view>

#include "engines/plan_key.hpp"

namespace tmd::internal {

// The file of the entry with this whole key, as Python names it.
std::string plan_file_name(const PlanKey& key);

// Where the entries are: below `cache`, which is Python's TMD_CACHE, or below ~/.cache/tmd if that is empty.
std::string plan_cache_folder(const std::string& cache);

// The plan in `folder` for this key, whole and unchanged: one for just these sizes, or for a range that has them in it;
// of several the newest. Throws Error(ENGINE) if there is none: it says in what the nearest one differs, and how to
// build it.
FoundPlan find_plan(const std::string& folder, const PlanKey& key);

// The content of the entry with this whole key; without pages if there is none, or the folder is not this user's alone.
MappedFile load_entry(const std::string& folder, const PlanKey& key);

// Keeps `content` under this whole key: complete under its name or not at all. Whatever the disk refuses is not kept.
void store_entry(const std::string& folder, const PlanKey& key, std::string_view content);

// The line that an entry begins with, without its end.
std::string entry_line(const PlanKey& key, std::string_view content);

// Why a folder cannot be trusted with code that this process runs; "": it can, or is not there.
std::string distrust(const std::string& folder);

}  // namespace tmd::internal
