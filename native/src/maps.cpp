#include "maps.hpp"

#include <algorithm>

namespace rvgg {

namespace {

// The two neighbours of a place in one dimension, and the weight of the second.
struct Between {
  int first, second;
  float weight;
};
Between between(int place, int out, int in, bool align_corners) {
  double at = align_corners ? (out > 1 ? place * (in - 1.0) / (out - 1.0) : 0.0)
                            : std::max(0.0, (place + 0.5) * in / out - 0.5);
  const int first = std::min(static_cast<int>(at), in - 1);
  return {first, std::min(first + 1, in - 1), static_cast<float>(at - first)};
}

}  // namespace

void clear_border(const Map& map, const Border& border, Pool& pool) {
  if (border == Border{}) return;
  const int rows = border.top + map.height + border.bottom;
  const std::ptrdiff_t left = border.left * map.pixel, right = border.right * map.pixel;
  const int parts = map.images < 2 * pool.threads() ? 2 : 1;
  pool.each(std::int64_t{map.images} * parts, [&](int, std::int64_t item) {
    const std::int64_t part = item % parts;
    float* row = map.data + item / parts * map.image - border.top * map.row - left;
    const std::int64_t begin = part * rows / parts, end = (part + 1) * rows / parts;
    for (std::int64_t y = begin; y < end; ++y) {
      float* line = row + y * map.row;
      if (y < border.top || y >= border.top + map.height) {
        std::fill_n(line, map.row, 0.0f);
      } else {
        std::fill_n(line, left, 0.0f);
        std::fill_n(line + map.row - right, right, 0.0f);
      }
    }
  });
}

void pool_bins(const Isa& isa, const Map& input, const Map& output, int bins, Pool& pool) {
  pool.each(std::int64_t{input.images} * bins * bins, [&](int, std::int64_t item) {
    const std::int64_t image = item / (bins * bins);
    const int y = static_cast<int>(item / bins % bins), x = static_cast<int>(item % bins);
    // As torch's adaptive pooling: from floor(y H / bins) to ceil((y + 1) H / bins).
    const int top = y * input.height / bins, bottom = divide_up((y + 1) * input.height, bins);
    const int left = x * input.width / bins, right = divide_up((x + 1) * input.width, bins);
    isa.pool(input.data + image * input.image + top * input.row + left * input.pixel, input.pixel,
             input.row, bottom - top, right - left, round_up(input.channels, isa.lanes),
             output.data + image * output.image + y * output.row + x * output.pixel);
  });
}

void upsample(const Map& input, const Map& output, bool align_corners, Pool& pool) {
  pool.each(std::int64_t{output.images} * output.height, [&](int, std::int64_t item) {
    const std::int64_t image = item / output.height;
    const int y = static_cast<int>(item % output.height);
    const Between v = between(y, output.height, input.height, align_corners);
    const float* top = input.data + image * input.image + v.first * input.row;
    const float* bottom = input.data + image * input.image + v.second * input.row;
    for (int x = 0; x < output.width; ++x) {
      const Between h = between(x, output.width, input.width, align_corners);
      const std::ptrdiff_t left = h.first * input.pixel, right = h.second * input.pixel;
      float* to = output.data + image * output.image + y * output.row + x * output.pixel;
      for (int c = 0; c < output.pixel; ++c) {
        const float above = top[left + c] + h.weight * (top[right + c] - top[left + c]);
        const float below = bottom[left + c] + h.weight * (bottom[right + c] - bottom[left + c]);
        to[c] = above + v.weight * (below - above);
      }
    }
  });
}

void append_channels(const Map& input, const Map& output, int behind, Pool& pool) {
  pool.each(std::int64_t{output.images} * output.height, [&](int, std::int64_t item) {
    const std::int64_t image = item / output.height, y = item % output.height;
    for (int x = 0; x < output.width; ++x) {
      std::copy_n(input.data + image * input.image + y * input.row + x * input.pixel, input.channels,
                  output.data + image * output.image + y * output.row + x * output.pixel + behind);
    }
  });
}

}  // namespace rvgg
