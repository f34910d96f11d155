#include "conv.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "half.hpp"

namespace rvgg {

namespace {

// Rows this many bytes apart would fall into the same few sets of the first cache.
int avoid_aliasing(int floats) { return floats % 128 ? floats : floats + 16; }

std::ptrdiff_t odd_lines(std::ptrdiff_t floats) {
  const std::ptrdiff_t lines = (floats + 15) / 16;
  return (lines | 1) * 16;
}

struct Axes {
  const Axis* rows;
  const Axis* columns;
};
Axes axes_of(const Isa& isa, const Conv& conv, const Algorithm& algorithm) {
  return {isa.axis(algorithm.rows, conv.stride), isa.axis(algorithm.columns, conv.stride)};
}

// One dimension of a dilated convolution is `dilation` dense ones, interleaved: phase after phase.
int phase_size(int size, int dilation, int phase) { return divide_up(size - phase, dilation); }

int overhang(const Conv& conv, const Axis& axis, int size) {
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
int stored_columns(const Isa& isa, const Conv& conv, const PackedConv::Panel& panel,
                   const Map& output) {
  if (panel.first + panel.columns < conv.out_channels) return panel.columns;
  return std::min(round_up(panel.columns, isa.lanes),
                  static_cast<int>(output.pixel) - panel.first);
}

// One Winograd convolution of one batch.
class Winograd {
 public:
  Winograd(const Isa& isa, const PackedConv& packed, const Algorithm& algorithm, const Map& input,
           const Map& output)
      : isa_(isa),
        packed_(packed),
        conv_(packed.conv()),
        input_(input),
        output_(output),
        axes_(axes_of(isa, conv_, algorithm)),
        rows_(conv_, *axes_.rows, input.height),
        columns_(conv_, *axes_.columns, input.width),
        points_(axes_.rows->products * axes_.columns->products),
        channels_(round_up(conv_.in_channels, isa.lanes)),
        a_row_(avoid_aliasing(channels_)) {
    for (int i = 0; i < axes_.rows->products; ++i) {
      for (int j = 0; j < axes_.columns->products; ++j) {
        weight_[i * axes_.columns->products + j] = static_cast<std::uint8_t>(
            axes_.rows->weight[i] * axes_.columns->weights + axes_.columns->weight[j]);
      }
    }
  }

  std::int64_t tiles() const {
    return std::int64_t{input_.images} * rows_.size() * columns_.size();
  }
  std::ptrdiff_t a_point(std::int64_t tiles) const { return odd_lines(tiles * a_row_); }
  std::size_t transformed_size(std::int64_t tiles) const {
    return static_cast<std::size_t>(points_ * a_point(tiles));
  }
  std::size_t products_size(int tiles, int vectors) const {
    return static_cast<std::size_t>(points_) * static_cast<std::size_t>(tiles * vectors * isa_.lanes);
  }
  std::size_t lines_size() const {
    return static_cast<std::size_t>(kMaxProducts * kMaxProducts * isa_.lanes);
  }

  // B^T d B of the tile into row `slot` of each point.
  void transform(std::int64_t tile, float* a, std::ptrdiff_t a_point, std::int64_t slot,
                 float* lines) const {
    const Place place = locate(tile);
    const int lanes = isa_.lanes;
    const float* src = input_.data + place.image * input_.image +
                       place.row->input * input_.row + place.column->input * input_.pixel;
    float* dst = a + slot * a_row_;
    const int width = axes_.columns->inputs;
    for (int c = 0; c < channels_; c += lanes) {
      axes_.rows->input({src + c, input_.row * conv_.dilation, input_.pixel * conv_.dilation, lines,
                         width * lanes, lanes, width});
      axes_.columns->input({lines, lanes, width * lanes, dst + c, a_point,
                            a_point * axes_.columns->products, axes_.rows->products});
    }
  }

  // The products of tiles [first, end), which stand in rows [slot, ...) of `a`, for one panel.
  void multiply(const PackedConv::Panel& panel, std::int64_t first, std::int64_t end,
                const float* a, std::ptrdiff_t a_point, std::int64_t slot, float* products,
                float* lines) const {
    const int count = static_cast<int>(end - first);
    const int depth = conv_.in_channels / conv_.groups;
    isa_.points[conv_.half](panel.vectors,
                {a + slot * a_row_ + std::ptrdiff_t{panel.group} * depth, a_point, a_row_, count,
                 depth, packed_.weights(panel), panel.next, weight_, points_, products});
    const int width = panel.vectors * isa_.lanes;
    for (std::int64_t tile = first; tile < end; ++tile) {
      store(panel, tile, products + (tile - first) * width, std::ptrdiff_t{count} * width, lines);
    }
  }

  // The products of one point of all tiles, for all panels: C[panel][tile][channel].
  void multiply_point(int point, const float* a, std::ptrdiff_t a_point, float* products) const {
    const int count = static_cast<int>(tiles()), depth = conv_.in_channels / conv_.groups;
    for (const PackedConv::Panel& panel : packed_.panels()) {
      isa_.points[conv_.half](panel.vectors,
                  {a + point * a_point + std::ptrdiff_t{panel.group} * depth, a_point, a_row_, count,
                   depth, packed_.weights(panel), panel.next, weight_ + point, 1,
                   products + point * c_point() + count * static_cast<std::ptrdiff_t>(panel.bias)});
    }
  }
  int points() const { return points_; }
  std::ptrdiff_t c_point() const {
    const PackedConv::Panel& last = packed_.panels().back();
    return odd_lines(tiles() * (static_cast<std::ptrdiff_t>(last.bias) + last.vectors * isa_.lanes));
  }
  // Of a tile whose products lie as `multiply_point` leaves them.
  void store_tile(std::int64_t tile, const float* products, float* lines) const {
    for (const PackedConv::Panel& panel : packed_.panels()) {
      const float* src = products + tiles() * static_cast<std::ptrdiff_t>(panel.bias) +
                         tile * panel.vectors * isa_.lanes;
      store(panel, tile, src, c_point(), lines);
    }
  }

 private:
  struct Place {
    std::int64_t image;
    const TileLine::Tile* row;
    const TileLine::Tile* column;
  };
  Place locate(std::int64_t tile) const {
    const std::int64_t line = tile / columns_.size();
    return {line / rows_.size(), &rows_.tiles[static_cast<std::size_t>(line % rows_.size())],
            &columns_.tiles[static_cast<std::size_t>(tile % columns_.size())]};
  }

  // A^T m A, bias and ReLU; the products of a tile's points are `point` apart.
  void store(const PackedConv::Panel& panel, std::int64_t tile, const float* src,
             std::ptrdiff_t point, float* lines) const {
    const Place place = locate(tile);
    float* dst = output_.data + place.image * output_.image + place.row->output * output_.row +
                 place.column->output * output_.pixel + panel.first;
    const int lanes = isa_.lanes, columns = stored_columns(isa_, conv_, panel, output_);
    const int width = axes_.columns->products;
    for (int v = 0; v < panel.vectors; ++v) {
      axes_.rows->output(
          {src + v * lanes, point * width, point, lines, width * lanes, lanes, width});
      axes_.columns->store({lines, lanes, width * lanes, dst + v * lanes,
                            output_.pixel * conv_.dilation, output_.row * conv_.dilation,
                            place.row->items},
                           {packed_.bias(panel) + v * lanes, place.column->items,
                            columns - v * lanes, conv_.relu});
    }
  }

  const Isa& isa_;
  const PackedConv& packed_;
  const Conv& conv_;
  const Map& input_;
  const Map& output_;
  Axes axes_;
  TileLine rows_, columns_;
  int points_, channels_, a_row_;
  std::uint8_t weight_[kMaxProducts * kMaxProducts];
};

// Before the threads start: none of them may fail.
void reserve(Scratch& scratch, std::size_t floats) {
  for (Buffer& buffer : scratch.of_thread) buffer.reserve(floats);
}
float* of_thread(Scratch& scratch, int thread) {
  return scratch.of_thread[static_cast<std::size_t>(thread)].data();
}

std::size_t whole_lines(std::size_t floats) { return (floats + 15) / 16 * 16; }

// Each thread takes blocks of tiles and does all with them in its own cache.
void run_by_blocks(const Winograd& job, const PackedConv& packed, int block, int vectors,
                   Pool& pool, Scratch& scratch) {
  const std::int64_t tiles = job.tiles();
  const std::int64_t blocks = (tiles + block - 1) / block;
  const std::int64_t largest = (tiles + blocks - 1) / blocks;
  const std::ptrdiff_t a_point = job.a_point(largest);
  const std::size_t a_size = whole_lines(job.transformed_size(largest));
  const std::size_t c_size = whole_lines(job.products_size(static_cast<int>(largest), vectors));
  reserve(scratch, a_size + c_size + job.lines_size());
  pool.each(blocks, [&](int thread, std::int64_t item) {
    float* a = of_thread(scratch, thread);
    float* products = a + a_size;
    float* lines = products + c_size;
    const std::int64_t first = item * tiles / blocks, end = (item + 1) * tiles / blocks;
    for (std::int64_t tile = first; tile < end; ++tile) {
      job.transform(tile, a, a_point, tile - first, lines);
    }
    for (const PackedConv::Panel& panel : packed.panels()) {
      job.multiply(panel, first, end, a, a_point, 0, products, lines);
    }
  });
}

// All threads transform all tiles; then each takes panels, so that the weights pass once.
void run_by_panels(const Winograd& job, const PackedConv& packed, int block, int vectors,
                   Pool& pool, Scratch& scratch) {
  const std::int64_t tiles = job.tiles();
  const std::int64_t blocks = (tiles + block - 1) / block;
  const std::int64_t largest = (tiles + blocks - 1) / blocks;
  const std::ptrdiff_t a_point = job.a_point(tiles);
  const std::size_t c_size = whole_lines(job.products_size(static_cast<int>(largest), vectors));
  scratch.shared.reserve(job.transformed_size(tiles));
  reserve(scratch, c_size + job.lines_size());
  float* a = scratch.shared.data();
  pool.each(tiles, [&](int thread, std::int64_t tile) {
    job.transform(tile, a, a_point, tile, of_thread(scratch, thread));
  });
  pool.each(static_cast<std::int64_t>(packed.panels().size()), [&](int thread, std::int64_t item) {
    float* products = of_thread(scratch, thread);
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t first = b * tiles / blocks, end = (b + 1) * tiles / blocks;
      job.multiply(packed.panels()[static_cast<std::size_t>(item)], first, end, a, a_point, first,
                   products, products + c_size);
    }
  });
}

// Each point is a product of two whole matrices, whose weights pass once.
void run_by_points(const Winograd& job, Pool& pool, Scratch& scratch) {
  const std::int64_t tiles = job.tiles();
  const std::ptrdiff_t a_point = job.a_point(tiles);
  const std::size_t a_size = whole_lines(job.transformed_size(tiles));
  scratch.shared.reserve(a_size + static_cast<std::size_t>(job.points() * job.c_point()));
  reserve(scratch, job.lines_size());
  float* a = scratch.shared.data();
  float* products = a + a_size;
  pool.each(tiles, [&](int thread, std::int64_t tile) {
    job.transform(tile, a, a_point, tile, of_thread(scratch, thread));
  });
  pool.each(job.points(), [&](int, std::int64_t point) {
    job.multiply_point(static_cast<int>(point), a, a_point, products);
  });
  pool.each(tiles, [&](int thread, std::int64_t tile) {
    job.store_tile(tile, products, of_thread(scratch, thread));
  });
}

struct Segments {
  std::int32_t offset[9];
  int count, depth;
};
// The parts of the input that are contiguous under the kernel: its rows, or else its taps.
Segments segments_of(const Conv& conv, const Map& input) {
  Segments result{};
  const bool rows = conv.groups == 1 && conv.dilation == 1 && input.pixel == conv.in_channels;
  const int per_row = rows ? 1 : conv.kernel;
  result.count = conv.kernel * per_row;
  result.depth = rows ? conv.kernel * conv.in_channels : conv.in_channels / conv.groups;
  for (int s = 0; s < result.count; ++s) {
    const std::ptrdiff_t offset = s / per_row * input.row + s % per_row * input.pixel;
    result.offset[s] = static_cast<std::int32_t>(offset * conv.dilation);
  }
  return result;
}

constexpr int kMaxPixels = 256;

void run_directly(const Isa& isa, const PackedConv& packed, int block, const Map& input,
                  const Map& output, Pool& pool) {
  const Conv& conv = packed.conv();
  const Segments segments = segments_of(conv, input);
  const std::int64_t plane = std::int64_t{output.height} * output.width;
  const std::int64_t pixels = plane * output.images;
  const std::int64_t size = std::min(block, kMaxPixels);
  const std::int64_t blocks = (pixels + size - 1) / size;
  const std::int64_t parts = static_cast<std::int64_t>(packed.panels().size());
  // Few pixels: the panels are shared out as well, and each part of them passes all pixels in turn.
  const std::int64_t cuts = std::clamp<std::int64_t>(8 * pool.threads() / blocks, 1, parts);
  const float* origin = input.data - conv.padding() * (input.row + input.pixel);
  pool.each(cuts * blocks, [&](int, std::int64_t item) {
    const std::int64_t cut = item / blocks, b = item % blocks;
    const std::int64_t first = b * pixels / blocks;
    const int count = static_cast<int>((b + 1) * pixels / blocks - first);
    // Offsets from the first pixel's image.
    const std::int64_t image = first / plane;
    std::int32_t rows[kMaxPixels], c_rows[kMaxPixels];
    for (int i = 0; i < count; ++i) {
      const std::int64_t n = (first + i) / plane - image, at = (first + i) % plane;
      const std::int64_t y = at / output.width, x = at % output.width;
      rows[i] = static_cast<std::int32_t>(n * input.image +
                                          conv.stride * (y * input.row + x * input.pixel));
      c_rows[i] = static_cast<std::int32_t>(n * output.image + y * output.row + x * output.pixel);
    }
    for (std::int64_t p = cut * parts / cuts; p < (cut + 1) * parts / cuts; ++p) {
      const PackedConv::Panel& panel = packed.panels()[static_cast<std::size_t>(p)];
      const int columns = stored_columns(isa, conv, panel, output);
      const int tiles = divide_up(count, isa.max_rows[panel.vectors]);
      for (int t = 0; t < tiles; ++t) {
        const int begin = t * count / tiles, end = (t + 1) * count / tiles;
        isa.product[conv.half](end - begin, panel.vectors,
                    {origin + image * input.image + panel.group * (conv.in_channels / conv.groups),
                     rows + begin, segments.offset, segments.count, segments.depth,
                     packed.weights(panel), output.data + image * output.image + panel.first,
                     c_rows + begin, packed.bias(panel), columns, conv.relu});
      }
    }
  });
}

// Takes packed weights, numbered as in their buffer.
class Sink {
 public:
  Sink(Buffer& buffer, bool half, std::size_t first)
      : data_(reinterpret_cast<char*>(buffer.data())), half_(half), first_(first) {}
  void put(std::ptrdiff_t at, double value) {
    const auto number = static_cast<float>(value);
    const std::size_t place = first_ + static_cast<std::size_t>(at);
    if (half_) {
      const std::uint16_t half = to_half(number);
      std::memcpy(data_ + 2 * place, &half, 2);
      fits_ &= std::abs(number) <= kLargestHalf;
    } else {
      std::memcpy(data_ + 4 * place, &number, 4);
    }
  }
  bool fits() const { return fits_; }

 private:
  char* data_;
  bool half_, fits_ = true;
  std::size_t first_;
};

// The weights of one panel, [weight][input channel][output channel].
void pack_winograd(const Conv& conv, const Axes& axes, const PackedConv::Panel& panel, int width,
                   Sink& sink) {  // one weight is `panel.next` behind the other
  const int depth = conv.in_channels / conv.groups;
  const int rows = axes.rows->weights, columns = axes.columns->weights;
  for (int k = 0; k < depth; ++k) {
    for (int j = 0; j < panel.columns; ++j) {
      const float* tap = conv.weight + (std::ptrdiff_t{panel.first + j} * depth + k) * 9;
      for (int r = 0; r < rows; ++r) {
        double line[3];
        for (int x = 0; x < 3; ++x) {
          line[x] = axes.rows->taps[r][0] * tap[x] + axes.rows->taps[r][1] * tap[3 + x] +
                    axes.rows->taps[r][2] * tap[6 + x];
        }
        for (int c = 0; c < columns; ++c) {
          const double* t = axes.columns->taps[c];
          sink.put((r * columns + c) * panel.next + std::ptrdiff_t{k} * width + j,
                   line[0] * t[0] + line[1] * t[1] + line[2] * t[2]);
        }
      }
    }
  }
}

void pack_direct(const Conv& conv, const PackedConv::Panel& panel, int width, Sink& sink) {
  const int depth = conv.in_channels / conv.groups;
  const int taps = conv.taps();
  for (int tap = 0; tap < taps; ++tap) {
    for (int k = 0; k < depth; ++k) {
      for (int j = 0; j < panel.columns; ++j) {
        sink.put((std::ptrdiff_t{tap} * depth + k) * width + j,
                 conv.weight[(std::ptrdiff_t{panel.first + j} * depth + k) * taps + tap]);
      }
    }
  }
}

}  // namespace

std::string Algorithm::name() const {
  if (!winograd()) return "direct";
  return "F(" + std::to_string(rows) + "x" + std::to_string(columns) + ")";
}

bool applicable(const Isa& isa, const Conv& conv, const Algorithm& algorithm) {
  if (algorithm.vectors < 1 || algorithm.vectors > isa.max_vectors || algorithm.block < 1) {
    return false;
  }
  if (!algorithm.winograd()) return true;
  const Axes axes = axes_of(isa, conv, algorithm);
  return conv.kernel == 3 && axes.rows && axes.columns && (conv.stride == 1 || conv.dilation == 1);
}

Border border(const Isa& isa, const Conv& conv, const Algorithm& algorithm, int height,
              int width) {
  const int d = conv.padding();
  if (!algorithm.winograd()) return {d, d, d, d};
  const Axes axes = axes_of(isa, conv, algorithm);
  return {d, overhang(conv, *axes.rows, height), d, overhang(conv, *axes.columns, width)};
}

double multiplications(const Isa& isa, const Conv& conv, const Algorithm& algorithm, int height,
                       int width) {
  const double pairs = static_cast<double>(conv.in_channels) / conv.groups * conv.out_channels;
  if (!algorithm.winograd()) {
    return pairs * conv.taps() * conv.out_size(height) * conv.out_size(width);
  }
  const Axes axes = axes_of(isa, conv, algorithm);
  return pairs * axes.rows->products * axes.columns->products *
         TileLine(conv, *axes.rows, height).size() * TileLine(conv, *axes.columns, width).size();
}

PackedConv::PackedConv(const Isa& isa, const Conv& conv, const Algorithm& algorithm, Pool& pool)
    : conv_(conv) {
  const int outputs = conv.out_channels / conv.groups;
  const int depth = conv.in_channels / conv.groups;
  const Axes axes = algorithm.winograd() ? axes_of(isa, conv, algorithm) : Axes{};
  const int weights = algorithm.winograd() ? axes.rows->weights * axes.columns->weights : conv.taps();
  const bool by_points = algorithm.winograd() && algorithm.order == Order::points;
  std::size_t size = 0, biases = 0;
  for (int group = 0; group < conv.groups; ++group) {
    for (int first = 0; first < outputs;) {
      const int columns = std::min(outputs - first, algorithm.vectors * isa.lanes);
      const int vectors = divide_up(columns, isa.lanes);
      const std::size_t one = static_cast<std::size_t>(depth * vectors * isa.lanes);
      panels_.push_back({group, group * outputs + first, columns, vectors, size, biases,
                         static_cast<std::ptrdiff_t>(one)});
      size += by_points ? one : one * static_cast<std::size_t>(weights);
      biases += static_cast<std::size_t>(vectors * isa.lanes);
      first += columns;
    }
  }
  if (by_points) {  // all panels of one weight, then those of the next
    for (Panel& panel : panels_) panel.next = static_cast<std::ptrdiff_t>(size);
    size *= static_cast<std::size_t>(weights);
  }
  weights_ = Buffer(conv.half ? (size + 1) / 2 : size);
  bias_ = Buffer(biases);
  for (const Panel& panel : panels_) {
    std::copy_n(conv.bias + panel.first, panel.columns, bias_.data() + panel.bias);
  }
  std::atomic<bool> fits{true};
  pool.each(static_cast<std::int64_t>(panels_.size()), [&](int, std::int64_t item) {
    const Panel& panel = panels_[static_cast<std::size_t>(item)];
    Sink sink(weights_, conv.half, panel.weights);
    if (algorithm.winograd()) {
      pack_winograd(conv, axes, panel, panel.vectors * isa.lanes, sink);
    } else {
      pack_direct(conv, panel, panel.vectors * isa.lanes, sink);
    }
    if (!sink.fits()) fits = false;
  });
  if (!fits) {
    throw Error("weights: a convolution of " + std::to_string(conv.in_channels) + " to " +
                std::to_string(conv.out_channels) +
                " channels has one beyond 65504, the range of half precision; fp32 needed");
  }
}

std::size_t Scratch::bytes() const {
  std::size_t sum = shared.bytes();
  for (const Buffer& buffer : of_thread) sum += buffer.bytes();
  return sum;
}

void run(const Isa& isa, const PackedConv& packed, const Algorithm& algorithm, const Map& input,
         const Map& output, Pool& pool, Scratch& scratch) {
  scratch.of_thread.resize(static_cast<std::size_t>(pool.threads()));
  if (!algorithm.winograd()) {
    return run_directly(isa, packed, algorithm.block, input, output, pool);
  }
  const Winograd job(isa, packed, algorithm, input, output);
  if (algorithm.order == Order::points) return run_by_points(job, pool, scratch);
  (algorithm.order == Order::panels ? run_by_panels : run_by_blocks)(
      job, packed, algorithm.block, algorithm.vectors, pool, scratch);
}

}  // namespace rvgg
