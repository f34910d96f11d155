// The weights as an algorithm wants them.
#include <atomic>
#include <cmath>
#include <cstring>

#include "half.hpp"
#include "tiles.hpp"

namespace rvgg {

namespace {

// Takes packed weights, numbered as in their buffer.
class Sink {
 public:
  Sink(Buffer& buffer, bool half, std::size_t first)
      : data_(reinterpret_cast<char*>(buffer.data())), half_(half), first_(first) {}
  void put(std::ptrdiff_t at, double value) {
    const auto number = static_cast<float>(value);
    const std::size_t place = first_ + static_cast<std::size_t>(at);
    if (half_) {
      const std::uint16_t half = to_half(number);
      std::memcpy(data_ + 2 * place, &half, 2);
      fits_ &= std::abs(number) <= kLargestHalf;
    } else {
      std::memcpy(data_ + 4 * place, &number, 4);
    }
  }
  bool fits() const { return fits_; }

 private:
  char* data_;
  bool half_, fits_ = true;
  std::size_t first_;
};

// The weights of one panel, [weight][input channel][output channel].
void pack_winograd(const Conv& conv, const Axes& axes, const PackedConv::Panel& panel, int width,
                   Sink& sink) {  // one weight is `panel.next` behind the other
  const int depth = conv.in_channels / conv.groups;
  const int rows = axes.rows->weights, columns = axes.columns->weights;
  for (int k = 0; k < depth; ++k) {
    for (int j = 0; j < panel.columns; ++j) {
      const float* tap = conv.weight + (std::ptrdiff_t{panel.first + j} * depth + k) * 9;
      for (int r = 0; r < rows; ++r) {
        double line[3];
        for (int x = 0; x < 3; ++x) {
          line[x] = axes.rows->taps[r][0] * tap[x] + axes.rows->taps[r][1] * tap[3 + x] +
                    axes.rows->taps[r][2] * tap[6 + x];
        }
        for (int c = 0; c < columns; ++c) {
          const double* t = axes.columns->taps[c];
          sink.put((r * columns + c) * panel.next + std::ptrdiff_t{k} * width + j,
                   line[0] * t[0] + line[1] * t[1] + line[2] * t[2]);
        }
      }
    }
  }
}

// The taps themselves, [input channel][vector][column of the kernel][row][lane].
void pack_fresh(const Conv& conv, const PackedConv::Panel& panel, int lanes, Sink& sink) {
  const int depth = conv.in_channels / conv.groups;
  for (int k = 0; k < depth; ++k) {
    for (int j = 0; j < panel.columns; ++j) {
      const float* tap = conv.weight + (std::ptrdiff_t{panel.first + j} * depth + k) * 9;
      const std::ptrdiff_t vector = std::ptrdiff_t{k} * panel.vectors + j / lanes;
      for (int x = 0; x < 3; ++x) {
        for (int y = 0; y < 3; ++y) sink.put(((vector * 3 + x) * 3 + y) * lanes + j % lanes, tap[3 * y + x]);
      }
    }
  }
}

void pack_direct(const Conv& conv, const PackedConv::Panel& panel, int width, Sink& sink) {
  const int depth = conv.in_channels / conv.groups;
  const int taps = conv.taps();
  for (int tap = 0; tap < taps; ++tap) {
    for (int k = 0; k < depth; ++k) {
      for (int j = 0; j < panel.columns; ++j) {
        sink.put((std::ptrdiff_t{tap} * depth + k) * width + j,
                 conv.weight[(std::ptrdiff_t{panel.first + j} * depth + k) * taps + tap]);
      }
    }
  }
}

}  // namespace

PackedConv::PackedConv(const Isa& isa, const Conv& conv, const Algorithm& algorithm, Pool& pool)
    : conv_(conv) {
  const int outputs = conv.out_channels / conv.groups;
  const int depth = conv.in_channels / conv.groups;
  const Axes axes = algorithm.winograd() ? axes_of(isa, conv, algorithm) : Axes{};
  const bool by_points = algorithm.winograd() && algorithm.order == Order::points;
  const bool keeps = algorithm.winograd() && keeps_weights(algorithm.order);
  const int weights = algorithm.winograd() && !keeps ? axes.rows->weights * axes.columns->weights
                                                        : conv.taps();
  std::size_t size = 0, biases = 0;
  for (int group = 0; group < conv.groups; ++group) {
    for (int first = 0; first < outputs;) {
      const int columns = std::min(outputs - first, algorithm.vectors * isa.lanes);
      const int vectors = divide_up(columns, isa.lanes);
      const std::size_t one = static_cast<std::size_t>(depth * vectors * isa.lanes);
      panels_.push_back({group, group * outputs + first, columns, vectors, size, biases,
                         static_cast<std::ptrdiff_t>(one)});
      size += by_points ? one : one * static_cast<std::size_t>(weights);
      biases += static_cast<std::size_t>(vectors * isa.lanes);
      first += columns;
    }
  }
  if (by_points) {  // all panels of one weight, then those of the next
    for (Panel& panel : panels_) panel.next = static_cast<std::ptrdiff_t>(size);
    size *= static_cast<std::size_t>(weights);
  }
  weights_ = Buffer(conv.half ? (size + 1) / 2 : size);
  bias_ = Buffer(biases);
  for (const Panel& panel : panels_) {
    std::copy_n(conv.bias + panel.first, panel.columns, bias_.data() + panel.bias);
  }
  std::atomic<bool> fits{true};
  pool.each(static_cast<std::int64_t>(panels_.size()), [&](int, std::int64_t item) {
    const Panel& panel = panels_[static_cast<std::size_t>(item)];
    Sink sink(weights_, conv.half, panel.weights);
    if (keeps) {
      pack_fresh(conv, panel, isa.lanes, sink);
    } else if (algorithm.winograd()) {
      pack_winograd(conv, axes, panel, panel.vectors * isa.lanes, sink);
    } else {
      pack_direct(conv, panel, panel.vectors * isa.lanes, sink);
    }
    if (!sink.fits()) fits = false;
  });
  if (!fits) {
    throw Error("weights: a convolution of " + std::to_string(conv.in_channels) + " to " +
                std::to_string(conv.out_channels) +
                " channels has one beyond 65504, the range of half precision; fp32 needed");
  }
}

}  // namespace rvgg
