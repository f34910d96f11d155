#include "tune.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <stdexcept>

namespace rvgg {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

constexpr std::size_t kSweep = std::size_t{16} << 20;  // floats: more than the caches hold
constexpr std::size_t kMaxShared = std::size_t{64} << 20;   // floats of transformed input
constexpr double kMaxWeights = 1.5e9;                   // bytes of one layer's transformed weights
constexpr std::size_t kMeasured = 8;                    // tiles, by the fast tuning
constexpr std::size_t kFinalists = 3;                   // are measured again, in turn
constexpr int kFinals = 2;                              // times
constexpr double kRegisterTile = 0.7;                   // of the peak, in the first cache
constexpr const char* kBands = "bands ";

std::string key(const Isa& isa, bool compact, int threads, const Conv& conv, int images, int height,
                int width) {
  char text[160];
  std::snprintf(text, sizeof text, "%s%s%s t%d %dx%d k%d g%d s%d d%d n%d %dx%d", isa.name,
                conv.half ? " half" : "", compact ? " compact" : "", threads, conv.in_channels, conv.out_channels, conv.kernel, conv.groups, conv.stride,
                conv.dilation, images, height, width);
  return text;
}

std::string to_text(const Algorithm& a) {
  char text[64];
  std::snprintf(text, sizeof text, "%d %d %d %d %d", a.rows, a.columns, a.vectors, a.block,
                static_cast<int>(a.order));
  return text;
}

bool from_text(const std::string& text, Algorithm& a) {
  int order = 0;
  if (std::sscanf(text.c_str(), "%d %d %d %d %d", &a.rows, &a.columns, &a.vectors, &a.block,
                  &order) != 5) {
    return false;
  }
  a.order = static_cast<Order>(order);
  return order >= 0 && order <= 4 && a.rows >= 0 && a.rows <= 16 && a.columns >= 0 && a.columns <= 16 && a.block >= 1 &&
         a.block <= 1024 && a.vectors >= 1 && a.vectors <= 3;
}

double tiles_of(const Conv& conv, const Algorithm& a, int images, int height, int width) {
  return static_cast<double>(images) * divide_up(conv.out_size(height), a.rows) *
         divide_up(conv.out_size(width), a.columns);
}

// How many threads have work all the time, if they take so many parts.
double busy_threads(const Isa& isa, const Conv& conv, const Algorithm& a, int images, int height,
                    int width, int threads) {
  if (!a.winograd()) return threads;
  double parts = conv.groups * divide_up(conv.out_channels / conv.groups, a.vectors * isa.lanes);
  if (a.order == Order::blocks) {
    parts = std::ceil(tiles_of(conv, a, images, height, width) / a.block);
  } else if (a.order == Order::points) {
    parts = isa.axis(a.rows, conv.stride)->products * isa.axis(a.columns, conv.stride)->products;
  }
  return parts / std::ceil(parts / threads);
}

// Whether so many tiles may be worth taking together, of so many in all; those that are tried double.
bool sensible(Order order, int block, double tiles) {
  if (order == Order::points) return block == 12;  // it has none
  if (block > 6 && block / 2 >= tiles) return false;  // a smaller block takes all of them
  if (!keeps_weights(order)) return block <= 48;
  return block >= std::min(12.0, tiles) && (order == Order::fresh || block <= 24);
}

}  // namespace

// Peak and bandwidth by two short loops; the model needs their ratio more than their values.
void Tuner::calibrate() {
  if (peak_ > 0) return;
  constexpr int count = 2000, tries = 200;
  Buffer numbers(static_cast<std::size_t>(kMultiplyAdds * isa_.lanes));
  double best = 1;
  for (int i = 0; i < tries; ++i) {
    const auto start = Clock::now();
    isa_.multiply_add(count, numbers.data());
    best = std::min(best, seconds_since(start));
  }
  peak_ = 2.0 * count * kMultiplyAdds * isa_.lanes / best;
  if (tuning_ == Tuning::none) return;
  flops_ = kRegisterTile * peak_;
  sweep_ = Buffer(kSweep);
  std::fill_n(sweep_.data(), kSweep, 1.0f);
  double pass = 1;
  for (int i = 0; i < 3; ++i) {
    const auto start = Clock::now();
    std::vector<float> sums(64);
    pool_.each(64, [&](int, std::int64_t part) {
      float sum[16] = {};
      const float* from = sweep_.data() + static_cast<std::size_t>(part) * (kSweep / 64);
      for (std::size_t k = 0; k < kSweep / 64; k += 16) {
        for (int j = 0; j < 16; ++j) sum[j] += from[k + static_cast<std::size_t>(j)];
      }
      sums[static_cast<std::size_t>(part)] = sum[0];
    });
    pass = std::min(pass, seconds_since(start));
  }
  bandwidth_ = kSweep * sizeof(float) / pass;
}

double Tuner::model(const Conv& conv, const Algorithm& a, int images, int height, int width) {
  const double threads = busy_threads(isa_, conv, a, images, height, width, pool_.threads());
  const double work = images * multiplications(isa_, conv, a, height, width);
  const double in = conv.in_channels, out = conv.out_channels;
  const double width_used = conv.out_channels / conv.groups /
                            static_cast<double>(round_up(conv.out_channels / conv.groups, isa_.lanes));
  double compute = 2 * work / width_used / (flops_ * 0.9);
  const double bytes = conv.half ? 2 : 4;
  double weights = bytes * in / conv.groups * out * conv.taps();
  if (a.winograd()) {
    const Axis& r = *isa_.axis(a.rows, conv.stride);
    const Axis& c = *isa_.axis(a.columns, conv.stride);
    const double tiles = tiles_of(conv, a, images, height, width);
    if (a.order == Order::fresh) {
      const double times = std::max(1.0, tiles / a.block);
      compute += times * in / conv.groups * out * 2.0 * (3 + c.weights) * r.weights / (flops_ / 3);
    } else if (a.order == Order::fused) {  // finished for each register tile anew
      const double rows = std::min<double>({tiles, 1.0 * a.block, 1.0 * isa_.max_rows[a.vectors]});
      const double extra = 3 / rows * work;
      compute = 2 * (work + extra) / width_used / (flops_ * 0.6);
    } else {
      weights = bytes * in / conv.groups * out * r.weights * c.weights;
    }
    // About 4 operations a number and pass in the transforms, at a third of the peak.
    const double numbers = (in + out) * 2.0 * r.products * c.products;
    compute += tiles * numbers * 4 / (flops_ / 3);
    // Few rows for a register tile, and weights that come from afar for each block of tiles.
    const double rows = std::min<double>(tiles, a.block);
    const double full = isa_.max_rows[a.vectors];
    compute += 2 * work / flops_ * 0.25 * std::max(0.0, 1 - rows / (2 * full));
    // The transformed block should stay in the second cache.
    const double block = a.order != Order::blocks ? 0 : rows * in * r.products * c.products * 4;
    if (block > 600e3) compute *= 1.1;
  } else if (conv.kernel == 3 && a.block < 48) {
    compute *= 1.05;
  }
  const double traffic = (weights + 4.0 * images * (in * height * width)) / bandwidth_;
  return std::max(compute / threads, traffic) + 0.3 * std::min(compute / threads, traffic) +
         3e-6 * std::min(static_cast<int>(a.order), 2);
}

std::vector<Algorithm> Tuner::candidates(const Conv& conv, int images, int height,
                                         int width) const {
  std::vector<Algorithm> all;
  for (int vectors = 1; vectors <= isa_.max_vectors; ++vectors) {
    if (vectors > 1 && (vectors - 1) * isa_.lanes >= conv.out_channels / conv.groups) continue;
    for (int block : {24, 48, 96}) all.push_back({0, 0, vectors, block, Order::blocks});
    if (vectors == 1 && conv.out_channels / conv.groups > isa_.lanes) continue;
    for (int rows = 2; rows <= 7; ++rows) {
      for (int columns = 2; columns <= 7; ++columns) {
        // Very unequal tiles, and those much larger than the map, never pay.
        if (std::max(rows, columns) > 2 * std::min(rows, columns) + 1) continue;
        if (rows > conv.out_size(height) + 1 || columns > conv.out_size(width) + 1) continue;
        const Axis* r = isa_.axis(rows, conv.stride);
        const Axis* c = isa_.axis(columns, conv.stride);
        if (!r || !c || !applicable(isa_, conv, {rows, columns, vectors})) continue;
        const Algorithm tile{rows, columns, vectors};
        const double tiles = tiles_of(conv, tile, images, height, width);
        const double points = r->products * c->products;
        const double pairs = static_cast<double>(conv.in_channels) / conv.groups * conv.out_channels;
        for (int block : {6, 12, 24, 48, 96}) {
          for (Order order :
               {Order::blocks, Order::panels, Order::points, Order::fresh, Order::fused}) {
            if (!sensible(order, block, tiles) || (compact_ && !keeps_weights(order))) continue;
            const double weights = 4.0 * pairs * r->weights * c->weights;
            if (!keeps_weights(order) && weights > kMaxWeights) continue;
            const double shared = tiles * points * (conv.in_channels + conv.out_channels);
            if (order != Order::blocks && shared > static_cast<double>(kMaxShared)) continue;
            all.push_back({rows, columns, vectors, block, order});
          }
        }
      }
    }
  }
  return all;
}

double Tuner::measure(const Conv& conv, const Algorithm& algorithm, int images, int height,
                      int width) {
  const Border edge = border(isa_, conv, algorithm, height, width);
  const auto make = [&](int channels, int h, int w, const Border& b, Buffer& buffer) {
    Map map;
    map.images = images;
    map.height = h;
    map.width = w;
    map.channels = channels;
    // As in a plan: images keep their few channels.
    map.pixel = channels < isa_.lanes && !algorithm.winograd() ? channels : round_up(channels, isa_.lanes);
    map.row = map.pixel * (b.left + w + b.right);
    map.image = map.row * (b.top + h + b.bottom);
    buffer = Buffer(static_cast<std::size_t>(map.image * images) + 64);
    map.data = buffer.data() + b.top * map.row + b.left * map.pixel;
    return map;
  };
  Buffer in, out;
  const Map input = make(conv.in_channels, height, width, edge, in);
  const Map output = make(conv.out_channels, conv.out_size(height), conv.out_size(width), {}, out);
  const PackedConv packed(isa_, conv, algorithm, pool_);
  Scratch scratch;
  const Pool::Awake awake(pool_);
  double best = 1e9;
  const auto begin = Clock::now();
  for (int i = 0; i < 9 && (i < 3 || seconds_since(begin) < 0.06); ++i) {
    // In a network the weights of a layer have left the caches since the last time, its input has
    // not.
    pool_.each(64, [&](int, std::int64_t part) {
      std::fill_n(sweep_.data() + part * (kSweep / 64), kSweep / 64, static_cast<float>(i));
    });
    std::fill_n(in.data(), std::min<std::size_t>(in.size(), std::size_t{1} << 20), 0.0f);
    const auto start = Clock::now();
    run(isa_, packed, algorithm, input, output, pool_, scratch);
    best = std::min(best, seconds_since(start));
  }
  return best;
}

Algorithm Tuner::choose(const Conv& conv, int images, int height, int width) {
  if (forced_) {
    if (applicable(isa_, conv, *forced_)) return *forced_;
    return {0, 0, std::min(forced_->vectors, isa_.max_vectors), forced_->block};
  }
  if (tuning_ != Tuning::none) calibrate();
  const std::string name = key(isa_, compact_, pool_.threads(), conv, images, height, width);
  if (const auto found = chosen_.find(name); found != chosen_.end()) {
    if (applicable(isa_, conv, found->second)) return found->second;
  }
  std::vector<std::pair<double, Algorithm>> order;
  for (const Algorithm& a : candidates(conv, images, height, width)) {
    order.emplace_back(model(conv, a, images, height, width), a);
  }
  const auto is_less = [](const auto& x, const auto& y) { return x.first < y.first; };
  std::sort(order.begin(), order.end(), is_less);
  std::vector<std::pair<double, Algorithm>> measured;  // the fastest first
  const auto try_out = [&](const Algorithm& algorithm) {
    measured.emplace_back(measure(conv, algorithm, images, height, width), algorithm);
    std::sort(measured.begin(), measured.end(), is_less);
  };
  if (tuning_ == Tuning::full) {
    for (const auto& [expected, algorithm] : order) {
      if (expected < 3 * order.front().first) try_out(algorithm);
    }
  } else if (tuning_ == Tuning::fast) {
    // The tile first, each with what the model thinks its best blocking; then the blocking.
    std::vector<std::pair<int, int>> tiles;
    for (const auto& [expected, algorithm] : order) {
      const std::pair<int, int> tile{algorithm.rows, algorithm.columns};
      if (std::find(tiles.begin(), tiles.end(), tile) != tiles.end()) continue;
      if (tiles.size() == kMeasured || expected > 2 * order.front().first) break;
      tiles.push_back(tile);
      try_out(algorithm);
    }
    const Algorithm first = measured.front().second;
    for (const auto& [expected, algorithm] : order) {
      if (algorithm.rows == first.rows && algorithm.columns == first.columns &&
          algorithm != first && expected < 1.5 * order.front().first) {
        try_out(algorithm);
      }
    }
  }
  if (measured.empty()) return chosen_[name] = order.front().second;
  // The clock of a shared machine changes between one measurement and the next.
  measured.resize(std::min(measured.size(), kFinalists));
  for (int i = 0; i < kFinals; ++i) {
    for (auto& [seconds, algorithm] : measured) {
      seconds = std::min(seconds, measure(conv, algorithm, images, height, width));
    }
  }
  std::sort(measured.begin(), measured.end(), is_less);
  return chosen_[name] = measured.front().second;
}

bool Tuner::prefers_bands(const std::string& network, bool expected,
                          const std::function<bool()>& measure) {
  if (tuning_ == Tuning::none) return expected;
  const std::string name = kBands + std::string(isa_.name) + (compact_ ? " compact t" : " t") +
                           std::to_string(pool_.threads()) + " " + network;
  if (!bands_.contains(name)) bands_[name] = measure();
  return bands_[name];
}

void Tuner::force(const std::string& text) {
  Algorithm algorithm;
  if (!from_text(text, algorithm)) throw std::invalid_argument("algorithm: " + text);
  forced_ = algorithm;
}

std::map<std::string, std::string> Tuner::decisions() const {
  std::map<std::string, std::string> result;
  for (const auto& [name, algorithm] : chosen_) result[name] = to_text(algorithm);
  for (const auto& [name, better] : bands_) result[name] = better ? "yes" : "no";
  return result;
}

void Tuner::adopt(const std::map<std::string, std::string>& decisions) {
  for (const auto& [name, text] : decisions) {
    Algorithm algorithm;
    if (name.starts_with(kBands)) {
      if (text == "yes" || text == "no") bands_[name] = text == "yes";
    } else if (from_text(text, algorithm)) {
      chosen_[name] = algorithm;
    }
  }
}

}  // namespace rvgg
