// NVIDIA GPUs through TensorRT, or TensorRT for RTX, with plans that tmd-engine build made.
#pragma once

#include "engines/engine.hpp"

namespace tmd::internal {

namespace tensorrt {
std::shared_ptr<Engine> open(const EngineOptions& options);
}
namespace tensorrt_rtx {
std::shared_ptr<Engine> open(const EngineOptions& options);
}

}  // namespace tmd::internal
