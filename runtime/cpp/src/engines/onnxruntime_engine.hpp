// ONNX Runtime on the CPU, behind the interface of engines; see tmd_engines/onnxruntime/engine.py for the reasons.
#pragma once

#include "engines/engine.hpp"

namespace tmd::internal {

std::shared_ptr<Engine> open_onnxruntime(const EngineOptions& options);

}  // namespace tmd::internal
