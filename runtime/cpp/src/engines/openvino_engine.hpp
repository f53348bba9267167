// OpenVINO on the CPU. The twin of tmd_engines/openvino/engine.py: the same properties, hence the same numbers.
#pragma once

#include "engines/engine.hpp"

namespace tmd::internal {

std::shared_ptr<Engine> open_openvino(const EngineOptions& options);

}  // namespace tmd::internal
