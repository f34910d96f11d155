#include "pool.hpp"

#include <pthread.h>

#include <utility>

namespace rvgg {

namespace {

// Waking a thread takes as long as a layer of a small network. So a thread that waits stays awake:
// at first without a pause, then letting others have the core, as long as a network is running; and
// only then it sleeps.
constexpr int kSpins = 4000;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Value, class Done>
void wait_until(std::atomic<Value>& value, const std::atomic<int>& awake, const Done& done) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (done(value.load(std::memory_order_acquire))) return;
    relax();
  }
  for (;;) {
    const Value seen = value.load(std::memory_order_acquire);
    if (done(seen)) return;
    if (awake.load(std::memory_order_relaxed)) {
      std::this_thread::yield();
    } else {
      value.wait(seen, std::memory_order_acquire);
    }
  }
}

void pin_to(std::thread& thread, int core) {
#ifdef __linux__
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
  for (int cpu = 0, index = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || index++ != core) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    pthread_setaffinity_np(thread.native_handle(), sizeof one, &one);
  }
#endif
}

}  // namespace

Pool::Pool(int threads, bool pin) {
  for (int i = 1; i < threads; ++i) {
    workers_.emplace_back([this, i] { loop(i); });
    if (pin) pin_to(workers_.back(), i);
  }
}

Pool::~Pool() {
  stop_.store(true);
  round_.fetch_add(1);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::run(Call call, const void* work) {
  if (workers_.empty()) return call(work, 0);
  call_ = call;
  work_ = work;
  busy_.store(static_cast<std::int32_t>(workers_.size()), std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  attempt(0);
  wait_until(busy_, awake_, [](std::int32_t busy) { return busy == 0; });
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Pool::attempt(int thread) noexcept {
  try {
    call_(work_, thread);
  } catch (...) {
    const std::lock_guard lock(error_mutex_);
    if (!error_) error_ = std::current_exception();
  }
}

void Pool::loop(int thread) {
  std::uint32_t seen = 0;
  for (;;) {
    wait_until(round_, awake_, [seen](std::uint32_t round) { return round != seen; });
    seen = round_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    attempt(thread);
    if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_all();
  }
}

}  // namespace rvgg
