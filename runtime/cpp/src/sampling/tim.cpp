// Transition Models: noise -> latents of a still, one jump per step through a falling list of times. The twin of
// tmd_runtime/sampling/tim.py.
//
// The graph `backbone` makes what depends on the prompt alone, once; `flow_head` is a whole step, guidance and update
// included. A step with guidance has two rows, with and without the prompt, whose x stay equal; a step without has one.
// A model of classes has the number of the class in the prompt's place.
#include <algorithm>
#include <cmath>

#include "sampling/calls.hpp"
#include "sampling/deadline.hpp"
#include "sampling/family.hpp"
#include "sampling/schedule.hpp"
#include "sampling/tim_settings.hpp"
#include "sampling/update.hpp"

namespace tmd::internal {
namespace {

// x becomes what `flow_head` made of it.
constexpr Coefficients kMove = {0.0, 1.0};

// x_t = t noise + (1 - t) data, of the noise in x and a picture in the place of the velocity.
Coefficients mixture(double t) { return {t, 1.0 - t}; }

// x_r of the stochastic sampler, of x_t and `moved` = x_t - (t - r) F in the place of the velocity.
//
// It is `moved` less rho (t - r) of the noise that F sees in x_t, x_t + (1 - t) F, plus sqrt(2 rho t (t - r)) of fresh
// noise. With (t - r) F = x_t - moved, which loses nothing however short the step is, the noise to take away is
// rho ((1 - r) x_t - (1 - t) moved).
Coefficients renewal(double t, double r, double rho) {
  return {-rho * (1.0 - r), 1.0 + rho * (1.0 - t), std::sqrt(2.0 * rho * t * (t - r))};
}

// The graphs bound to buffers of `rows` rows: 1 without guidance, 2 with. The rows of x are equal.
class Rows {
 public:
  Rows(const Graphs& graphs, const Buffers& rope, Dims dims, std::size_t rows, std::size_t latents_count,
       const std::string& prompt)
      : rows_(rows),
        count_(latents_count),
        dims_(with_batch(std::move(dims), rows)),
        prompt_(graphs.backbone->empty(prompt, dims_)),
        context_({{"context", graphs.backbone->empty("context", dims_)}}),
        backbone_(graphs.backbone->bind({{prompt, prompt_}}, context_)),
        x_(graphs.flow_head->empty("x", dims_)),
        t_(graphs.flow_head->empty("t", dims_)),
        r_(graphs.flow_head->empty("r", dims_)),
        guidance_(graphs.flow_head->empty("guidance", dims_)),
        moved_(graphs.flow_head->empty("x_next", dims_)),
        noise_(graphs.update->empty("noise", dims_)),
        updater_(graphs.update, x_, dims_),
        update_(updater_.bind(moved_, {{"noise", noise_}})),
        launches_(graphs.flow_head) {
    Buffers inputs = {{"x", x_}, {"t", t_}, {"r", r_}, {"guidance", guidance_}};
    inputs.insert(context_.begin(), context_.end());
    inputs.insert(rope.begin(), rope.end());
    flow_head_ = graphs.flow_head->bind(inputs, {{"x_next", moved_}});
    noise_.fill(0);  // finite in runs that draw none
  }

  // What the steps need of one prompt (or class) per row, each of `count` values, and how the rows mix.
  template <typename T>
  void read(const T* first, const T* second, std::size_t count, double guidance) {
    T* prompts = prompt_.values<T>(rows_ * count);
    std::copy_n(first, count, prompts);
    if (rows_ == 2) std::copy_n(second, count, prompts + count);
    prompt_.upload();
    const auto g = static_cast<float>(guidance), rest = static_cast<float>(1 - guidance);
    const float alone[] = {1}, both[] = {g, rest, g, rest};
    guidance_.write(rows_ == 1 ? alone : both, rows_ * rows_);
    backbone_->run();
  }

  void draw(Draws& draws) { draws.into(x_, 1.0, rows_); }
  void draw_fresh(Draws& draws) { draws.into(noise_, 1.0, rows_); }

  // x, which is noise, becomes a picture at time t.
  void mix(const float* picture, double t) {
    moved_.write(picture, count_, rows_);
    updater_.set(mixture(t));
    update_->run();
  }

  // These rows, each with the x of `other`.
  Rows& continue_from(const Rows& other) {
    if (&other != this) x_.write(other.x().data(), count_, rows_);
    return *this;
  }

  // Moves x from t to r. Throws Error(RUN) for NaN or Inf.
  void step(Calls& calls, double t, double r, const Coefficients& factors) {
    move(calls, t, r, factors);
    updater_.check(context_);
  }

  // A step that leads nowhere, for the time that it takes. x is lost.
  void try_step() {
    Progress silent(nullptr, nullptr, 1);
    Calls calls(silent, TMD_STAGE_FLOW_HEAD, 1);
    x_.fill(0);
    move(calls, 1.0, 0.0, kMove);
  }

  // Where a jump from t to r would lead; x stays.
  std::vector<float> look(double t, double r) {
    t_.fill(static_cast<float>(t));
    r_.fill(static_cast<float>(r));
    flow_head_->run();
    return first(moved_);
  }

  std::vector<float> x() const { return first(x_); }

 private:
  static Dims with_batch(Dims dims, std::size_t rows) {
    dims["batch"] = static_cast<std::int64_t>(rows);
    return dims;
  }

  std::vector<float> first(const Buffer& buffer) const {
    std::vector<float> values = buffer.read<float>(rows_ * count_);
    values.resize(count_);
    return values;
  }

  void move(Calls& calls, double t, double r, const Coefficients& factors) {
    t_.fill(static_cast<float>(t));
    r_.fill(static_cast<float>(r));
    updater_.set(factors);
    const Piece piece = [&](const Call& call) {
      call(calls, *flow_head_, true);
      call(calls, *update_, false);
    };
    launches_.run({&calls}, piece, 0);
  }

  std::size_t rows_, count_;
  Dims dims_;
  Buffer prompt_;
  Buffers context_;
  std::unique_ptr<Step> backbone_;
  Buffer x_, t_, r_, guidance_, moved_, noise_;
  Updater updater_;
  std::unique_ptr<Step> update_, flow_head_;
  Launches launches_;
};

// TiM's sampler (arXiv 2509.04394), deterministic or, with rho, stochastic.
class TimLoop : public Loop {
 public:
  TimLoop(const Manifest& manifest, Graphs graphs, const Settings& settings, std::int64_t tokens)
      : graphs_(std::move(graphs)),
        classes_(manifest.classes()),
        count_(settings.latents_count()),
        embeds_count_(static_cast<std::size_t>(tokens * manifest.text.dim)) {
    const auto& patch = manifest.model->patch_size;
    const std::int64_t grid[2] = {settings.latent_height / patch[1], settings.latent_width / patch[2]};
    dims_ = {{"batch", 1},
             {"frames", 1},
             {"height", settings.latent_height},
             {"width", settings.latent_width},
             {"tokens", grid[0] * grid[1]},
             {"text", tokens}};
    for (const char* name : {"rope_cos", "rope_sin"}) rope_[name] = graphs_.flow_head->empty(name, dims_);
    const std::int64_t head_dim = manifest.model->head_dim;
    const auto count = static_cast<std::size_t>(grid[0] * grid[1] * (head_dim / 2));
    tim_rope_tables(grid[0], grid[1], head_dim, static_cast<const TimModel&>(*manifest.model).rope,
                    rope_["rope_cos"].values<float>(count), rope_["rope_sin"].values<float>(count));
    for (const auto& [name, table] : rope_) table.upload();
  }

  // Guidance, F = F_neg + g (F_pos - F_neg), is in the steps whose t lies inside its interval. With rho, every step but
  // the first and the last draws fresh noise, behind that of the start.
  Denoised run(const Start& start, const Settings& settings, Progress& progress) override {
    const auto kind_at = [&](double t) { return settings.guided(t) ? std::size_t{1} : std::size_t{0}; };
    bool needed[2] = {false, false};
    for (std::size_t k = 0; k + 1 < settings.times.size(); ++k) needed[kind_at(settings.times[k])] = true;
    for (const std::size_t kind : {0, 1})
      if (needed[kind]) bind(kind, progress);
    const Stopwatch clock;
    read_prompts(needed, start, settings, progress);
    double end = settings.deadline.value_or(0);
    if (settings.deadline) end += measure_steps(needed, *settings.deadline, progress);
    const auto dearest = [&] {
      double most = 0;
      for (const std::size_t kind : {0, 1})
        if (needed[kind]) most = std::max(most, costs_[kind].cost());
      return most;
    };

    Calls calls(progress, TMD_STAGE_FLOW_HEAD, settings.steps);
    Draws draws(settings.seed, count_, progress);
    double t = settings.times.front();
    std::vector<double> times = {t};
    Rows* now = rows_[kind_at(t)].get();
    now->draw(draws);
    if (start.picture) now->mix(start.picture, t);
    for (std::int64_t done = 1, most = settings.steps; t > 0; ++done, --most) {
      const std::size_t kind = kind_at(t);
      const double r = settings.deadline ? next_time(settings.times, settings.scheduled, t, most, end - clock.seconds(),
                                                     costs_[kind].cost(), dearest())
                                         : settings.times[static_cast<std::size_t>(done)];
      now = &rows_[kind]->continue_from(*now);
      if (start.on_preview && r > 0) {
        std::vector<float> data;
        progress.timed(TMD_STAGE_FLOW_HEAD, [&] { data = now->look(t, 0.0); });
        start.on_preview(data.data());
      }
      const Stopwatch step;
      const bool renews = settings.rho > 0 && times.size() > 1 && r > 0;
      if (renews) now->draw_fresh(draws);
      const bool planned = settings.deadline && !settings.scheduled;
      calls.expect(done + steps_ahead(t, r, done, settings.steps, planned));
      now->step(calls, t, r, renews ? renewal(t, r, settings.rho) : kMove);
      costs_[kind].add(step.seconds());
      times.push_back(r);
      t = r;
    }
    return {now->x(), times};
  }

 private:
  // The buffers of one row (kind 0) or of two; an engine may compile for them here.
  void bind(std::size_t kind, Progress& progress) {
    if (rows_[kind]) return;
    progress.timed(TMD_STAGE_LOAD, [&] {
      rows_[kind] =
          std::make_unique<Rows>(graphs_, rope_, dims_, kind + 1, count_, classes_ ? "labels" : "prompt_embeds");
    });
  }

  void read_prompts(const bool (&needed)[2], const Start& start, const Settings& settings, Progress& progress) {
    const Stopwatch clock;
    const std::int64_t none = classes_;  // the number of no class
    for (const std::size_t kind : {0, 1}) {
      if (!needed[kind]) continue;
      if (classes_)
        rows_[kind]->read(&settings.label, &none, 1, settings.guidance);
      else
        rows_[kind]->read(start.embeds, start.negative, embeds_count_, settings.guidance);
    }
    const double seconds = clock.seconds();
    progress.add(TMD_STAGE_BACKBONE, seconds);
    progress.report(TMD_STAGE_BACKBONE, 1, 1, seconds);
  }

  // Seconds that went into steps whose time was not known. They count as loading: only a first run has them.
  double measure_steps(const bool (&needed)[2], double deadline, Progress& progress) {
    double seconds = 0;
    for (const std::size_t kind : {0, 1})
      if (needed[kind]) seconds += measure(costs_[kind], deadline, [&] { rows_[kind]->try_step(); });
    progress.add(TMD_STAGE_LOAD, seconds);
    return seconds;
  }

  Graphs graphs_;
  std::int64_t classes_;
  std::size_t count_, embeds_count_;
  Dims dims_;
  Buffers rope_;
  std::unique_ptr<Rows> rows_[2];
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
