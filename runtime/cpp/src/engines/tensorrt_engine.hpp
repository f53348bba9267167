// TensorRT on an NVIDIA GPU. Runs the plans that tmd-engine build made; builds none. Never run on a GPU.
#pragma once

#include "engines/engine.hpp"

namespace tmd::internal {

std::shared_ptr<Engine> open_tensorrt(const EngineOptions& options);

}  // namespace tmd::internal
