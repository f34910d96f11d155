#include "engine.hpp"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include <sched.h>
#include <unistd.h>

#include "maps.hpp"

namespace rvgg {

namespace {

constexpr std::size_t kMaxPlans = 8;
constexpr int kMaxThreads = 1024;
constexpr int kMaxImages = 1 << 16;
// Bands stay in the second cache; maps that fit there themselves are better computed whole.
constexpr std::size_t kBandBytes = 256 << 10, kWorthBands = 1 << 20;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::vector<float> zero_images(int count, int height, int width, int channels) {
  return std::vector<float>(static_cast<std::size_t>(count) * static_cast<std::size_t>(height) *
                            static_cast<std::size_t>(width) * static_cast<std::size_t>(channels));
}

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

}  // namespace

Engine::Engine(Network network, const Options& options)
    : network_(std::move(network)),
      band_rows_(options.band_rows),
      isa_(checked_isa(options.isa)),
      pool_(checked_threads(options.threads), options.pin),
      tuner_(isa_, pool_, options.tuning, options.compact) {
  network_.check();
  for (std::size_t c = 0; c < network_.mean.size(); ++c) {
    scale_.push_back(1.0f / (255.0f * network_.deviation[c]));
    shift_.push_back(-network_.mean[c] / network_.deviation[c]);
  }
  for (Node& node : network_.nodes) node.conv.half = options.half;
  if (!options.algorithm.empty()) tuner_.force(options.algorithm);
}

std::shared_ptr<PackedConv> Engine::pack(int node, const Algorithm& algorithm) {
  const char* packing[] = {" ", " ", " points ", " fresh ", " fresh "};  // of each order
  const Conv& conv = network_.nodes[static_cast<std::size_t>(node)].conv;
  std::weak_ptr<PackedConv>& slot =
      packed_[{node, algorithm.name() + packing[static_cast<int>(algorithm.order)] +
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
  plans_.push_front(with_or_without_bands(count, height, width));
  return plans_.front();
}

Engine::Ready Engine::make(int count, int height, int width, int banded) {
  Ready ready;
  ready.plan = make_plan(network_, isa_, count, height, width, banded, cache_for_maps(),
                         [this](const Conv& conv, int n, int h, int w) {
                           return tuner_.choose(conv, n, h, w);
                         });
  ready.packed.resize(network_.nodes.size());
  for (std::size_t i = 0; i < network_.nodes.size(); ++i) {
    if (network_.nodes[i].kind != Kind::conv) continue;
    ready.packed[i] = pack(static_cast<int>(i), ready.plan.algorithms[i]);
  }
  ready.arena = Buffer(ready.plan.arena + 64);
  if (banded) {
    std::vector<Bands::Layer> layers;
    for (std::size_t i = 1; i < static_cast<std::size_t>(banded); ++i) {
      const Shape& input = ready.plan.places[i - 1].shape;
      layers.push_back({ready.packed[i], ready.plan.algorithms[i], input.height, input.width});
    }
    ready.bands = std::make_unique<Bands>(isa_, std::move(layers), rows_of_a_band(ready.plan),
                                          pool_.threads());
  }
  return ready;
}

// Whole tiles, as many as leave the strips in the second cache and give each thread a few bands.
int Engine::rows_of_a_band(const Plan& plan) const {
  const std::size_t last = static_cast<std::size_t>(plan.banded) - 1;
  const Algorithm& algorithm = plan.algorithms[last];
  const int tile = algorithm.winograd() ? algorithm.rows : 2;
  if (band_rows_ > 0) return round_up(band_rows_, tile);
  const int height = plan.places[last].shape.height;
  int rows = tile;
  for (int more = 2 * tile; more <= height; more += tile) {
    if (std::int64_t{divide_up(height, more)} * plan.images < 4 * pool_.threads()) break;
    std::size_t floats = 0;
    int of_map = more;
    for (std::size_t i = last; i > 0; --i) {
      of_map = (of_map - 1) * network_.nodes[i].conv.stride + network_.nodes[i].conv.kernel;
      floats += static_cast<std::size_t>(of_map * plan.places[i - 1].row());
    }
    if (floats * sizeof(float) > kBandBytes) break;
    rows = more;
  }
  return rows;
}

// Both give the same numbers; which is faster is measured, unless the model is to be trusted.
Engine::Ready Engine::with_or_without_bands(int count, int height, int width) {
  const int banded = bandable(network_);
  if (band_rows_ >= 0 || !banded) return make(count, height, width, band_rows_ > 0 ? banded : 0);
  Ready whole = make(count, height, width, 0);
  const std::size_t last = static_cast<std::size_t>(banded) - 1;
  const Place& largest = whole.plan.places[last - 1];
  if (static_cast<std::size_t>(largest.image()) * sizeof(float) < kWorthBands) return whole;
  std::string name = std::to_string(count) + " " + std::to_string(height) + "x" + std::to_string(width);
  for (std::size_t i = 1; i <= last; ++i) {
    const Conv& conv = network_.nodes[i].conv;
    name += " k" + std::to_string(conv.out_channels) + " s" + std::to_string(conv.stride) + " g" +
            std::to_string(conv.groups) + (conv.half ? " half" : "");
  }
  Ready cut;
  const bool better = tuner_.prefers_bands(name, whole.packed[last]->bytes() <= kBandBytes, [&] {
    cut = make(count, height, width, banded);
    const std::vector<float> zeros = zero_images(count, height, width, network_.in_channels);
    const Images images = Images::contiguous(zeros.data(), Format::floats, count, height, width,
                                             network_.in_channels);
    double least[2] = {1e9, 1e9};
    for (int i = 0; i < 12; ++i) {
      const auto start = std::chrono::steady_clock::now();
      execute(i % 2 ? cut : whole, images, static_cast<int>(last), nullptr);
      least[i % 2] = std::min(least[i % 2], seconds_since(start));
    }
    return least[1] < least[0];
  });
  if (!better) return whole;
  return cut.bands ? std::move(cut) : make(count, height, width, banded);
}

void Engine::read_row(const Images& images, std::int64_t image, std::int64_t y, float* row) const {
  const int channels = network_.in_channels;
  const std::ptrdiff_t from = image * images.image + y * images.row;
  for (int c = 0; c < channels; ++c) {
    float* to = row + c;
    const std::ptrdiff_t begin = from + c * images.channel;
    if (images.format == Format::bytes) {
      const auto* bytes = static_cast<const unsigned char*>(images.data) + begin;
      const float a = scale_[static_cast<std::size_t>(c)], b = shift_[static_cast<std::size_t>(c)];
      for (int x = 0; x < images.width; ++x) {
        to[x * channels] = static_cast<float>(bytes[x * images.pixel]) * a + b;
      }
    } else {
      const auto* floats = static_cast<const float*>(images.data) + begin;
      for (int x = 0; x < images.width; ++x) to[x * channels] = floats[x * images.pixel];
    }
  }
}

void Engine::run_node(Ready& ready, const Images& images, int index, int first, int count) {
  const Plan& plan = ready.plan;
  if (index < plan.banded - 1) return;
  const Node& node = network_.nodes[static_cast<std::size_t>(index)];
  const auto map_of = [&](int i) {
    const Place& place = plan.places[static_cast<std::size_t>(i)];
    return place.map(ready.arena.data(), place.images == plan.images ? first : 0, count);
  };
  const Map output = map_of(index);
  if (index == plan.banded - 1) {
    ready.bands->run(
        [&](int image, int y, float* row) { read_row(images, first + image, y, row); }, output,
        pool_);
  } else if (node.kind == Kind::input) {
    pool_.each(std::int64_t{count} * output.height, [&](int, std::int64_t item) {
      const std::int64_t image = item / output.height, y = item % output.height;
      read_row(images, first + image, y, output.data + image * output.image + y * output.row);
    });
  } else if (node.kind == Kind::conv) {
    rvgg::run(isa_, *ready.packed[static_cast<std::size_t>(index)],
              plan.algorithms[static_cast<std::size_t>(index)], map_of(node.inputs[0]), output,
              pool_, scratch_);
  } else if (node.kind == Kind::pool) {
    pool_bins(isa_, map_of(node.inputs[0]), output, node.bins, pool_);
  } else if (node.kind == Kind::upsample) {
    upsample(map_of(node.inputs[0]), output, node.align_corners, pool_);
  } else {
    int behind = 0;
    for (int input : node.inputs) {
      const Map map = map_of(input);
      append_channels(map, output, behind, pool_);
      behind += map.channels;
    }
  }
  clear_border(output, plan.places[static_cast<std::size_t>(index)].border, pool_);
}

void Engine::execute(Ready& ready, const Images& images, int last, double* seconds) {
  const Pool::Awake awake(pool_);
  const Plan& plan = ready.plan;
  for (const Segment& segment : plan.segments) {
    for (int first = 0; first < plan.images; first += segment.images) {
      const int count = std::min(segment.images, plan.images - first);
      for (int i = segment.first; i <= std::min(segment.last, last); ++i) {
        const auto start = std::chrono::steady_clock::now();
        run_node(ready, images, i, first, count);
        if (seconds) seconds[i] += seconds_since(start);
      }
    }
  }
}

void Engine::write_result(Ready& ready, float* result) {
  const Pool::Awake awake(pool_);
  const Map map = ready.plan.places.back().map(ready.arena.data(), 0, ready.plan.images);
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
  Ready& ready = prepare(images.count, images.height, images.width);
  execute(ready, images, static_cast<int>(network_.nodes.size()) - 1, nullptr);
  write_result(ready, result);
}

std::vector<Step> Engine::profile(int count, int height, int width, int repeats) {
  const std::lock_guard lock(mutex_);
  Ready& ready = prepare(count, height, width);
  const std::vector<float> zeros = zero_images(count, height, width, network_.in_channels);
  const Images images = Images::contiguous(zeros.data(), Format::floats, count, height, width,
                                           network_.in_channels);
  const std::size_t nodes = network_.nodes.size();
  std::vector<double> least(nodes, 1e9);
  for (int i = 0; i < std::max(repeats, 1); ++i) {
    std::vector<double> seconds(nodes);
    execute(ready, images, static_cast<int>(nodes) - 1, seconds.data());
    for (std::size_t n = 0; n < nodes; ++n) least[n] = std::min(least[n], seconds[n]);
  }
  return steps_of(ready, least);
}

std::vector<Step> Engine::steps_of(const Ready& ready, const std::vector<double>& seconds) const {
  const Plan& plan = ready.plan;
  std::vector<Step> steps;
  Step step{};
  for (std::size_t n = 0; n < network_.nodes.size(); ++n) {
    const Node& node = network_.nodes[n];
    const bool in_band = static_cast<int>(n) < plan.banded;
    if (!in_band || !n) step = Step{};
    step.name += (in_band && n > 1 ? " + " : "") + (in_band && !n ? "" : node.name);
    step.shape = plan.places[n].shape;
    step.milliseconds += seconds[n] * 1e3;
    if (node.kind == Kind::conv) {
      const Algorithm& algorithm = plan.algorithms[n];
      const Shape& in = plan.places[static_cast<std::size_t>(node.inputs[0])].shape;
      step.algorithm += (step.algorithm.empty() ? "" : " + ") + algorithm.name();
      step.multiply_adds += plan.images * multiplications(isa_, node.conv, {}, in.height, in.width);
      step.multiplications +=
          plan.images * multiplications(isa_, node.conv, algorithm, in.height, in.width);
      step.weight_bytes += ready.packed[n]->bytes();
    }
    if (static_cast<int>(n) >= plan.banded - 1) steps.push_back(step);
  }
  return steps;
}

Engine::Memory Engine::memory() {
  const std::lock_guard lock(mutex_);
  Memory memory{0, 0, scratch_.bytes()};
  for (const auto& [key, slot] : packed_) {
    if (const auto packed = slot.lock()) memory.weights += packed->bytes();
  }
  for (const Ready& ready : plans_) {
    memory.activations += ready.arena.bytes() + (ready.bands ? ready.bands->bytes() : 0);
  }
  return memory;
}

}  // namespace rvgg
