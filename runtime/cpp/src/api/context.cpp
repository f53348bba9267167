// The C functions about contexts, bundles and what they are; runs are in api_run.cpp.
#include "api/context.hpp"

#include <sys/resource.h>

#include <cstdio>

#include "base/quote.hpp"
#include "engines/cpu.hpp"

namespace tmd::internal {
namespace {

std::uint64_t bytes_of(const Manifest& manifest) {
  std::uint64_t bytes = 0;
  for (const auto& [name, file] : manifest.files) bytes += file.size;
  return bytes;
}

#define TMD_TEXT_OF(x) #x
#define TMD_TEXT(x) TMD_TEXT_OF(x)
#define TMD_VERSION_TEXT TMD_TEXT(TMD_VERSION_MAJOR) "." TMD_TEXT(TMD_VERSION_MINOR) "." TMD_TEXT(TMD_VERSION_PATCH)

// Set by CMake: "openvino, onnxruntime".
#ifndef TMD_ENGINES
#define TMD_ENGINES "none"
#endif

#ifndef TMD_BUILD_TYPE
#define TMD_BUILD_TYPE "unknown"
#endif

std::vector<std::int32_t> narrow(const std::vector<std::int64_t>& values) { return {values.begin(), values.end()}; }

tmd_description describe(tmd_context* context) {
  Pipeline& pipeline = opened(context);
  const Manifest& manifest = pipeline.manifest();
  const auto narrow_int = [](std::int64_t value) { return static_cast<std::int32_t>(value); };
  const auto has = [&](const char* name) { return manifest.graphs.count(name) ? 1 : 0; };
  tmd_description out;
  tmd_description_init(&out);
  out.name = manifest.model->name.c_str();
  out.family = manifest.family->name();
  out.architecture = manifest.model->architecture.c_str();
  out.rule = manifest.sampler->rule.c_str();
  out.source = manifest.source.c_str();
  out.engine = pipeline.shared()->engine->name();
  out.engine_version = context->engine_version.c_str();
  out.steps = narrow_int(manifest.sampler->steps);
  out.inner_steps = narrow_int(manifest.sampler->inner_steps);
  if (!manifest.sampler->allowed_steps.empty()) {
    out.allowed_steps = context->allowed_steps.data();
    out.allowed_steps_count = narrow_int(static_cast<std::int64_t>(context->allowed_steps.size()));
  }
  out.allowed_inner_steps = context->allowed_inner_steps.data();
  out.allowed_inner_steps_count = narrow_int(static_cast<std::int64_t>(context->allowed_inner_steps.size()));
  out.frames = narrow_int(manifest.video.frames);
  out.width = narrow_int(manifest.video.width);
  out.height = narrow_int(manifest.video.height);
  out.fps = narrow_int(manifest.video.fps);
  out.channels = narrow_int(manifest.latents.channels);
  out.temporal_stride = narrow_int(manifest.latents.temporal_stride);
  out.spatial_stride = narrow_int(manifest.latents.spatial_stride);
  out.width_multiple = narrow_int(manifest.latents.spatial_stride * manifest.model->patch_size[2]);
  out.height_multiple = narrow_int(manifest.latents.spatial_stride * manifest.model->patch_size[1]);
  out.text_tokens = narrow_int(manifest.text.max_length);
  out.text_dim = narrow_int(manifest.text.dim);
  out.can_encode = has("text_encoder") && manifest.text.tokenizer ? 1 : 0;
  out.can_denoise = has("backbone") && has("flow_head") && has("update");
  out.can_decode = has("decoder_first");
  out.can_encode_image = has("encoder");
  out.classes = narrow_int(manifest.classes());
  out.first_frame = manifest.holds_first_frame() ? 1 : 0;
  return out;
}

void fill_description_places(tmd_context* context) {
  const Manifest& manifest = context->pipeline->manifest();
  context->engine_version = context->pipeline->shared()->engine->version();
  context->allowed_steps = narrow(manifest.sampler->allowed_steps);
  context->allowed_inner_steps = narrow(manifest.sampler->allowed_inner_steps);
}

}  // namespace

void add_address_space(tmd_context* context) noexcept {
  rlimit limit;
  if (::getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return;
  char text[256];
  const int length = std::snprintf(
      text, sizeof text,
      " The address space of this process is limited to %llu MB (ulimit -v), which may be the reason: raise that limit, "
      "or limit the memory itself (a container's limit).",
      static_cast<unsigned long long>(limit.rlim_cur / 1000000));
  const std::size_t room = sizeof context->error - static_cast<std::size_t>(length) - 1;
  std::strcpy(context->error + std::min(std::strlen(context->error), room), text);
}

}  // namespace tmd::internal

using namespace tmd::internal;

const char* tmd_version(void) { return TMD_VERSION_TEXT; }

const char* tmd_build_info(void) {
  return "tmd " TMD_VERSION_TEXT ", " TMD_BUILD_TYPE ", compiler " __VERSION__ ", engines: " TMD_ENGINES;
}

const char* tmd_status_name(int status) {
  switch (status) {
    case TMD_OK:
      return "TMD_OK";
    case TMD_ERROR_USAGE:
      return "TMD_ERROR_USAGE";
    case TMD_ERROR_BUNDLE:
      return "TMD_ERROR_BUNDLE";
    case TMD_ERROR_ENGINE:
      return "TMD_ERROR_ENGINE";
    case TMD_ERROR_RUN:
      return "TMD_ERROR_RUN";
    case TMD_ERROR_MEMORY:
      return "TMD_ERROR_MEMORY";
    case TMD_ERROR_BUSY:
      return "TMD_ERROR_BUSY";
    case TMD_ERROR_INTERNAL:
      return "TMD_ERROR_INTERNAL";
    case TMD_CANCELLED:
      return "TMD_CANCELLED";
  }
  return "unknown status";
}

const char* tmd_stage_name(int stage) {
  switch (stage) {
    case TMD_STAGE_LOAD:
      return "load";
    case TMD_STAGE_TEXT:
      return "text";
    case TMD_STAGE_NOISE:
      return "noise";
    case TMD_STAGE_BACKBONE:
      return "backbone";
    case TMD_STAGE_FLOW_HEAD:
      return "flow_head";
    case TMD_STAGE_DECODE:
      return "decode";
    case TMD_STAGE_ENCODE:
      return "encode";
  }
  return "unknown stage";
}

tmd_status tmd_create(tmd_context** context) {
  if (!context) return TMD_ERROR_USAGE;
  tmd_context* made = new (std::nothrow) tmd_context;
  if (!made) return TMD_ERROR_MEMORY;
  *context = made;
  return TMD_OK;
}

void tmd_free(tmd_context* context) { delete context; }

const char* tmd_error(const tmd_context* context) { return context ? context->error : "the context is NULL"; }

const char* tmd_warnings(const tmd_context* context) { return context ? context->warnings.c_str() : ""; }

void tmd_cancel(tmd_context* context) {
  if (context) context->stopping.ask();
}

tmd_status tmd_set_log(tmd_context* context, tmd_log_fn log, void* user, tmd_log_level level) {
  return guarded(context, [&] { context->log = {log, user, level}; });
}

void tmd_open_options_init(tmd_open_options* options) {
  if (!options) return;
  *options = {};
  options->struct_size = sizeof *options;
  options->threads = TMD_DEFAULT;
  options->memory = TMD_MEMORY_AUTO;
}

void tmd_description_init(tmd_description* description) {
  if (!description) return;
  *description = {};
  description->struct_size = sizeof *description;
}

tmd_status tmd_open(tmd_context* context, const char* path, const tmd_open_options* options) {
  return stoppable(context, [&] {
    if (!path) refuse_usage("the path of the bundle is NULL: name its folder.");
    const tmd_open_options wanted = read_options(options, tmd_open_options_init, "tmd_open_options_init");
    if (wanted.memory < TMD_MEMORY_ALL || wanted.memory > TMD_MEMORY_AUTO)
      refuse_usage("there is no such memory mode: use TMD_MEMORY_ALL, TMD_MEMORY_LOW or TMD_MEMORY_AUTO.");
    EngineOptions engine;
    if (wanted.engine) engine.engine = wanted.engine;
    if (wanted.device) engine.device = wanted.device;
    if (wanted.engine_library) engine.library = wanted.engine_library;
    if (wanted.plan_cache) engine.plan_cache = wanted.plan_cache;
    if (wanted.plans) engine.plans = wanted.plans;
    engine.threads = wanted.threads;

    auto shared = std::make_shared<Shared>();
    shared->bundle = Bundle::open(path);
    check_threads(engine.threads);
    const Threads threads = resolve_threads(bytes_of(shared->bundle.manifest), engine.threads);
    engine.threads = threads.count;
    shared->note = threads.note;
    shared->engine = open_engine(engine);
    shared->memory = static_cast<tmd_memory>(wanted.memory);
    const std::string engine_name = shared->engine->name();
    context->pipeline = std::make_unique<Pipeline>(std::move(shared), &context->log);
    fill_description_places(context);
    context->warnings.clear();
    context->log(TMD_LOG_INFO, "opened " + quote(path, 300) + " on " + engine_name + " " + context->engine_version);
  });
}

tmd_status tmd_clone(tmd_context* context, tmd_context** clone) {
  return guarded(context, [&] {
    if (!clone) refuse_usage("the place for the clone is NULL.");
    Pipeline& pipeline = opened(context);
    auto made = std::make_unique<tmd_context>();
    made->log = context->log;
    made->pipeline = std::make_unique<Pipeline>(pipeline.shared(), &made->log);
    fill_description_places(made.get());
    *clone = made.release();
  });
}

tmd_status tmd_describe(tmd_context* context, tmd_description* description) {
  return guarded(context, [&] {
    if (!description) refuse_usage("the place for the description is NULL.");
    check_struct(description, "tmd_description_init");
    write_struct(description, describe(context));
  });
}

tmd_status tmd_unload(tmd_context* context) {
  return guarded(context, [&] { opened(context).unload(); });
}
