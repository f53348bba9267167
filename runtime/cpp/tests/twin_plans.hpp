// The questions of the twin that are about plans of TensorRT and TensorRT for RTX: all whose names begin with "plan_".
#pragma once

#include <nlohmann/json.hpp>

nlohmann::json answer_about_plans(const nlohmann::json& question);
