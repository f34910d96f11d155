// Threads that wait for work: the caller is one of them.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace rvgg {

class Pool {
 public:
  // `threads` in all, the calling one included; pinned to a core each if asked to.
  explicit Pool(int threads, bool pin = false);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls work(index of the thread) on each thread; returns when all have, and throws what the
  // first of them threw. One caller at a time.
  template <class Work>
  void run(const Work& work) {
    run([](const void* w, int thread) { (*static_cast<const Work*>(w))(thread); }, &work);
  }

  // While this lives the threads stay awake between one `run` and the next.
  class Awake {
   public:
    explicit Awake(Pool& pool) : pool_(pool) { pool_.awake_.fetch_add(1); }
    ~Awake() { pool_.awake_.fetch_sub(1); }
    Awake(const Awake&) = delete;
    Awake& operator=(const Awake&) = delete;

   private:
    Pool& pool_;
  };

  // work(thread, item) for every item from 0 to count - 1, each taken by whoever is free.
  template <class Work>
  void each(std::int64_t count, const Work& work) {
    if (count <= 0) return;
    std::atomic<std::int64_t> next{0};
    run([&](int thread) {
      for (;;) {
        const std::int64_t item = next.fetch_add(1, std::memory_order_relaxed);
        if (item >= count) return;
        work(thread, item);
      }
    });
  }

 private:
  using Call = void (*)(const void*, int);
  void run(Call call, const void* work);
  void attempt(int thread) noexcept;
  void loop(int thread);

  std::vector<std::thread> workers_;
  alignas(64) std::atomic<std::uint32_t> round_{0};
  alignas(64) std::atomic<std::int32_t> busy_{0};
  Call call_ = nullptr;
  const void* work_ = nullptr;
  std::mutex error_mutex_;
  std::exception_ptr error_;
  std::atomic<bool> stop_{false};
  std::atomic<int> awake_{0};
};

}  // namespace rvgg
