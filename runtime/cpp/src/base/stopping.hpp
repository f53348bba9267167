// Ending a call while an engine is deep in a graph: from another thread, or from a handler of a signal. The twin of
// tmd_engines.device.running.
//
// A handler may do next to nothing, and an engine's own call to stop is not among it. So a thread waits beside each
// context that runs something, and stops the graph in its place.
#pragma once

#include <pthread.h>
#include <semaphore.h>

#include <atomic>
#include <cstdint>
#include <mutex>

namespace tmd::internal {

// What another thread can stop; stopping what does not run does nothing.
class Stoppable {
 public:
  virtual void stop() noexcept = 0;

 protected:
  ~Stoppable() = default;
};

// Of one context: its call, what that is running, and the thread that waits.
class Stopping {
 public:
  Stopping() noexcept;
  Stopping(const Stopping&) = delete;
  ~Stopping();  // no call may be running

  // Stops the call that is running; without one, nothing happens. Also for handlers of signals.
  void ask() noexcept;
  bool asked() const noexcept { return asked_.load() == call_.load(); }

 private:
  friend class StoppableCall;
  friend class Running;
  void begin();
  void end() noexcept { ++call_; }
  void watch() noexcept;

  static constexpr std::uint64_t kNever = 0;
  std::atomic<std::uint64_t> call_{2}, asked_{kNever};  // odd: the number of the call that is running
  std::mutex mutex_;
  Stoppable* running_ = nullptr;
  sem_t wake_;
  pthread_t thread_;
  bool has_thread_ = false;
  std::atomic<bool> closing_{false};
};

// A call of this thread, for its lifetime. Throws std::bad_alloc where the waiting thread cannot be started.
class StoppableCall {
 public:
  explicit StoppableCall(Stopping& stopping);
  StoppableCall(const StoppableCall&) = delete;
  ~StoppableCall();

 private:
  Stopping& stopping_;
  Stopping* before_;
};

// Whether this thread's call was asked to stop.
bool was_stopped() noexcept;

// Throws Error(CANCELLED) if it was.
void check_stopped();

// Says that this thread's call runs `work`, for its lifetime. Throws Error(CANCELLED) if it was asked to stop before.
class Running {
 public:
  explicit Running(Stoppable& work);
  Running(const Running&) = delete;
  ~Running() { leave(); }

 private:
  void leave() noexcept;
  Stopping* stopping_;
};

}  // namespace tmd::internal
