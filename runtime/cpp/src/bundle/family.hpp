// What a family of models says of its bundles; the twin of tmd_engines.bundle.families.family. What it says of a run is
// in sampling/family.hpp. Shared code asks this object and never compares a family's name.
//
// Two graph names are slots that a family fills: `backbone` is what is computed once for several calls of `flow_head`.
// In a TMD student that is once per outer step, and `flow_head` is an inner step; in a Wan transformer without inner
// flow `flow_head` is the rest of the same step; in a Transition Model `backbone` is what depends on the prompt alone,
// and `flow_head` is one whole step.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "bundle/json_fields.hpp"
#include "bundle/sections.hpp"

namespace tmd::internal {

struct Manifest;

class Family {
 public:
  virtual ~Family() = default;
  virtual const char* name() const = 0;  // `model.family` of a manifest
  // One frame, whose autoencoder works in tiles.
  virtual bool makes_stills() const { return false; }
  // Prompts may be unpadded, with stored features of the empty one.
  virtual bool keeps_prompt_length() const { return false; }

  // `model` with the family's own fields read; those that all share are read afterwards, and then it is checked.
  virtual std::shared_ptr<ModelInfo> read_model(Object& object) const;
  virtual void check_model(const ModelInfo& model, const Object& object) const;
  // All of `sampler`.
  virtual std::shared_ptr<const SamplerInfo> read_sampler(Object& object) const = 0;
  // These throw Error(BUNDLE).
  // What contradicts itself among graphs and sections, beside interfaces; empty if nothing does.
  virtual std::string problem(const Manifest&) const { return ""; }

  // How many numbered classes the model draws in place of a prompt; 0: it takes a prompt.
  virtual std::int64_t classes(const ModelInfo&) const { return 0; }
  // One among the latents, and one to the prompt of a model that takes it.
  virtual std::int64_t attentions_per_block(const ModelInfo& model) const { return classes(model) == 0 ? 2 : 1; }
  // Whether its graphs can hold a picture as the first latent frame of a video.
  virtual bool holds_first_frame(const ModelInfo&) const { return false; }
};

// The family of this name, or nullptr. All of them are listed in sampling/families.cpp.
const Family* find_family(const std::string& name);
// "tmd, wan, anyflow, tim".
std::string family_names();

}  // namespace tmd::internal
