// Keys of plans, and which cards a plan is for: what needs no header of NVIDIA's. Part of tmd_unit_test.
#include <doctest/doctest.h>

#include "engines/compute_capability.hpp"
#include "engines/plan_key.hpp"

using namespace tmd::internal;

namespace {

const PlanKey kWanted = {{"title", "tiny update"},
                         {"engine", "tensorrt-rtx 1.7.1.116"},
                         {"shapes", "t 1, x 1x8"},
                         {"flags", "workspace None, weight streaming False, no TF32"}};

PlanKey changed(const std::string& field, const std::string& value) {
  PlanKey key = kWanted;
  key["lowered"] = "00";
  key[field] = value;
  return key;
}

}  // namespace

TEST_CASE("a key agrees when every field that can be known does") {
  CHECK(differences(changed("lowered", "ff"), kWanted).empty());
  CHECK(differences(changed("flags", "workspace 5, weight streaming False, no TF32"), kWanted).empty());
  CHECK(differences(changed("engine", "tensorrt-rtx 1.7.1"), kWanted).empty());
  CHECK(differences(changed("shapes", "t 1, x 1x4..1x8..1x16"), kWanted).empty());
  CHECK(differences(changed("engine", "tensorrt-rtx 1.7.10.116"), kWanted) ==
        std::vector<std::string>{"engine: tensorrt-rtx 1.7.10.116 there, tensorrt-rtx 1.7.1.116 here"});
  CHECK(differences(changed("shapes", "t 1, x 1x9..1x9..1x16"), kWanted).size() == 1);
  CHECK(differences(changed("more", "x"), kWanted) == std::vector<std::string>{"more: x there, nothing here"});
  CHECK(differences(kWanted, kWanted) == std::vector<std::string>{"lowered: nothing there, any sha256 here"});
}

TEST_CASE("sizes that are no sizes are taken by nothing") {
  for (const char* shapes : {"", "x", "t 1, x 1x", "t 1, x 1x-8", "t 1, x 1x99999999999999999999", "t 1, x 1x8..1x8"})
    CHECK_FALSE(is_for_graph_and_sizes(changed("shapes", shapes), kWanted));
  CHECK(is_for_graph_and_sizes(changed("shapes", "t 1, x 1x8"), kWanted));
  CHECK_FALSE(is_for_graph_and_sizes(changed("title", "tiny backbone"), kWanted));
}

TEST_CASE("a plan is for the cards that it says, and open to later ones from 12.0 on") {
  CHECK(plan_runs_on("rtx", {8, 6}));
  CHECK(plan_runs_on("8.9,12.0", {12, 1}));
  CHECK_FALSE(plan_runs_on("rtx", {9, 0}));
  CHECK_FALSE(plan_runs_on("8.6", {8, 9}));
  CHECK(plan_runs_on("9.0", {9, 0}));  // TensorRT's, of the one card that it was built on
  CHECK(refusal_on("fp8", {8, 9}).empty());
  CHECK(refusal_on("fp8", {8, 6}).find("from compute capability 8.9 on") != std::string::npos);
}
