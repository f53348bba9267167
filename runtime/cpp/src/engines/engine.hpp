// The seam between the loop and what computes: a library that loads graphs, and steps bound to buffers.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "base/error.hpp"
#include "bundle/holding.hpp"
#include "bundle/reader.hpp"
#include "engines/buffer.hpp"

namespace tmd::internal {

using Buffers = std::map<std::string, Buffer>;  // tensor name -> memory

// A run of one graph on bound buffers; by one thread at a time. Returns when the outputs are written.
class Step {
 public:
  virtual ~Step() = default;
  virtual void run() = 0;  // throws Error(ENGINE)
  // Of what was recorded: false, and nothing ran, if memory that it was recorded with is gone.
  virtual bool run_if_valid() { return run(), true; }
};

// A graph with its weights, ready to run. May be shared by threads: `bind` locks what it must.
class LoadedGraph {
 public:
  virtual ~LoadedGraph() = default;
  // Ties the graph to buffers, all inputs and all outputs by name; the step keeps them alive. Throws Error(ENGINE), and
  // Error(RUN) for a buffer too many or too few, or of another type or rank than the graph has.
  std::unique_ptr<Step> bind(const Buffers& inputs, const Buffers& outputs);
  virtual const GraphInfo& info() const = 0;
  // Whether the engine can keep work as one launch.
  virtual bool records() const { return false; }
  // `work`, which runs steps of this engine and copies its buffers and nothing else, as one launch; nullptr: it cannot
  // be recorded. All its graphs have run before; their steps and buffers must outlive what is returned.
  // Throws Error(ENGINE).
  virtual std::unique_ptr<Step> record(const std::function<void()>&) { return nullptr; }

  // An uninitialised buffer for the input or output `name`.
  Buffer empty(const std::string& name, const Dims& dims) const {
    for (const auto* tensors : {&info().inputs, &info().outputs})
      for (const TensorSpec& spec : *tensors)
        if (spec.name == name) return allocate(spec.dtype, spec.resolve(dims));
    throw Error(TMD_ERROR_RUN, "the graph " + info().file + " of this bundle has no tensor " + name +
                                   ". Export the bundle again with this version of tmd.");
  }

 private:
  virtual std::unique_ptr<Step> tie(const Buffers& inputs, const Buffers& outputs) = 0;
  virtual Buffer allocate(DType dtype, Shape shape) const { return Buffer(dtype, std::move(shape)); }
};

struct EngineOptions {
  std::string engine = "auto", device = "auto", library;
  std::string plan_cache;     // "": ~/.cache/tmd
  std::string plans;          // folder of plans made ahead of time; "": none
  std::int32_t threads = -1;  // -1: the engine decides
};

// An engine's library, loaded once per opened bundle; shared by threads.
class Engine {
 public:
  virtual ~Engine() = default;
  virtual const char* name() const = 0;
  virtual std::string version() const = 0;
  virtual bool on_device() const { return false; }  // with memory of its own
  virtual Holding holding() const { return kOnnxRuntimeHolding; }  // what its graphs take of a CPU's memory
  // What a person should know of how graphs are run, since it was last asked: whole lines, or "".
  virtual std::string take_notes() { return ""; }
  virtual std::shared_ptr<LoadedGraph> load(const Bundle& bundle, const GraphInfo& info) = 0;  // throws Error(ENGINE)
};

// Throws Error(USAGE) unless that many threads can be wished for.
void check_threads(std::int32_t threads);

// Finds and opens the engine's library. Throws Error(USAGE) for an unknown name, Error(ENGINE) if it is not to be had.
std::shared_ptr<Engine> open_engine(const EngineOptions& options);

// Throws Error(ENGINE) unless there are buffers for the inputs and outputs of such a graph.
void check_graph_types(const GraphInfo& info);

}  // namespace tmd::internal
