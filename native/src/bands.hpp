// The first convolutions of a network, band by band: a thread takes a few rows of an image through
// all of them in its own cache, so that the largest maps never reach memory.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "conv.hpp"

namespace rvgg {

class Bands {
 public:
  struct Layer {
    std::shared_ptr<const PackedConv> packed;
    Algorithm algorithm;
    int height, width;  // of its input
  };
  // Writes row y of an image, normalized, one pixel after the other.
  using Read = std::function<void(int image, int y, float* row)>;

  // `rows` of the last result are made at a time. With whole tiles there, and direct convolutions
  // before, the results are those of whole maps to the last bit.
  Bands(const Isa& isa, std::vector<Layer> layers, int rows, int threads);

  // Throws std::bad_alloc.
  void run(const Read& read, const Map& output, Pool& pool);
  std::size_t bytes() const;

 private:
  struct Range {
    int begin, end;
    int size() const { return end - begin; }
  };
  // Of one layer: rows of its result, and of its input those that hold numbers; behind them it
  // reads zeros up to `last`.
  struct Pass {
    Range output, input;
    int height, last;  // of the input that makes just these results
  };
  // Where the rows of the input of a layer stand.
  struct Strip {
    int pixel, top, left;
    std::ptrdiff_t row;
    int rows = 0;
  };
  struct Lane {  // of one thread
    std::vector<Buffer> strips;
    Scratch scratch;
    Pool alone{1};
  };

  int bands() const;
  Range band(int index) const;
  std::vector<Pass> passes(Range rows) const;
  void pass(Lane& lane, const Read& read, int image, Range rows, const Map& output) const;

  const Isa& isa_;
  std::vector<Layer> layers_;
  int rows_, height_;  // of a band, of the result
  std::vector<Strip> strips_;
  std::deque<Lane> lanes_;
};

}  // namespace rvgg
