// How Winograd tiles lie in a map, and what the two files that compute convolutions share.
#pragma once

#include <algorithm>

#include "conv.hpp"

namespace rvgg {

struct Axes {
  const Axis* rows;
  const Axis* columns;
};
inline Axes axes_of(const Isa& isa, const Conv& conv, const Algorithm& algorithm) {
  return {isa.axis(algorithm.rows, conv.stride), isa.axis(algorithm.columns, conv.stride)};
}

// One dimension of a dilated convolution is `dilation` dense ones, interleaved: phase after phase.
inline int phase_size(int size, int dilation, int phase) { return divide_up(size - phase, dilation); }

inline int overhang(const Conv& conv, const Axis& axis, int size) {
  int last = size - 1;
  for (int phase = 0; phase < std::min(conv.dilation, size); ++phase) {
    const int outputs = conv.out_size(phase_size(size, conv.dilation, phase));
    const int tiles = divide_up(outputs, axis.outputs);
    const int end = (tiles - 1) * axis.step - 1 + axis.inputs - 1;
    last = std::max(last, phase + end * conv.dilation);
  }
  return last - (size - 1);
}

// The tiles of one dimension, phase after phase.
struct TileLine {
  struct Tile {
    int input, output, items;  // first coordinate read, first written, how many are valid
  };
  std::vector<Tile> tiles;
  TileLine(const Conv& conv, const Axis& axis, int size) {
    for (int phase = 0; phase < std::min(conv.dilation, size); ++phase) {
      const int outputs = conv.out_size(phase_size(size, conv.dilation, phase));
      for (int first = 0; first < outputs; first += axis.outputs) {
        tiles.push_back({phase + (first * conv.stride - 1) * conv.dilation,
                         phase + first * conv.dilation,
                         std::min(axis.outputs, outputs - first)});
      }
    }
  }
  int size() const { return static_cast<int>(tiles.size()); }
};

// Behind the last channel whole vectors may be stored, as far as the pixel goes: nobody reads what
// pads the channels. Between the groups they may not.
inline int stored_columns(const Isa& isa, const Conv& conv, const PackedConv::Panel& panel,
                   const Map& output) {
  if (panel.first + panel.columns < conv.out_channels) return panel.columns;
  return std::min(round_up(panel.columns, isa.lanes),
                  static_cast<int>(output.pixel) - panel.first);
}

// A whole convolution by tiles.
void run_winograd(const Isa& isa, const PackedConv& packed, const Algorithm& algorithm,
                  const Map& input, const Map& output, Pool& pool, Scratch& scratch);

}  // namespace rvgg
