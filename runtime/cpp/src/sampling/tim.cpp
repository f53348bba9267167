// Transition Models: noise -> latents of a still, one jump per step through a falling list of times. The twin of
// tmd_runtime/sampling/tim.py.
//
// The graph `backbone` makes what depends on the prompt alone, once; `flow_head` is a whole step, guidance and update
// included. A step with guidance has two rows, with and without the prompt, whose x stay equal; a step without has one.
// A model of classes has the number of the class in the prompt's place.
#include <cmath>

#include "sampling/calls.hpp"
#include "sampling/deadline.hpp"
#include "sampling/family.hpp"
#include "sampling/schedule.hpp"
#include "sampling/tim_settings.hpp"
#include "sampling/update.hpp"

namespace tmd::internal {
namespace {

// x where the step has moved it to, which is the velocity of the update that follows.
constexpr Coefficients kMoved = {0, 1};

// From x at t, moved to x - (t - r) F: less rho (t - r) of the noise that F sees in x, x + (1 - t) F, and plus
// sqrt(2 rho t (t - r)) of fresh noise.
Coefficients renewed(double t, double r, double rho) {
  return {-rho * (1.0 - r), 1.0 + rho * (1.0 - t), std::sqrt(2.0 * rho * t * (t - r))};
}

// Both graphs bound to buffers of 1 row, or of 2 with guidance.
struct Rows {
  Buffer prompt, x, t, r, guidance, x_next;
  Buffers context;
  std::unique_ptr<Step> make_context, step;
};

class TimLoop : public Loop {
 public:
  TimLoop(const Manifest& manifest, Graphs graphs, const Settings& settings, std::int64_t tokens)
      : graphs_(std::move(graphs)),
        classes_(manifest.classes()),
        count_(settings.latents_count()),
        embeds_count_(static_cast<std::size_t>(tokens * manifest.text.dim)),
        dims_(dims_of(manifest, settings, tokens)),
        x_(graphs_.update->empty("x", dims_)),
        moved_(graphs_.update->empty("velocity", dims_)),
        noise_(graphs_.update->empty("noise", dims_)),
        updater_(graphs_.update, x_, dims_),
        update_(updater_.bind(moved_)),
        renew_(updater_.bind(moved_, {{"noise", noise_}})) {
    const auto& patch = manifest.model->patch_size;
    const std::size_t count = static_cast<std::size_t>(dims_["tokens"] * (manifest.model->head_dim / 2));
    for (const char* name : {"rope_cos", "rope_sin"}) rope_[name] = graphs_.flow_head->empty(name, dims_);
    tim_rope_tables(settings.latent_height / patch[1], settings.latent_width / patch[2], manifest.model->head_dim,
                    static_cast<const TimModel&>(*manifest.model).rope, rope_["rope_cos"].values<float>(count),
                    rope_["rope_sin"].values<float>(count));
    for (const auto& [name, table] : rope_) table.upload();
  }

  Denoised run(const Start& start, const Settings& settings, Progress& progress) override {
    const auto rows_at = [&](double time) { return settings.guided(time) ? std::size_t{2} : std::size_t{1}; };
    bool needed[2] = {false, false};
    for (std::size_t k = 0; k + 1 < settings.times.size(); ++k) needed[rows_at(settings.times[k]) - 1] = true;
    for (const std::size_t rows : {std::size_t{1}, std::size_t{2}})
      if (needed[rows - 1]) bind(rows, progress);

    const Stopwatch clock;
    double t = settings.times.front();
    Draws draws(settings.seed, count_, progress);
    draws.into(x_);
    if (start.picture) {
      moved_.write(start.picture, count_);
      updater_.set({t, 1 - t}, t);
      update_->run();
    }
    ask(needed, start, settings, progress);

    double end = settings.deadline.value_or(0);
    if (settings.deadline) end += measure(needed, *settings.deadline, progress);
    const auto dearest = [&] {
      double most = 0;
      for (std::size_t k = 0; k < 2; ++k)
        if (needed[k]) most = std::max(most, costs_[k].cost());
      return most;
    };
    std::vector<double> times = {t};
    for (std::int64_t done = 1, total = settings.steps, most = settings.steps; t > 0; ++done, --most) {
      const std::size_t rows = rows_at(t);
      const double r = settings.deadline ? next_time(settings.times, settings.scheduled, t, most, end - clock.seconds(),
                                                     costs_[rows - 1].cost(), dearest())
                                         : settings.times[static_cast<std::size_t>(done)];
      if (start.on_preview && r > 0) {
        progress.timed(TMD_STAGE_FLOW_HEAD, [&] { jump(x_, t, 0.0, rows); });
        start.on_preview(moved_.read<float>(count_).data());
      }
      const double drawing = progress.seconds(TMD_STAGE_NOISE);
      const Stopwatch step;
      jump(x_, t, r, rows);
      if (settings.rho > 0 && times.size() > 1 && r > 0) {
        draws.into(noise_);
        updater_.set(renewed(t, r, settings.rho), t);
        renew_->run();
      } else {
        updater_.set(kMoved, t);
        update_->run();
      }
      updater_.check(rows_[rows - 1].context);
      const double seconds = step.seconds();
      costs_[rows - 1].add(seconds);
      times.push_back(r);
      progress.add(TMD_STAGE_FLOW_HEAD, seconds - (progress.seconds(TMD_STAGE_NOISE) - drawing));
      const bool planned = settings.deadline && !settings.scheduled;
      const std::int64_t ahead = r <= 0 ? 0 : planned ? std::llround(r / (t - r)) : settings.steps - done;
      progress.expect(done + ahead - total);
      total = done + ahead;
      progress.report(TMD_STAGE_FLOW_HEAD, done, total, seconds);
      t = r;
    }
    return {x_.read<float>(count_), times};
  }

 private:
  static Dims dims_of(const Manifest& manifest, const Settings& settings, std::int64_t tokens) {
    const auto& patch = manifest.model->patch_size;
    return {{"batch", 1},
            {"frames", 1},
            {"height", settings.latent_height},
            {"width", settings.latent_width},
            {"tokens", settings.latent_height / patch[1] * (settings.latent_width / patch[2])},
            {"text", tokens}};
  }

  // The buffers of so many rows; an engine may compile for them here.
  void bind(std::size_t rows, Progress& progress) {
    if (rows_[rows - 1].step) return;
    progress.timed(TMD_STAGE_LOAD, [&] {
      Rows made;
      Dims dims = dims_;
      dims["batch"] = static_cast<std::int64_t>(rows);
      const std::string prompt = classes_ ? "labels" : "prompt_embeds";
      made.prompt = graphs_.backbone->empty(prompt, dims);
      made.context["context"] = graphs_.backbone->empty("context", dims);
      made.make_context = graphs_.backbone->bind({{prompt, made.prompt}}, made.context);
      Buffers inputs = made.context;
      inputs.insert(rope_.begin(), rope_.end());
      const std::pair<const char*, Buffer*> own[] = {
          {"x", &made.x}, {"t", &made.t}, {"r", &made.r}, {"guidance", &made.guidance}};
      for (const auto& [name, buffer] : own) inputs[name] = *buffer = graphs_.flow_head->empty(name, dims);
      made.x_next = graphs_.flow_head->empty("x_next", dims);
      made.step = graphs_.flow_head->bind(inputs, {{"x_next", made.x_next}});
      rows_[rows - 1] = std::move(made);
    });
  }

  // What the flow head needs of the prompt, and how the rows mix.
  void ask(const bool (&needed)[2], const Start& start, const Settings& settings, Progress& progress) {
    const Stopwatch clock;
    for (const std::size_t rows : {std::size_t{1}, std::size_t{2}}) {
      if (!needed[rows - 1]) continue;
      const Rows& at = rows_[rows - 1];
      if (classes_) {
        const std::int64_t labels[] = {settings.label, classes_};  // the second is the number of none
        at.prompt.write(labels, rows);
      } else {
        float* prompts = at.prompt.values<float>(rows * embeds_count_);
        std::copy_n(start.embeds, embeds_count_, prompts);
        if (rows == 2) std::copy_n(start.negative, embeds_count_, prompts + embeds_count_);
        at.prompt.upload();
      }
      const auto g = static_cast<float>(settings.guidance), rest = static_cast<float>(1 - settings.guidance);
      const float alone[] = {1}, both[] = {g, rest, g, rest};
      at.guidance.write(rows == 1 ? alone : both, rows * rows);
      at.make_context->run();
    }
    const double seconds = clock.seconds();
    progress.add(TMD_STAGE_BACKBONE, seconds);
    progress.report(TMD_STAGE_BACKBONE, 1, 1, seconds);
  }

  // Seconds that went into steps whose time was not known. They count as loading: only a first run has them.
  double measure(const bool (&needed)[2], double deadline, Progress& progress) {
    const Stopwatch all;
    const Buffer& zeros = noise_;  // no step has drawn yet
    zeros.fill(0);
    const auto cost = [&](std::size_t rows) {
      const Stopwatch step;
      jump(zeros, 1.0, 0.0, rows);
      return step.seconds();
    };
    for (std::size_t rows = 1; rows <= 2; ++rows) {
      if (!needed[rows - 1] || costs_[rows - 1].known()) continue;
      const double first = cost(rows);
      // The very first one may be slow for reasons that do not come back, and here it would decide.
      costs_[rows - 1].add(first > deadline / 10 ? cost(rows) : first);
    }
    progress.add(TMD_STAGE_LOAD, all.seconds());
    return all.seconds();
  }

  // `moved_` becomes the x at r of `x` at t.
  void jump(const Buffer& x, double t, double r, std::size_t rows) {
    const Rows& at = rows_[rows - 1];
    at.x.repeat(x);
    at.t.fill(static_cast<float>(t));
    at.r.fill(static_cast<float>(r));
    at.step->run();
    moved_.take(at.x_next);
  }

  Graphs graphs_;
  std::int64_t classes_;
  std::size_t count_, embeds_count_;
  Dims dims_;
  Buffers rope_;
  Buffer x_, moved_, noise_;
  Updater updater_;
  std::unique_ptr<Step> update_, renew_;
  Rows rows_[2];
  StepTimes costs_[2];
};

class Tim : public RuntimeFamily {
 public:
  const char* name() const override { return "tim"; }
  bool makes_stills() const override { return true; }
  bool keeps_prompt_length() const override { return true; }
  std::int64_t classes(const ModelInfo& model) const override { return static_cast<const TimModel&>(model).classes; }

  std::shared_ptr<ModelInfo> read_model(Object& object) const override { return read_tim_model(object); }
  void check_model(const ModelInfo& model, const Object& object) const override {
    if (model.head_blocks != model.num_layers) object.refuse("head_blocks is not num_layers, as in family 'tim'");
  }
  std::shared_ptr<const SamplerInfo> read_sampler(Object& object) const override { return read_tim_sampler(object); }

  void resolve(const Manifest& manifest, const tmd_run_options& options, Settings& settings) const override {
    resolve_tim(manifest, options, settings);
  }
  double nfe(const ModelInfo&, const Settings& settings) const override {
    double evaluations = 0;
    for (std::size_t k = 0; k + 1 < settings.times.size(); ++k)
      evaluations += settings.guided(settings.times[k]) ? 2 : 1;
    return evaluations;
  }
  std::int64_t reported_steps(const Settings& settings) const override { return 1 + settings.steps; }
  std::int64_t rows(const Settings& settings) const override {
    const auto guided = [&](double t) { return settings.guided(t); };
    return std::any_of(settings.times.begin(), settings.times.end(), guided) ? 2 : 1;
  }
  std::unique_ptr<Loop> make_loop(const Manifest& manifest, Graphs graphs, const Settings& settings,
                                  std::int64_t tokens) const override {
    return std::make_unique<TimLoop>(manifest, std::move(graphs), settings, tokens);
  }
};

}  // namespace

const RuntimeFamily& tim_family() {
  static const Tim family;
  return family;
}

}  // namespace tmd::internal
