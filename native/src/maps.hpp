// What a network does to maps besides convolution.
#pragma once

#include "conv.hpp"

namespace rvgg {

// Zeros around the images.
void clear_border(const Map& map, const Border& border, Pool& pool);
// Means over bins x bins parts, as torch's adaptive pooling.
void pool_bins(const Isa& isa, const Map& input, const Map& output, int bins, Pool& pool);
// Bilinear, to the size of `output`.
void upsample(const Map& input, const Map& output, bool align_corners, Pool& pool);
// The channels of `input` behind those that are there; `behind` is 0 for the first.
void append_channels(const Map& input, const Map& output, int behind, Pool& pool);

}  // namespace rvgg
