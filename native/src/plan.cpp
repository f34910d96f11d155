#include "plan.hpp"

#include <algorithm>
#include <cstdint>

namespace rvgg {

namespace {

std::size_t map_bytes(const Shape& shape) {
  return sizeof(float) * static_cast<std::size_t>(shape.height) *
         static_cast<std::size_t>(shape.width) * static_cast<std::size_t>(shape.channels);
}

// How many of the first nodes form a chain in which each takes the result of the one before only.
int chain_length(const Network& network) {
  const int nodes = static_cast<int>(network.nodes.size());
  int length = 1;
  while (length < nodes) {
    const std::vector<int>& inputs = network.nodes[static_cast<std::size_t>(length)].inputs;
    if (inputs.size() != 1 || inputs[0] != length - 1) break;
    ++length;
  }
  // A result that is taken again later has to be there for all images.
  for (int i = length; i < nodes; ++i) {
    for (int input : network.nodes[static_cast<std::size_t>(i)].inputs) {
      if (input < length - 1) length = input + 1;
    }
  }
  return length;
}

std::vector<Segment> make_segments(const Network& network, const std::vector<Shape>& shapes,
                                   int images, int banded, std::size_t cache) {
  const int nodes = static_cast<int>(network.nodes.size());
  const int chain = chain_length(network);
  std::vector<Segment> segments;
  for (int i = 0; i < nodes; ++i) {
    int fitting = images;
    if (i < chain && i >= banded - 1) {
      std::size_t bytes = map_bytes(shapes[static_cast<std::size_t>(i)]);
      if (i >= banded) bytes += map_bytes(shapes[static_cast<std::size_t>(std::max(i - 1, 0))]);
      fitting = static_cast<int>(
          std::clamp<std::size_t>(cache / bytes, 1, static_cast<std::size_t>(images)));
    }
    if (!segments.empty() && (fitting < 2 * segments.back().images || segments.back().images == images)) {
      segments.back().last = i;
      segments.back().images = std::min(segments.back().images, fitting);
    } else {
      segments.push_back({i, i, fitting});
    }
  }
  for (Segment& segment : segments) {  // evenly: 16 + 16, not 20 + 12
    segment.images = divide_up(images, divide_up(images, segment.images));
  }
  return segments;
}

// From the node that writes a result to the last that reads it; a segment's input and output live
// as long as the whole segment works, since it runs several times.
struct Life {
  int begin, end;
  bool overlaps(const Life& other) const { return begin <= other.end && other.begin <= end; }
};

std::vector<Life> lives(const Network& network, const std::vector<Segment>& segments) {
  std::vector<Life> result;
  const auto segment_of = [&](int node) {
    return *std::find_if(segments.begin(), segments.end(),
                         [node](const Segment& s) { return node <= s.last; });
  };
  const int nodes = static_cast<int>(network.nodes.size());
  for (int i = 0; i < nodes; ++i) {
    const Segment own = segment_of(i);
    result.push_back({i == own.last ? own.first : i, i});
    for (int input : network.nodes[static_cast<std::size_t>(i)].inputs) {
      Life& life = result[static_cast<std::size_t>(input)];
      life.end = std::max(life.end, input < own.first ? own.last : i);
    }
  }
  return result;
}

// The lowest offset at which each result does not meet another that lives at the same time.
std::size_t place_all(std::vector<Place>& places, const std::vector<Life>& life) {
  std::size_t arena = 0;
  for (std::size_t i = 0; i < places.size(); ++i) {
    std::vector<std::pair<std::size_t, std::size_t>> taken;
    for (std::size_t j = 0; j < i; ++j) {
      if (life[i].overlaps(life[j])) {
        taken.emplace_back(places[j].offset, places[j].offset + places[j].floats());
      }
    }
    std::sort(taken.begin(), taken.end());
    std::size_t offset = 0;
    for (const auto& [begin, end] : taken) {
      if (offset + places[i].floats() <= begin) break;
      offset = std::max(offset, (end + 15) / 16 * 16);
    }
    places[i].offset = offset;
    arena = std::max(arena, offset + places[i].floats());
  }
  return arena;
}

void widen(Border& border, const Border& other) {
  border.top = std::max(border.top, other.top);
  border.bottom = std::max(border.bottom, other.bottom);
  border.left = std::max(border.left, other.left);
  border.right = std::max(border.right, other.right);
}

}  // namespace

Map Place::map(float* arena, int first, int count) const {
  Map map;
  map.images = count;
  map.height = shape.height;
  map.width = shape.width;
  map.channels = shape.channels;
  map.pixel = pixel;
  map.row = row();
  map.image = image();
  map.data = arena + offset + first * map.image + border.top * map.row + border.left * map.pixel;
  return map;
}

int bandable(const Network& network) {
  constexpr int count = 3;
  if (chain_length(network) < count) return 0;
  for (int i = 1; i < count; ++i) {
    const Node& node = network.nodes[static_cast<std::size_t>(i)];
    if (node.kind != Kind::conv || node.conv.dilation > 1) return 0;
  }
  return count;
}

Plan make_plan(const Network& network, const Isa& isa, int images, int height, int width,
               int banded, std::size_t cache, const Choose& choose) {
  const std::vector<Shape> shapes = network.shapes(height, width);
  Plan plan{images, height, width, banded, {}, {},
            make_segments(network, shapes, images, banded, cache), 0};
  const std::size_t nodes = network.nodes.size();
  plan.algorithms.resize(nodes);
  plan.places.resize(nodes);
  for (const Segment& segment : plan.segments) {
    for (int i = segment.first; i <= segment.last; ++i) {
      Place& place = plan.places[static_cast<std::size_t>(i)];
      place.shape = shapes[static_cast<std::size_t>(i)];
      // Images keep their few channels, so that the rows under the kernel are contiguous.
      place.pixel = i == 0 ? place.shape.channels : round_up(place.shape.channels, isa.lanes);
      place.images = i < banded - 1 ? 0 : i == segment.last ? images : segment.images;
      const Node& node = network.nodes[static_cast<std::size_t>(i)];
      if (node.kind != Kind::conv) continue;
      Place& input = plan.places[static_cast<std::size_t>(node.inputs[0])];
      Algorithm& algorithm = plan.algorithms[static_cast<std::size_t>(i)];
      algorithm = choose(node.conv, segment.images, input.shape.height, input.shape.width);
      if (input.pixel % isa.lanes) algorithm.rows = algorithm.columns = 0;
      if (i < banded && !keeps_weights(algorithm.order)) algorithm.order = Order::blocks;
      // Tiles of the layers before the last would begin elsewhere in each band.
      if (i < banded - 1) algorithm.rows = algorithm.columns = 0;
      widen(input.border, border(isa, node.conv, algorithm, input.shape.height, input.shape.width));
    }
  }
  for (std::size_t i = 0; i < nodes; ++i) {
    // The kernels count the numbers of an image in 32 bits.
    if (plan.places[i].image() > INT32_MAX) {
      throw Error("images: " + std::to_string(height) + " x " + std::to_string(width) +
                  " is too large for " + network.nodes[i].name);
    }
  }
  plan.arena = place_all(plan.places, lives(network, plan.segments));
  return plan;
}

}  // namespace rvgg
