// What a family of models says of a run: its settings, its loop, its numbers; the twin of tmd_runtime.sampling.family.
// One class per family, in the file of its name; all of them are listed in families.cpp. Shared code asks this object
// and never compares a family's name.
#pragma once

#include "bundle/family.hpp"
#include "bundle/manifest.hpp"
#include "sampling/loop.hpp"
#include "sampling/settings.hpp"

namespace tmd::internal {

class RuntimeFamily : public Family {
 public:
  // Steps, times, guidance and what else only this family knows, completed from the manifest. Throws
  // Error(USAGE) that says what the bundle allows.
  virtual void resolve(const Manifest& manifest, const tmd_run_options& options, Settings& settings) const = 0;

  // The loop for latents of the settings' shape and prompts of `tokens` tokens (of a model of classes, 1).
  virtual std::unique_ptr<Loop> make_loop(const Manifest& manifest, Graphs graphs, const Settings& settings,
                                          std::int64_t tokens) const = 0;

  // Evaluations of the whole model that a run is worth, M (1 + (N - 1) H/L) per pass  (TMD Eq. 16).
  virtual double nfe(const ModelInfo& model, const Settings& settings) const {
    const double inner = static_cast<double>(settings.inner_steps - 1) * static_cast<double>(model.head_blocks);
    return static_cast<double>(settings.steps * settings.passes()) *
           (1.0 + inner / static_cast<double>(model.num_layers));
  }
  // How many steps of the backbone and the flow head such a loop reports.
  virtual std::int64_t reported_steps(const Settings& settings) const {
    return settings.steps * (1 + settings.inner_steps) * settings.passes();
  }
  // Pictures that go through the denoiser at once.
  virtual std::int64_t rows(const Settings&) const { return 1; }
};

// What knows how to run the bundle.
inline const RuntimeFamily& family_of(const Manifest& manifest) {
  return static_cast<const RuntimeFamily&>(*manifest.family);  // the list has no others
}

}  // namespace tmd::internal
