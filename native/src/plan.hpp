// For one batch size and image size: which algorithm computes each layer, and where each result
// lies in memory.
#pragma once

#include <functional>
#include <vector>

#include "network.hpp"

namespace rvgg {

// The algorithm for a convolution of `images` maps of this size.
using Choose = std::function<Algorithm(const Conv&, int images, int height, int width)>;

// A result: its shape, its border, and its place.
struct Place {
  Shape shape{};
  Border border;
  int pixel = 0;           // distance of pixels, in floats
  int images = 0;          // as many as are in memory at once
  std::size_t offset = 0;  // in the arena, in floats

  std::ptrdiff_t row() const {
    return std::ptrdiff_t{pixel} * (border.left + shape.width + border.right);
  }
  std::ptrdiff_t image() const { return row() * (border.top + shape.height + border.bottom); }
  std::size_t floats() const { return static_cast<std::size_t>(image()) * static_cast<std::size_t>(images); }
  // Images [first, first + count) of those in memory.
  Map map(float* arena, int first, int count) const;
};

// Consecutive nodes that are computed for a few images at a time, so that their maps stay in the
// cache; the result of the last is kept for all images.
struct Segment {
  int first, last, images;
};

struct Plan {
  int images, height, width;
  int banded;  // so many of the first nodes are computed band by band; 0 if none
  std::vector<Place> places;          // of each node
  std::vector<Algorithm> algorithms;  // of each node; meaningless where it is no convolution
  std::vector<Segment> segments;
  std::size_t arena = 0;  // floats
};

// How many of the first nodes can be computed band by band: the images and two convolutions; else 0.
int bandable(const Network& network);

// `cache`: bytes that the maps of one segment may take. `banded`: 0, or what `bandable` says; the
// results between these nodes have no place.
Plan make_plan(const Network& network, const Isa& isa, int images, int height, int width,
               int banded, std::size_t cache, const Choose& choose);

}  // namespace rvgg
