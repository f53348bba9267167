#include "sampling/rules.hpp"

#include <cmath>
#include <cstring>
#include <limits>

namespace tmd::internal {
namespace {

// Element-wise, one rounding each.
void scale(float* out, const float* a, double factor, std::size_t count) {
  const float f = static_cast<float>(factor);
  for (std::size_t k = 0; k < count; ++k) out[k] = a[k] * f;
}
void add(float* out, const float* a, const float* b, std::size_t count) {
  for (std::size_t k = 0; k < count; ++k) out[k] = a[k] + b[k];
}
void subtract(float* out, const float* a, const float* b, std::size_t count) {
  for (std::size_t k = 0; k < count; ++k) out[k] = a[k] - b[k];
}

// ln((1 - t)/t): minus infinity for pure noise.
double log_snr(double t) { return t < 1.0 ? std::log((1.0 - t) / t) : -std::numeric_limits<double>::infinity(); }

// x + (t' - t) v
class Euler : public Rule {
 public:
  void step(std::size_t i, float* x, float* v) override {
    scale(v, v, times_[i + 1] - times_[i], count_);
    add(x, x, v, count_);
  }
};

// (1 - t')(x - t v) + t' noise with fresh noise; the last step returns the predicted data and draws nothing.
class Renoise : public Rule {
 public:
  bool draws() const override { return true; }
  void step(std::size_t i, float* x, float* v) override {
    const double now = times_[i], after = times_[i + 1];
    scale(v, v, now, count_);
    subtract(x, x, v, count_);
    if (after > 0) {
      scale(x, x, 1.0 - after, count_);
      stream_->normal(v, count_);
      scale(v, v, after, count_);
      add(x, x, v, count_);
    }
  }
};

// UniPC of order 2, variant B2, predicting data, with corrector (arXiv 2302.04867); formulas in tmd_runtime/sampling/rules.py.
class UniPC : public Rule {
 public:
  void step(std::size_t i, float* x, float* v) override {
    float* m = data_[i % 3].data();
    scale(m, v, times_[i], count_);
    subtract(m, x, m, count_);
    if (i) {
      const Weights w = weights(i - 1, i, true);
      scale(x, from_.data(), w.start, count_);
      add_terms(x, v, {{w.at, i - 1}, {w.before, i + 1}, {w.after, i}});  // i + 1 and i - 2 take the same turn of 3
    }
    std::memcpy(from_.data(), x, count_ * sizeof(float));
    const Weights w = weights(i, i + 1, false);
    scale(x, x, w.start, count_);
    add_terms(x, v, {{w.at, i}, {w.before, i + 2}});  // i + 2 takes the turn of i - 1
  }

 private:
  struct Weights {
    double start, at, before, after;  // of x, m_s, m_before and m_t
  };
  struct Term {
    double weight;
    std::size_t number;
  };

  void prepare() override {
    from_.resize(count_);
    for (std::vector<float>& m : data_) m.resize(count_);
  }

  void add_terms(float* x, float* work, std::initializer_list<Term> terms) {
    for (const Term& term : terms) {
      if (term.weight == 0) continue;
      scale(work, data_[term.number % 3].data(), term.weight, count_);
      add(x, x, work, count_);
    }
  }

  // In the step from times[at] to times[to].
  Weights weights(std::size_t at, std::size_t to, bool correct) const {
    const double s = times_[at], t = times_[to];
    if (t == 0) return {0.0, 1.0, 0.0, 0.0};
    const double h = log_snr(t) - log_snr(s);
    const double b = std::expm1(-h);
    const double scaled = -(1.0 - t) * b;
    double before = 0.0, after = 0.0;
    if (at) {
      const double r = (log_snr(times_[at - 1]) - log_snr(s)) / h;
      if (correct) {
        const double p1 = -b / h - 1.0;
        const double b1 = p1 / b, b2 = 2.0 * (-p1 / h - 0.5) / b;
        const double rho = (b2 - b1) / (r - 1.0);
        before = rho / r;
        after = b1 - rho;
      } else {
        before = 0.5 / r;
      }
    } else if (correct) {
      after = 0.5;
    }
    return {t / s, scaled * (1.0 - before - after), scaled * before, scaled * after};
  }

  std::vector<float> from_, data_[3];  // x before the latest step; m of the three latest times, taking turns
};

}  // namespace

std::unique_ptr<Rule> make_rule(const std::string& name) {
  if (name == "euler") return std::make_unique<Euler>();
  if (name == "renoise") return std::make_unique<Renoise>();
  return std::make_unique<UniPC>();
}

}  // namespace tmd::internal
