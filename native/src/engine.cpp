#include "engine.hpp"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include <sched.h>
#include <unistd.h>

namespace rvgg {

namespace {

constexpr std::size_t kMaxPlans = 8;
constexpr int kMaxThreads = 1024;
constexpr int kMaxImages = 1 << 16;

int usable_cores() {
#ifdef __linux__
  cpu_set_t allowed;
  if (!sched_getaffinity(0, sizeof allowed, &allowed)) return std::max(1, CPU_COUNT(&allowed));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

int checked_threads(int threads) {
  if (threads == 0) return usable_cores();
  if (threads < 0 || threads > kMaxThreads) {
    throw Error("threads: 1 to " + std::to_string(kMaxThreads) + " needed, or 0 for all cores; found " +
                std::to_string(threads));
  }
  return threads;
}

const Isa& checked_isa(std::string name) {
  if (name.empty()) {
    if (const char* wish = std::getenv("RVGG_ISA")) name = wish;
  }
  if (const Isa* isa = find_isa(name.c_str())) return *isa;
  std::string here;
  for (const Isa* const* isa = isas(); *isa; ++isa) {
    if ((*isa)->supported()) here += std::string(here.empty() ? "" : ", ") + (*isa)->name;
  }
  throw Error("isa: " + here + " can run here, found " + name);
}

// Half of the last cache for the maps; the weights need the rest.
std::size_t cache_for_maps() {
#ifdef _SC_LEVEL3_CACHE_SIZE
  const long size = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (size > 0) return static_cast<std::size_t>(size) / 2;
#endif
  return std::size_t{8} << 20;
}

// Zeros around the images.
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

// The channels of `input` behind those that are there; `behind` is 0 for the first.
void append_channels(const Map& input, const Map& output, int behind, Pool& pool) {
  pool.each(std::int64_t{output.images} * output.height, [&](int, std::int64_t item) {
    const std::int64_t image = item / output.height, y = item % output.height;
    for (int x = 0; x < output.width; ++x) {
      std::copy_n(input.data + image * input.image + y * input.row + x * input.pixel, input.channels,
                  output.data + image * output.image + y * output.row + x * output.pixel + behind);
    }
  });
}

}  // namespace

Engine::Engine(Network network, const Options& options)
    : network_(std::move(network)),
      isa_(checked_isa(options.isa)),
      pool_(checked_threads(options.threads), options.pin),
      tuner_(isa_, pool_, options.tuning) {
  network_.check();
  for (Node& node : network_.nodes) node.conv.half = options.half;
  if (!options.algorithm.empty()) tuner_.force(options.algorithm);
}

std::shared_ptr<PackedConv> Engine::pack(int node, const Algorithm& algorithm) {
  const Conv& conv = network_.nodes[static_cast<std::size_t>(node)].conv;
  std::weak_ptr<PackedConv>& slot =
      packed_[{node, algorithm.name() + (algorithm.order == Order::points ? " points " : " ") +
                         std::to_string(algorithm.vectors)}];
  std::shared_ptr<PackedConv> packed = slot.lock();
  if (!packed) slot = packed = std::make_shared<PackedConv>(isa_, conv, algorithm, pool_);
  return packed;
}

Engine::Ready& Engine::prepare(int count, int height, int width) {
  for (auto it = plans_.begin(); it != plans_.end(); ++it) {
    if (it->plan.images == count && it->plan.height == height && it->plan.width == width) {
      plans_.splice(plans_.begin(), plans_, it);
      return plans_.front();
    }
  }
  while (plans_.size() >= kMaxPlans) plans_.pop_back();
  Ready ready;
  ready.plan = make_plan(network_, isa_, count, height, width, cache_for_maps(),
                         [this](const Conv& conv, int n, int h, int w) {
                           return tuner_.choose(conv, n, h, w);
                         });
  ready.packed.resize(network_.nodes.size());
  for (std::size_t i = 0; i < network_.nodes.size(); ++i) {
    if (network_.nodes[i].kind != Kind::conv) continue;
    ready.packed[i] = pack(static_cast<int>(i), ready.plan.algorithms[i]);
  }
  ready.arena = Buffer(ready.plan.arena + 64);
  plans_.push_front(std::move(ready));
  return plans_.front();
}

void Engine::read_images(const Images& images, int first, const Map& map) {
  const int channels = network_.in_channels;
  std::vector<float> scale(static_cast<std::size_t>(channels)), shift(scale);
  for (std::size_t c = 0; c < scale.size(); ++c) {
    scale[c] = 1.0f / (255.0f * network_.deviation[c]);
    shift[c] = -network_.mean[c] / network_.deviation[c];
  }
  pool_.each(std::int64_t{map.images} * map.height, [&](int, std::int64_t item) {
    const std::int64_t image = item / map.height, y = item % map.height;
    const std::ptrdiff_t from = (first + image) * images.image + y * images.row;
    for (int c = 0; c < channels; ++c) {
      float* to = map.data + image * map.image + y * map.row + c;
      const std::ptrdiff_t begin = from + c * images.channel;
      if (images.format == Format::bytes) {
        const auto* bytes = static_cast<const unsigned char*>(images.data) + begin;
        const float a = scale[static_cast<std::size_t>(c)], b = shift[static_cast<std::size_t>(c)];
        for (int x = 0; x < map.width; ++x) {
          to[x * map.pixel] = static_cast<float>(bytes[x * images.pixel]) * a + b;
        }
      } else {
        const auto* floats = static_cast<const float*>(images.data) + begin;
        for (int x = 0; x < map.width; ++x) to[x * map.pixel] = floats[x * images.pixel];
      }
    }
  });
}

void Engine::run_node(Ready& ready, int index, int first, int count) {
  const Plan& plan = ready.plan;
  const Node& node = network_.nodes[static_cast<std::size_t>(index)];
  const auto map_of = [&](int i) {
    const Place& place = plan.places[static_cast<std::size_t>(i)];
    return place.map(ready.arena.data(), place.images == plan.images ? first : 0, count);
  };
  const Map output = map_of(index);
  switch (node.kind) {
    case Kind::input: break;
    case Kind::conv:
      rvgg::run(isa_, *ready.packed[static_cast<std::size_t>(index)],
                plan.algorithms[static_cast<std::size_t>(index)], map_of(node.inputs[0]), output,
                pool_, scratch_);
      break;
    case Kind::pool: pool_bins(isa_, map_of(node.inputs[0]), output, node.bins, pool_); break;
    case Kind::upsample:
      upsample(map_of(node.inputs[0]), output, node.align_corners, pool_);
      break;
    case Kind::concat: {
      int behind = 0;
      for (int input : node.inputs) {
        const Map map = map_of(input);
        append_channels(map, output, behind, pool_);
        behind += map.channels;
      }
      break;
    }
  }
  clear_border(output, plan.places[static_cast<std::size_t>(index)].border, pool_);
}

void Engine::execute(Ready& ready, const Images& images, float* result, double* seconds) {
  const Pool::Awake awake(pool_);
  const Plan& plan = ready.plan;
  for (const Segment& segment : plan.segments) {
    for (int first = 0; first < plan.images; first += segment.images) {
      const int count = std::min(segment.images, plan.images - first);
      for (int i = segment.first; i <= segment.last; ++i) {
        const auto start = std::chrono::steady_clock::now();
        if (i == 0) {
          const Place& place = plan.places[0];
          read_images(images, first,
                      place.map(ready.arena.data(), place.images == plan.images ? first : 0, count));
        }
        run_node(ready, i, first, count);
        if (seconds) {
          seconds[i] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        }
      }
    }
  }
  const Map map = plan.places.back().map(ready.arena.data(), 0, plan.images);
  const std::int64_t plane = std::int64_t{map.height} * map.width;
  pool_.each(std::int64_t{map.images} * map.height, [&](int, std::int64_t item) {
    const std::int64_t image = item / map.height, y = item % map.height;
    const float* from = map.data + image * map.image + y * map.row;
    float* to = result + image * plane * map.channels + y * map.width;
    for (int c = 0; c < map.channels; ++c) {
      for (int x = 0; x < map.width; ++x) to[c * plane + x] = from[x * map.pixel + c];
    }
  });
}

void Engine::run(const Images& images, float* result) {
  if (images.count < 0 || images.count > kMaxImages) {
    throw Error("images: at most " + std::to_string(kMaxImages) + " in a batch, found " +
                std::to_string(images.count));
  }
  if (!images.count) return;
  const std::lock_guard lock(mutex_);
  execute(prepare(images.count, images.height, images.width), images, result, nullptr);
}

std::vector<Step> Engine::profile(int count, int height, int width, int repeats) {
  const std::lock_guard lock(mutex_);
  Ready& ready = prepare(count, height, width);
  const std::size_t nodes = network_.nodes.size();
  const Shape out = output_shape(height, width);
  std::vector<float> images(static_cast<std::size_t>(count) * static_cast<std::size_t>(height) *
                            static_cast<std::size_t>(width) * static_cast<std::size_t>(network_.in_channels));
  std::vector<float> result(static_cast<std::size_t>(count) * static_cast<std::size_t>(out.height) *
                            static_cast<std::size_t>(out.width) * static_cast<std::size_t>(out.channels));
  std::vector<double> least(nodes, 1e9);
  for (int i = 0; i < std::max(repeats, 1); ++i) {
    std::vector<double> seconds(nodes);
    execute(ready, Images::contiguous(images.data(), Format::floats, count, height, width, network_.in_channels),
            result.data(), seconds.data());
    for (std::size_t n = 0; n < nodes; ++n) least[n] = std::min(least[n], seconds[n]);
  }
  std::vector<Step> steps;
  for (std::size_t n = 0; n < nodes; ++n) {
    const Node& node = network_.nodes[n];
    Step step{node.name, "", ready.plan.places[n].shape, least[n] * 1e3, 0, 0, 0};
    if (node.kind == Kind::conv) {
      const Algorithm& algorithm = ready.plan.algorithms[n];
      const Shape& in = ready.plan.places[static_cast<std::size_t>(node.inputs[0])].shape;
      step.algorithm = algorithm.name();
      step.multiply_adds = count * multiplications(isa_, node.conv, {}, in.height, in.width);
      step.multiplications = count * multiplications(isa_, node.conv, algorithm, in.height, in.width);
      step.weight_bytes = ready.packed[n]->bytes();
    }
    steps.push_back(step);
  }
  return steps;
}

Engine::Memory Engine::memory() {
  const std::lock_guard lock(mutex_);
  Memory memory{0, 0, scratch_.bytes()};
  for (const auto& [key, slot] : packed_) {
    if (const auto packed = slot.lock()) memory.weights += packed->bytes();
  }
  for (const Ready& ready : plans_) memory.activations += ready.arena.bytes();
  return memory;
}

}  // namespace rvgg
