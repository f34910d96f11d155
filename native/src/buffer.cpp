#include "buffer.hpp"

#include <sys/mman.h>

#include <new>

namespace rvgg {

namespace {
constexpr std::size_t kLargePage = std::size_t{2} << 20;
}

Buffer::Buffer(std::size_t floats) : size_(floats) {
  if (!floats) return;
  if (floats > PTRDIFF_MAX / sizeof(float)) throw std::bad_alloc();
  const bool large = floats * sizeof(float) >= kLargePage / 2;
  const std::size_t page = large ? kLargePage : 4096;
  bytes_ = (floats * sizeof(float) + page - 1) / page * page;
  void* memory = nullptr;
  if (large) {
    // Twice a large page more than needed, so that a part of it can begin at one.
    memory = mmap(nullptr, bytes_ + kLargePage, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    auto* begin = static_cast<char*>(memory);
    const auto address = reinterpret_cast<std::size_t>(begin);
    const std::size_t before = (kLargePage - address % kLargePage) % kLargePage;
    if (before) munmap(begin, before);
    if (before < kLargePage) munmap(begin + before + bytes_, kLargePage - before);
    memory = begin + before;
#ifdef MADV_HUGEPAGE
    madvise(memory, bytes_, MADV_HUGEPAGE);  // a wish: without it all still works
#endif
  } else {
    memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
  }
  data_ = static_cast<float*>(memory);
}

Buffer::~Buffer() {
  if (data_) munmap(data_, bytes_);
}

}  // namespace rvgg
