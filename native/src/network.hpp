// What is computed: a list of operations, each on the results of earlier ones.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv.hpp"

namespace rvgg {

enum class Kind : std::uint32_t {
  input = 0,     // images
  conv = 1,      // 3x3 or 1x1 convolution
  pool = 2,      // means over bins x bins parts of the map (1: the whole map)
  upsample = 3,  // bilinear, corners aligned or not, to the size of a second map
  concat = 4,    // channels of several maps, one after the other
};

struct Node {
  Kind kind = Kind::input;
  std::string name;
  std::vector<int> inputs;  // earlier nodes
  Conv conv;                // its weights belong to the network
  int bins = 1;
  bool align_corners = false;
};

struct Shape {
  int height, width, channels;
};

// Of the bytes of a file behind its header: finds accidents and careless changes.
std::uint64_t checksum(const unsigned char* data, std::size_t size);

// The bytes of a file or of the heap that weights point into.
using Storage = std::shared_ptr<const void>;

class Network {
 public:
  std::vector<Node> nodes;          // node 0 is the input, the last one the output
  int in_channels = 3;
  std::vector<float> mean, deviation;  // of each channel, for images of bytes: (x / 255 - mean) / deviation
  std::vector<std::string> class_names;
  std::vector<Storage> storage;

  // Throws Error, naming the node.
  void check() const;
  // Of every node's result, for images of this size. Throws Error.
  std::vector<Shape> shapes(int height, int width) const;

  void save(const std::string& path) const;
  // Checks the file whole: size, checksum, and every number in it. The weights stay in the file.
  static Network load(const std::string& path);
};

}  // namespace rvgg
