// A 3x3 or 1x1 convolution with bias, with or without ReLU: geometry, algorithms, execution.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffer.hpp"
#include "kernels.hpp"
#include "pool.hpp"

namespace rvgg {

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr int divide_up(int value, int divisor) { return (value + divisor - 1) / divisor; }

// A message for the user: what was found, and what is needed.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Zeros around each image, in pixels.
struct Border {
  int top = 0, bottom = 0, left = 0, right = 0;
  bool operator==(const Border&) const = default;
};

// Activations of a batch: pixel after pixel, channels innermost, padded to whole vectors.
struct Map {
  float* data = nullptr;  // channel 0 of the first pixel of the first image, inside the border
  int images = 0, height = 0, width = 0, channels = 0;
  std::ptrdiff_t pixel = 0, row = 0, image = 0;  // distances, in floats
};

struct Conv {
  int in_channels = 0, out_channels = 0, groups = 1, stride = 1, dilation = 1;
  int kernel = 3;  // or 1
  bool relu = true;
  bool half = false;  // its weights are packed in half precision
  const float* weight = nullptr;  // [out][in / groups][kernel][kernel]
  const float* bias = nullptr;    // [out]

  int taps() const { return kernel * kernel; }
  int padding() const { return kernel / 2 * dilation; }
  int out_size(int size) const { return divide_up(size, stride); }
};

// Who does what of a Winograd convolution.
enum class Order {
  blocks,  // each thread takes a block of tiles and does all with it, in its own cache
  panels,  // all transform the input; then each takes output channels, so that weights pass once
  points,  // all transform the input; each takes points of the tiles; all transform the output
  fresh,   // as panels, but weights are kept as they are and transformed each time: a ninth to a
           // quarter of the memory, and of what has to come from it
  fused,   // as fresh, but half transformed alone, and the rest in the registers: for few tiles
};

// Whether the weights stay as they are.
inline bool keeps_weights(Order order) { return order == Order::fresh || order == Order::fused; }

// How a convolution is computed. With `rows` 0 directly, else by Winograd tiles of that many
// output rows and columns.
struct Algorithm {
  int rows = 0, columns = 0;
  int vectors = 2;  // width of the register tile
  int block = 12;   // tiles (directly: pixels) that are taken together
  Order order = Order::blocks;

  bool winograd() const { return rows != 0; }
  std::string name() const;  // of the tile
  bool operator==(const Algorithm&) const = default;
};

// Whether `algorithm` can compute `conv` with these kernels.
bool applicable(const Isa& isa, const Conv& conv, const Algorithm& algorithm);
// What the algorithm reads around an input of this size.
Border border(const Isa& isa, const Conv& conv, const Algorithm& algorithm, int height, int width);
// Multiply-adds that the algorithm does for one image, transforms not counted.
double multiplications(const Isa& isa, const Conv& conv, const Algorithm& algorithm, int height,
                       int width);

// The weights as an algorithm wants them.
class PackedConv {
 public:
  // Throws Error where a weight is beyond the range of half precision.
  PackedConv(const Isa& isa, const Conv& conv, const Algorithm& algorithm, Pool& pool);

  // A part of the output channels of one group, as wide as a register tile.
  struct Panel {
    int group, first, columns, vectors;
    std::size_t weights, bias;  // offsets
    std::ptrdiff_t next;        // from one weight of the tile to the next
  };
  const std::vector<Panel>& panels() const { return panels_; }
  const void* weights(const Panel& panel) const {
    const std::size_t size = conv_.half ? sizeof(std::uint16_t) : sizeof(float);
    return reinterpret_cast<const char*>(weights_.data()) + panel.weights * size;
  }
  const float* bias(const Panel& panel) const { return bias_.data() + panel.bias; }
  const Conv& conv() const { return conv_; }
  std::size_t bytes() const { return weights_.bytes() + bias_.bytes(); }

 private:
  Conv conv_;
  std::vector<Panel> panels_;
  Buffer weights_, bias_;
};

// Memory that the threads need while they work; grows as needed and is kept.
struct Scratch {
  std::vector<Buffer> of_thread;
  Buffer shared;
  std::size_t bytes() const;
};

// input -> output, which both have their borders; the input's is zero.
void run(const Isa& isa, const PackedConv& packed, const Algorithm& algorithm, const Map& input,
         const Map& output, Pool& pool, Scratch& scratch);

}  // namespace rvgg
