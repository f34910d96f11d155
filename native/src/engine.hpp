// Runs a network: plans for the batch sizes and image sizes that come, weights as each algorithm
// wants them, threads.
#pragma once

#include <list>
#include <map>
#include <memory>
#include <mutex>

#include "bands.hpp"
#include "network.hpp"
#include "plan.hpp"
#include "tune.hpp"

namespace rvgg {

struct Options {
  int threads = 0;   // 0: as many as this process may use
  bool pin = false;  // each thread to a core of its own
  Tuning tuning = Tuning::fast;
  bool half = false;  // weights in half precision; the arithmetic stays in single
  bool compact = false;  // transformed weights are never kept: less memory, more work
  std::string isa;   // "": the best that the processor has, or RVGG_ISA of the environment
  std::string algorithm;  // for tests: of every layer that it can compute, as `Tuner` writes it
  int band_rows = -1;     // for tests: of the first layers, 0 for none; -1: as is best
};

enum class Format {
  bytes,   // uint8 (N, H, W, C), to be normalized
  floats,  // fp32 (N, C, H, W), normalized
};

// A batch, in any order of memory: the distances are in elements.
struct Images {
  const void* data;
  Format format;
  int count, height, width;
  std::ptrdiff_t image, channel, row, pixel;

  static Images contiguous(const void* data, Format format, int count, int height, int width,
                           int channels) {
    const std::ptrdiff_t plane = std::ptrdiff_t{height} * width, all = plane * channels;
    if (format == Format::floats) return {data, format, count, height, width, all, plane, width, 1};
    return {data, format, count, height, width, all, 1, std::ptrdiff_t{width} * channels, channels};
  }
};

// What one layer took, or the first ones together where they are computed band by band.
struct Step {
  std::string name, algorithm;
  Shape shape;
  double milliseconds, multiply_adds, multiplications;  // of a direct convolution, of this one
  std::size_t weight_bytes;
};

class Engine {
 public:
  // Throws Error.
  Engine(Network network, const Options& options);

  const Network& network() const { return network_; }
  const Isa& isa() const { return isa_; }
  int threads() const { return pool_.threads(); }
  // Of the result for images of this size.
  Shape output_shape(int height, int width) const { return network_.shapes(height, width).back(); }

  // result: fp32 (N, C, H, W) of `output_shape`. Several threads may call this at once; they take
  // turns. Throws Error, std::bad_alloc.
  void run(const Images& images, float* result);
  // The same on zeros, with the time of each layer: the least of `repeats`.
  std::vector<Step> profile(int count, int height, int width, int repeats);

  Tuner& tuner() { return tuner_; }
  // Bytes of transformed weights, of the maps of the plans in use, and of the threads' scratch.
  struct Memory {
    std::size_t weights, activations, scratch;
  };
  Memory memory();

 private:
  struct Ready {  // a plan with its memory
    Plan plan;
    std::vector<std::shared_ptr<PackedConv>> packed;  // of each node
    Buffer arena;
    std::unique_ptr<Bands> bands;
  };
  Ready& prepare(int count, int height, int width);
  Ready make(int count, int height, int width, int banded);
  Ready with_or_without_bands(int count, int height, int width);
  int rows_of_a_band(const Plan& plan) const;
  std::shared_ptr<PackedConv> pack(int node, const Algorithm& algorithm);
  // The nodes up to `last`. seconds: of each node, added up; or null.
  void execute(Ready& ready, const Images& images, int last, double* seconds);
  void run_node(Ready& ready, const Images& images, int node, int first, int count);
  void read_row(const Images& images, std::int64_t image, std::int64_t y, float* row) const;
  void write_result(Ready& ready, float* result);
  std::vector<Step> steps_of(const Ready& ready, const std::vector<double>& seconds) const;

  Network network_;
  std::vector<float> scale_, shift_;  // from a byte to the normalized number
  int band_rows_;
  const Isa& isa_;
  Pool pool_;
  Tuner tuner_;
  Scratch scratch_;
  std::mutex mutex_;
  std::list<Ready> plans_;  // the one used last first
  std::map<std::pair<int, std::string>, std::weak_ptr<PackedConv>> packed_;
};

}  // namespace rvgg
