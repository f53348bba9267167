#include "sampling/rules.hpp"

#include <cmath>
#include <limits>

namespace tmd::internal {
namespace {

// x + (t' - t) v.
Coefficients euler(const std::vector<double>& times, std::size_t i) { return {1.0, times[i + 1] - times[i]}; }

// (1 - t')(x - t v) + t' noise with fresh noise: predict the data, then make it as noisy as the next time wants.
//
// The multistep sampling of consistency models (arXiv 2303.01469, Algorithm 1); rCM and the DMD students use it. The
// last step, to 0, returns the predicted data and draws nothing.
Coefficients renoise(const std::vector<double>& times, std::size_t i) {
  const double now = times[i], after = times[i + 1];
  return {1.0 - after, -(1.0 - after) * now, after};
}

// ln((1 - t)/t): minus infinity for pure noise.
double log_snr(double t) { return t < 1.0 ? std::log((1.0 - t) / t) : -std::numeric_limits<double>::infinity(); }

// Of x, m_s, m_before and m_t.
struct Weights {
  double start, at, before, after;
};

// In the step from s = times[at] to t = times[at + 1].
Weights unipc_weights(const std::vector<double>& times, std::size_t at, bool correct) {
  const double s = times[at], t = times[at + 1];
  if (t == 0) return {0.0, 1.0, 0.0, 0.0};
  const double h = log_snr(t) - log_snr(s);
  const double b = std::expm1(-h);
  const double scale = -(1.0 - t) * b;
  double before = 0.0, after = 0.0;
  // In slopes, whose weights the solver gives: D = (m_before - m_s)/r and m_t - m_s.
  if (at) {
    const double r = (log_snr(times[at - 1]) - log_snr(s)) / h;
    if (correct) {
      const double p1 = -b / h - 1.0;
      const double b1 = p1 / b, b2 = 2.0 * (-p1 / h - 0.5) / b;
      const double rho = (b2 - b1) / (r - 1.0);  // solves [[1, 1], [r, 1]] (rho, after) = (b1, b2)
      before = rho / r;
      after = b1 - rho;
    } else {
      before = 0.5 / r;
    }
  } else if (correct) {
    after = 0.5;
  }
  return {t / s, scale * (1.0 - before - after), scale * before, scale * after};
}

// UniPC of order 2, variant B2, predicting data, with corrector (arXiv 2302.04867): Wan's default solver.
//
// With s = the time before, alpha = 1 - t, lambda = ln(alpha/t), h = lambda_t - lambda_s, B = e^-h - 1 and the data
// predictions m: the predictor is (t/s) x_s - alpha B m_s, at order 2 with - alpha B D/2, D = (m_before - m_s)/r,
// r = (lambda_before - lambda_s)/h. The corrector repeats the step into t once m_t is known: it and the predictor have
// the same factor t/s of x_s, so x corrected is x plus the differences of the other factors. The first step has order
// 1; the last one, to 0, returns the data prediction.
Coefficients unipc(const std::vector<double>& times, std::size_t i) {
  const double now = times[i];
  double m = 0.0, before_1 = 0.0, before_2 = 0.0;  // corrected x = x + m m_t + before_1 m_s + before_2 m_before
  if (i) {
    const Weights predicted = unipc_weights(times, i - 1, false), corrected = unipc_weights(times, i - 1, true);
    before_1 = corrected.at - predicted.at;
    before_2 = corrected.before - predicted.before;
    m = corrected.after - predicted.after;
  }
  const Weights next = unipc_weights(times, i, false);
  m = next.start * m + next.at;
  // m_t = x - t v
  return {next.start + m, -m * now, 0.0, next.start * before_1 + next.before, next.start * before_2};
}

struct Named {
  const char* name;
  Rule rule;
};
// `sampler.rule` of a manifest -> the rule.
constexpr Named kRules[] = {{"euler", euler}, {"renoise", renoise}, {"unipc", unipc}};

}  // namespace

Rule find_rule(const std::string& name) {
  for (const Named& each : kRules)
    if (name == each.name) return each.rule;
  return nullptr;
}

std::string rule_names() {
  std::string names;
  for (const Named& each : kRules) names += (names.empty() ? "" : ", ") + std::string(each.name);
  return names;
}

}  // namespace tmd::internal
