// A convolution in double, one number at a time: the truth that the tests compare with.
#pragma once

#include <vector>

#include "conv.hpp"

namespace rvgg {

// images: (images, in_channels, height, width). Returns (images, out_channels, ., .).
inline std::vector<double> naive(const Conv& conv, const float* images, int count, int height,
                                 int width) {
  const int out_height = conv.out_size(height), out_width = conv.out_size(width);
  const int depth = conv.in_channels / conv.groups, outputs = conv.out_channels / conv.groups;
  std::vector<double> result;
  for (int n = 0; n < count; ++n) {
    for (int o = 0; o < conv.out_channels; ++o) {
      for (int y = 0; y < out_height; ++y) {
        for (int x = 0; x < out_width; ++x) {
          double sum = conv.bias[o];
          for (int c = 0; c < depth; ++c) {
            const int channel = o / outputs * depth + c;
            const float* map = images + (std::ptrdiff_t{n} * conv.in_channels + channel) * height * width;
            const float* taps = conv.weight + (std::ptrdiff_t{o} * depth + c) * conv.taps();
            for (int i = 0; i < conv.kernel; ++i) {
              for (int j = 0; j < conv.kernel; ++j) {
                const int row = y * conv.stride - conv.padding() + i * conv.dilation;
                const int column = x * conv.stride - conv.padding() + j * conv.dilation;
                if (row < 0 || row >= height || column < 0 || column >= width) continue;
                sum += static_cast<double>(taps[i * conv.kernel + j]) *
                       map[std::ptrdiff_t{row} * width + column];
              }
            }
          }
          result.push_back(conv.relu && sum < 0 ? 0.0 : sum);
        }
      }
    }
  }
  return result;
}

}  // namespace rvgg
