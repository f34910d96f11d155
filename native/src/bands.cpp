#include "bands.hpp"

#include <algorithm>

namespace rvgg {

Bands::Bands(const Isa& isa, std::vector<Layer> layers, int rows, int threads)
    : isa_(isa),
      layers_(std::move(layers)),
      rows_(rows),
      height_(layers_.back().packed->conv().out_size(layers_.back().height)) {
  for (const Layer& layer : layers_) {
    const Conv& conv = layer.packed->conv();
    const Border edge = border(isa, conv, layer.algorithm, layer.height, layer.width);
    // Images keep their few channels, as in a plan.
    const int pixel = strips_.empty() ? conv.in_channels : round_up(conv.in_channels, isa.lanes);
    strips_.push_back({pixel, conv.padding(), edge.left,
                       std::ptrdiff_t{pixel} * (edge.left + layer.width + edge.right)});
  }
  for (int i = 0; i < bands(); ++i) {
    const std::vector<Pass> all = passes(band(i));
    for (std::size_t l = 0; l < all.size(); ++l) {
      const int end = std::max(all[l].last, all[l].input.end);
      strips_[l].rows = std::max(strips_[l].rows, strips_[l].top + end - all[l].input.begin);
    }
  }
  for (int i = 0; i < threads; ++i) {
    Lane& lane = lanes_.emplace_back();
    for (const Strip& strip : strips_) {
      lane.strips.emplace_back(static_cast<std::size_t>(strip.rows * strip.row) + 64);
    }
  }
}

int Bands::bands() const { return divide_up(height_, rows_); }

Bands::Range Bands::band(int index) const {
  return {index * rows_, std::min((index + 1) * rows_, height_)};
}

// From the last layer to the first.
std::vector<Bands::Pass> Bands::passes(Range rows) const {
  std::vector<Pass> result(layers_.size());
  for (std::size_t l = layers_.size(); l-- > 0;) {
    const Layer& layer = layers_[l];
    const Conv& conv = layer.packed->conv();
    Pass& pass = result[l];
    pass.output = rows;
    pass.input = {std::max(0, rows.begin * conv.stride - conv.padding()),
                  std::min(layer.height, (rows.end - 1) * conv.stride + conv.padding() + 1)};
    const int first = rows.begin * conv.stride;
    pass.height = std::min(rows.size() * conv.stride, layer.height - first);
    pass.last = first + pass.height +
                border(isa_, conv, layer.algorithm, pass.height, layer.width).bottom;
    rows = pass.input;
  }
  return result;
}

void Bands::pass(Lane& lane, const Read& read, int image, Range rows, const Map& output) const {
  const std::vector<Pass> all = passes(rows);
  const auto at = [&](std::size_t l, int y) {
    const Strip& strip = strips_[l];
    return lane.strips[l].data() + (strip.top + y - all[l].input.begin) * strip.row +
           strip.left * strip.pixel;
  };
  for (int y = all[0].input.begin; y < all[0].input.end; ++y) read(image, y, at(0, y));
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const Layer& layer = layers_[l];
    const Conv& conv = layer.packed->conv();
    const Pass& here = all[l];
    // What an earlier band left there; the rows above the image are never written.
    for (int y = here.input.end; y < here.last; ++y) {
      std::fill_n(at(l, y) - strips_[l].left * strips_[l].pixel, strips_[l].row, 0.0f);
    }
    const Map from{at(l, here.output.begin * conv.stride), 1, here.height, layer.width,
                   conv.in_channels, strips_[l].pixel, strips_[l].row, 0};
    Map to = output;
    to.images = 1;
    to.height = here.output.size();
    if (l + 1 == layers_.size()) {
      to.data += image * output.image + here.output.begin * output.row;
    } else {
      to = {at(l + 1, here.output.begin), 1, here.output.size(), layers_[l + 1].width,
            conv.out_channels, strips_[l + 1].pixel, strips_[l + 1].row, 0};
    }
    rvgg::run(isa_, *layer.packed, layer.algorithm, from, to, lane.alone, lane.scratch);
  }
}

void Bands::run(const Read& read, const Map& output, Pool& pool) {
  const int count = bands();
  pool.each(std::int64_t{output.images} * count, [&](int thread, std::int64_t item) {
    pass(lanes_[static_cast<std::size_t>(thread)], read, static_cast<int>(item / count),
         band(static_cast<int>(item % count)), output);
  });
}

std::size_t Bands::bytes() const {
  std::size_t sum = 0;
  for (const Lane& lane : lanes_) {
    sum += lane.scratch.bytes();
    for (const Buffer& strip : lane.strips) sum += strip.bytes();
  }
  return sum;
}

}  // namespace rvgg
