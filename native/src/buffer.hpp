// Memory on large pages, zeroed, aligned to a cache line.
#pragma once

#include <cstddef>
#include <memory>

namespace rvgg {

class Buffer {
 public:
  Buffer() = default;
  // `floats` numbers, all zero. Throws std::bad_alloc.
  explicit Buffer(std::size_t floats);
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer();

  float* data() { return data_; }
  const float* data() const { return data_; }
  std::size_t size() const { return size_; }
  std::size_t bytes() const { return bytes_; }
  // At least `floats` numbers; what was there is lost.
  void reserve(std::size_t floats) {
    if (floats > size_) *this = Buffer(floats);
  }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(bytes_, other.bytes_);
  }
  float* data_ = nullptr;
  std::size_t size_ = 0, bytes_ = 0;
};

}  // namespace rvgg
