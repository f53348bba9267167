// The twin of `WanLoop` in tmd_runtime/sampling/wan.py.
#include "sampling/schedule.hpp"
#include "sampling/wan.hpp"

namespace tmd::internal {
namespace {

// The optional inputs of the graph `update` that a run with these factors reads.
std::set<std::string> slots_of(const std::vector<Coefficients>& factors, bool guided) {
  std::set<std::string> slots;
  if (guided) slots.insert("negative");
  for (const Coefficients& each : factors) {
    if (each.noise != 0) slots.insert("noise");
    if (each.before_1 != 0 || each.before_2 != 0) slots.insert({"before_1", "before_2"});
  }
  return slots;
}

std::vector<std::string> with_held(std::vector<std::string> told, const Manifest& manifest) {
  if (manifest.holds_first_frame()) told.push_back("held");
  return told;
}

std::int64_t key_of(const std::set<std::string>& slots) {
  std::int64_t key = 0;
  for (const char* name : {"negative", "noise", "before_1"})
    key = key * 2 + static_cast<std::int64_t>(slots.count(name));
  return key;
}

}  // namespace

WanLoop::WanLoop(const Manifest& manifest, Graphs graphs, const Settings& settings, std::int64_t tokens,
                 const std::vector<std::string>& told)
    : sampler_(static_cast<const WanSampler&>(*manifest.sampler)),
      rule_(find_rule(sampler_.rule)),
      embeds_count_(static_cast<std::size_t>(tokens * manifest.text.dim)),
      update_(graphs.update),
      transformer_(graphs.transformer),
      bound_(*graphs.backbone, manifest, settings, tokens, with_held(told, manifest)),
      velocity_(graphs.flow_head->empty("velocity", bound_.dims)),
      updater_(update_, bound_.x, bound_.dims) {
  if (manifest.holds_first_frame())
    held_ = {{"held", bound_.times["held"]}, {"picture", update_->empty("picture", bound_.dims)}};
  transformers_[0] = tied(std::move(bound_.step), {graphs.backbone, graphs.flow_head});
}

Denoised WanLoop::run(const Start& start, const Settings& settings, Progress& progress) {
  const bool guided = start.negative != nullptr;
  const double guidance = guided ? settings.guidance : 1.0;
  std::vector<Coefficients> planned;
  for (std::size_t i = 0; i + 1 < settings.times.size(); ++i) planned.push_back(rule_(settings.times, i));
  const std::set<std::string> slots = slots_of(planned, guided);
  const bool remembers = slots.count("before_1");
  Step* bound_update = nullptr;
  progress.timed(TMD_STAGE_LOAD, [&] {  // an engine may compile here
    bound_update = &update_with(slots);
    hold(start.picture);
  });
  Step& update = *bound_update;
  const std::int64_t passes = settings.steps * (guided ? 2 : 1);
  Calls backbone(progress, TMD_STAGE_BACKBONE, passes), flow_head(progress, TMD_STAGE_FLOW_HEAD, passes);
  Draws draws(settings.seed, settings.latents_count(), progress);

  const auto velocity = [&](const Call& call) {
    call(backbone, *active().backbone, true);
    call(flow_head, *active().flow_head, true);
  };
  const Piece step = [&](const Call& call) {
    if (guided) {
      bound_.prompt_embeds.copy(negative_prompt_);
      velocity(call);
      latents_["negative"].copy(velocity_);
      bound_.prompt_embeds.copy(prompt_);
    }
    velocity(call);
    call(flow_head, update, false);
    if (remembers) {
      latents_["before_2"].copy(latents_["before_1"]);
      latents_["before_1"].copy(updater_.data());
    }
  };

  turn_to(is_second(settings.times.front()), progress);
  if (guided)
    put_prompts(start);
  else
    bound_.prompt_embeds.write(start.embeds, embeds_count_);
  const auto try_step = [&] {
    bound_.x.fill(0);
    tell(1.0, 0.0);
    updater_.set(rule_({1.0, 0.0}, 0), 1.0, guidance);
    step([](Calls&, Step& each, bool) { each.run(); });
  };
  const Jumps next = jumps(settings, backbone, flow_head, progress, try_step);
  draws.into(bound_.x, sampler_.init_scale);
  if (start.picture) put_picture();
  for (const char* name : {"before_1", "before_2"})
    if (slots.count(name)) latents_[name].copy(bound_.x);  // finite, whatever an earlier run left there
  std::vector<double> times = {settings.times.front()};
  for (double t = 0, r = 0; next(t, r);) {
    times.push_back(r);
    const Coefficients factors = rule_(times, times.size() - 2);
    if (factors.noise != 0) draws.into(latents_["noise"]);
    const bool second = is_second(t);
    turn_to(second, progress);
    tell(t, r);
    updater_.set(factors, t, guided && second ? settings.guidance_2 : guidance);
    if (guided) before_step_.copy(bound_.x);
    active().launches.run({&backbone, &flow_head}, step, key_of(slots));
    const auto negative_pass = [&] {  // again, for who asks where NaN came from
      bound_.x.copy(before_step_);
      bound_.prompt_embeds.copy(negative_prompt_);
      active().backbone->run();
    };
    updater_.check(bound_.passed, guided ? std::function<void()>(negative_pass) : nullptr);
    if (start.on_preview && r > 0) start.on_preview(updater_.preview().data());
  }
  return {bound_.x.read<float>(settings.latents_count()), times};
}

void WanLoop::tell(double t, double) {
  bound_.times["t"].fill(static_cast<float>(told_time(t, sampler_.time_rounding)));
}

WanLoop::Jumps WanLoop::jumps(const Settings& settings, Calls&, Calls&, Progress&, const std::function<void()>&) {
  return [&times = settings.times, done = std::size_t{0}](double& t, double& r) mutable {
    if (done + 1 >= times.size()) return false;
    t = times[done], r = times[++done];
    return true;
  };
}

// `step` is that of the backbone.
std::unique_ptr<WanLoop::Bound> WanLoop::tied(std::unique_ptr<Step> step, Transformer graphs) const {
  // Both passes of guidance go through one binding: a second one would cost an engine's working memory again.
  Buffers inputs = {{"x", bound_.x}};
  for (const Buffers& others : {bound_.times, bound_.rope, bound_.passed}) inputs.insert(others.begin(), others.end());
  std::unique_ptr<Step> flow_head = graphs.flow_head->bind(inputs, {{"velocity", velocity_}});
  Launches launches(graphs.backbone);
  return std::make_unique<Bound>(Bound{std::move(graphs), std::move(step), std::move(flow_head), std::move(launches)});
}

bool WanLoop::is_second(double t) const {
  return sampler_.boundary && told_time(t, sampler_.time_rounding) < *sampler_.boundary;
}

// Makes one of the two transformers the active one; loads it where that is not done.
void WanLoop::turn_to(bool second, Progress& progress) {
  if (!transformers_[second ? 1 : 0]) {
    const auto let_go = [this] {
      for (std::unique_ptr<Bound>& each : transformers_) each.reset();
    };
    const Transformer graphs = transformer_(second, let_go, progress);
    progress.timed(TMD_STAGE_LOAD, [&] {  // an engine may compile here
      transformers_[second ? 1 : 0] = tied(bound_.bind(*graphs.backbone), graphs);
    });
  }
  second_ = second;
}

// The update with these slots in use; their buffers are made at their first use, of finite values.
Step& WanLoop::update_with(const std::set<std::string>& slots) {
  std::unique_ptr<Step>& update = updates_[key_of(slots)];
  if (!update) {
    Buffers used;
    for (const std::string& name : slots) {
      if (!latents_.count(name)) {
        latents_[name] = update_->empty("x_next", bound_.dims);
        latents_[name].fill(0);
      }
      used[name] = latents_[name];
    }
    used.insert(held_.begin(), held_.end());
    update = updater_.bind(velocity_, used);
  }
  return *update;
}

void WanLoop::hold(const float* picture) {
  if (held_.empty()) return;
  const Buffer &held = held_.at("held"), &latents = held_.at("picture");
  std::vector<float> frames(held.count(), 0.0f);
  if (picture) frames.front() = 1.0f;
  held.write(frames.data(), frames.size());
  if (!picture) return latents.fill(0);  // finite: it is a term of every update
  latents.write(picture, latents.count());
  // One that reads no velocity: that buffer could hold anything, and 0 times NaN is NaN.
  if (!update_of_nothing_) update_of_nothing_ = updater_.bind(bound_.x, held_);
}

void WanLoop::put_picture() {
  updater_.set({1.0, 0.0});
  update_of_nothing_->run();
}

void WanLoop::put_prompts(const Start& start) {
  const std::pair<Buffer*, const float*> prompts[] = {{&prompt_, start.embeds}, {&negative_prompt_, start.negative}};
  if (!before_step_.bytes()) before_step_ = update_->empty("x_next", bound_.dims);
  for (const auto& [buffer, embeds] : prompts) {
    if (!buffer->bytes()) *buffer = active().graphs.backbone->empty("prompt_embeds", bound_.dims);
    buffer->write(embeds, embeds_count_);
  }
}

}  // namespace tmd::internal
