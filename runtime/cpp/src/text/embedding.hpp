// Token ids -> rows of a table that a bundle keeps outside its graphs.
#pragma once

#include <cstdint>
#include <vector>

#include "bundle/reader.hpp"

namespace tmd::internal {

// Rows [ids, dim] as float32 from a table of the bundle, read row by row and not mapped: a row is a few kilobytes of a
// file of gigabytes. Throws Error(RUN) for an id without a row or a file that was changed.
std::vector<float> read_rows(const Bundle& bundle, const EmbeddingTable& table, const std::vector<std::int64_t>& ids);

}  // namespace tmd::internal
