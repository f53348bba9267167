#include "base/stopping.hpp"

#include <csignal>
#include <ctime>
#include <new>

#include "base/error.hpp"

namespace tmd::internal {
namespace {

constexpr std::size_t kStack = std::size_t{256} << 10;  // bytes; an engine's `stop` needs some of it
constexpr long kAgain = 50'000'000;  // ns; a stop is repeated: the first may have come just before the graph began

thread_local Stopping* current = nullptr;

void sleep_until_woken_or_again(sem_t& wake) {
  timespec until;
  ::clock_gettime(CLOCK_REALTIME, &until);
  until.tv_nsec += kAgain;
  until.tv_sec += until.tv_nsec / 1'000'000'000;
  until.tv_nsec %= 1'000'000'000;
  ::sem_timedwait(&wake, &until);
}

}  // namespace

static_assert(std::atomic<std::uint64_t>::is_always_lock_free, "a handler of a signal may take no lock");

Stopping::Stopping() noexcept { ::sem_init(&wake_, 0, 0); }

Stopping::~Stopping() {
  if (has_thread_) {
    closing_ = true;
    ::sem_post(&wake_);
    ::pthread_join(thread_, nullptr);
  }
  ::sem_destroy(&wake_);
}

void Stopping::ask() noexcept {
  const std::uint64_t call = call_.load();
  if (call % 2 == 0) return;
  asked_ = call;  // of this call: one that comes later is not meant
  ::sem_post(&wake_);
}

void Stopping::begin() {
  if (!has_thread_) {
    // The thread blocks every signal: handlers of the host run on its own threads.
    sigset_t all, before;
    ::sigfillset(&all);
    pthread_attr_t attributes;
    if (::pthread_attr_init(&attributes) != 0) throw std::bad_alloc();
    ::pthread_attr_setstacksize(&attributes, kStack);
    ::pthread_sigmask(SIG_SETMASK, &all, &before);
    const auto work = [](void* self) -> void* {
      static_cast<Stopping*>(self)->watch();
      return nullptr;
    };
    has_thread_ = ::pthread_create(&thread_, &attributes, work, this) == 0;
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    ::pthread_attr_destroy(&attributes);
    if (!has_thread_) throw std::bad_alloc();
  }
  ++call_;
}

void Stopping::watch() noexcept {
  while (!closing_) {
    if (!asked()) {
      ::sem_wait(&wake_);
      continue;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (running_) running_->stop();
    }
    sleep_until_woken_or_again(wake_);
  }
}

StoppableCall::StoppableCall(Stopping& stopping) : stopping_(stopping), before_(current) {
  stopping_.begin();
  current = &stopping_;
}

StoppableCall::~StoppableCall() {
  current = before_;
  stopping_.end();
}

bool was_stopped() noexcept { return current && current->asked(); }

void check_stopped() {
  if (was_stopped()) throw Error(TMD_CANCELLED, "the run was stopped by tmd_cancel.");
}

Running::Running(Stoppable& work) : stopping_(current) {
  if (!stopping_) return;
  {
    const std::lock_guard<std::mutex> lock(stopping_->mutex_);
    stopping_->running_ = &work;
  }
  // Asked before: whoever waits may have looked already.
  if (stopping_->asked()) {
    leave();
    check_stopped();
  }
}

void Running::leave() noexcept {
  if (!stopping_) return;
  const std::lock_guard<std::mutex> lock(stopping_->mutex_);
  stopping_->running_ = nullptr;
}

}  // namespace tmd::internal
