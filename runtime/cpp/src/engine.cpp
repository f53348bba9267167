#include "engine.hpp"

#include "quote.hpp"
#ifdef TMD_WITH_OPENVINO
#include "openvino_engine.hpp"
#endif

namespace tmd::internal {

std::shared_ptr<Engine> open_engine(const EngineOptions& options) {
  if (options.device != "cpu")
    refuse_usage("there is no device " + quote(options.device) + " in this version of tmd: use cpu.");
  if (options.threads != TMD_DEFAULT && (options.threads < 1 || options.threads > 1024))
    refuse_usage("threads is " + std::to_string(options.threads) + ": give 1 to 1024, or TMD_DEFAULT.");
  if (options.engine != "auto" && options.engine != "openvino")
    refuse_usage("there is no engine " + quote(options.engine) + " in this library: use auto or openvino.");
#ifdef TMD_WITH_OPENVINO
  return open_openvino(options);
#else
  fail_engine("this library was built without an engine: build it with OpenVINO's headers (docs/embedding.md).");
#endif
}

}  // namespace tmd::internal
