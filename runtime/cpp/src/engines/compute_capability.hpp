// Which GPUs a plan of TensorRT for RTX is for, and what each of them cannot compute; the twin of
// tmd_engines.tensorrt.targets.
#pragma once

#include <string>
#include <utility>

namespace tmd::internal {

using Capability = std::pair<int, int>;  // {8, 9}

std::string to_text(Capability capability);  // "8.9"

// Whether a plan whose key states these compute capabilities ("rtx", "8.9,12.0") is for this GPU.
bool plan_runs_on(const std::string& stated, Capability capability);

// Why a graph of this precision does not run on this GPU with TensorRT for RTX, and what to do; "": it does.
std::string refusal_on(const std::string& precision, Capability capability);

}  // namespace tmd::internal
