// Convolution by Winograd tiles: transform, multiply point by point, transform back.
#include "tiles.hpp"

namespace rvgg {

namespace {

// Rows this many bytes apart would fall into the same few sets of the first cache.
int avoid_aliasing(int floats) { return floats % 128 ? floats : floats + 16; }

std::ptrdiff_t odd_lines(std::ptrdiff_t floats) {
  const std::ptrdiff_t lines = (floats + 15) / 16;
  return (lines | 1) * 16;
}

// Input channels whose weights are transformed together: the half transformed ones stay in the first
// cache.
constexpr int kTapsAtOnce = 8;

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
    for (int j = 0; j < axes_.columns->products; ++j) {
      const double* taps = axes_.columns->taps[axes_.columns->weight[j]];
      for (int x = 0; x < 3; ++x) factors_[j][x] = static_cast<float>(taps[x]);
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
    const int of_tile = kMaxProducts * kMaxProducts, of_taps = kMaxProducts * kTapsAtOnce * 3 * 3;
    return static_cast<std::size_t>(std::max(of_tile, of_taps) * isa_.lanes);
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

  // As `multiply`, of weights that are transformed here, a part of the input channels at a time.
  void multiply_fresh(const PackedConv::Panel& panel, std::int64_t first, std::int64_t end,
                      const float* a, std::ptrdiff_t a_point, float* products, float* u,
                      float* lines) const {
    const int count = static_cast<int>(end - first), width = panel.vectors * isa_.lanes;
    const int depth = conv_.in_channels / conv_.groups;
    const std::ptrdiff_t bytes = conv_.half ? sizeof(std::uint16_t) : sizeof(float);
    for (int k = 0; k < depth; k += kChain) {
      const int part = std::min(kChain, depth - k);
      const char* taps = static_cast<const char*>(packed_.weights(panel)) + bytes * k * 9 * width;
      transform_weights(taps, part, panel.vectors, u, lines);
      isa_.points[0](panel.vectors,
                     {a + first * a_row_ + std::ptrdiff_t{panel.group} * depth + k, a_point, a_row_,
                      count, part, u, u_weight(panel.vectors), weight_, points_, products, k > 0,
                      taps + bytes * part * 9 * width, bytes * part * 9 * width});
    }
    for (std::int64_t tile = first; tile < end; ++tile) {
      store(panel, tile, products + (tile - first) * width, std::ptrdiff_t{count} * width, lines);
    }
  }
  std::size_t fresh_size(int vectors) const {
    return static_cast<std::size_t>(axes_.rows->weights * axes_.columns->weights * u_weight(vectors));
  }

  // As `multiply_fresh`, but only the rows of the kernels are transformed beforehand, and the columns
  // in the registers.
  void multiply_fused(const PackedConv::Panel& panel, std::int64_t first, std::int64_t end,
                      const float* a, std::ptrdiff_t a_point, float* products, float* taps,
                      float* lines) const {
    const int count = static_cast<int>(end - first), width = panel.vectors * isa_.lanes;
    const int depth = conv_.in_channels / conv_.groups, columns = axes_.columns->products;
    const std::ptrdiff_t bytes = conv_.half ? sizeof(std::uint16_t) : sizeof(float);
    for (int k = 0; k < depth; k += kChain) {
      const int part = std::min(kChain, depth - k), lines_of = part * panel.vectors * 3;
      const char* raw = static_cast<const char*>(packed_.weights(panel)) + bytes * k * 9 * width;
      const std::ptrdiff_t line = std::ptrdiff_t{lines_of} * isa_.lanes;
      axes_.rows->kernel[conv_.half](
          {raw, isa_.lanes, 3 * isa_.lanes, taps, line, isa_.lanes, lines_of});
      const int rows = axes_.rows->products;
      const std::ptrdiff_t read = bytes * part * 9 * width;
      const float* inputs = a + first * a_row_ + std::ptrdiff_t{panel.group} * depth + k;
      for (int i = 0; i < rows; ++i) {
        const std::ptrdiff_t point = std::ptrdiff_t{i} * columns;
        isa_.tap_points(panel.vectors, {inputs + point * a_point, a_point, a_row_, count, part,
                                        taps + axes_.rows->weight[i] * line, factors_, columns,
                                        products + point * count * width, k > 0,
                                        raw + read + read * i / rows, read / rows});
      }
    }
    for (std::int64_t tile = first; tile < end; ++tile) {
      store(panel, tile, products + (tile - first) * width, std::ptrdiff_t{count} * width, lines);
    }
  }
  std::size_t taps_size(int vectors) const {
    return static_cast<std::size_t>(axes_.rows->weights * 3 * u_weight(vectors));
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

  std::ptrdiff_t u_weight(int vectors) const { return kChain * vectors * isa_.lanes; }

  // G g G^T of the taps of `count` input channels: U[weight][input channel][output channel].
  void transform_weights(const char* taps, int count, int vectors, float* u, float* lines) const {
    const int lanes = isa_.lanes, width = vectors * lanes;
    const std::ptrdiff_t bytes = conv_.half ? sizeof(std::uint16_t) : sizeof(float);
    for (int k = 0; k < count; k += kTapsAtOnce) {
      const int part = std::min(kTapsAtOnce, count - k) * vectors;
      const std::ptrdiff_t line = std::ptrdiff_t{part} * 3 * lanes;
      axes_.rows->kernel[conv_.half](
          {taps + bytes * k * 9 * width, lanes, 3 * lanes, lines, line, lanes, 3 * part});
      for (int i = 0; i < axes_.rows->weights; ++i) {
        axes_.columns->kernel[0]({lines + i * line, lanes, 3 * lanes,
                                  u + i * axes_.columns->weights * u_weight(vectors) + k * width,
                                  u_weight(vectors), lanes, part});
      }
    }
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
  float factors_[kMaxProducts][3];  // of the columns' products
};

// Before the threads start, so that none of them waits for memory.
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
                   Order order, Pool& pool, Scratch& scratch) {
  const std::int64_t tiles = job.tiles();
  const std::int64_t blocks = (tiles + block - 1) / block;
  const std::int64_t largest = (tiles + blocks - 1) / blocks;
  const std::ptrdiff_t a_point = job.a_point(tiles);
  const std::size_t c_size = whole_lines(job.products_size(static_cast<int>(largest), vectors));
  const std::size_t u_size = order == Order::fresh   ? job.fresh_size(vectors)
                             : order == Order::fused ? whole_lines(job.taps_size(vectors))
                                                     : 0;
  scratch.shared.reserve(job.transformed_size(tiles));
  reserve(scratch, c_size + u_size + job.lines_size());
  float* a = scratch.shared.data();
  pool.each(tiles, [&](int thread, std::int64_t tile) {
    job.transform(tile, a, a_point, tile, of_thread(scratch, thread));
  });
  pool.each(static_cast<std::int64_t>(packed.panels().size()), [&](int thread, std::int64_t item) {
    const PackedConv::Panel& panel = packed.panels()[static_cast<std::size_t>(item)];
    float* products = of_thread(scratch, thread);
    float* u = products + c_size;
    float* lines = u + u_size;
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t first = b * tiles / blocks, end = (b + 1) * tiles / blocks;
      if (order == Order::fresh) {
        job.multiply_fresh(panel, first, end, a, a_point, products, u, lines);
      } else if (order == Order::fused) {
        job.multiply_fused(panel, first, end, a, a_point, products, u, lines);
      } else {
        job.multiply(panel, first, end, a, a_point, first, products, lines);
      }
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

}  // namespace

void run_winograd(const Isa& isa, const PackedConv& packed, const Algorithm& algorithm,
                  const Map& input, const Map& output, Pool& pool, Scratch& scratch) {
  const Winograd job(isa, packed, algorithm, input, output);
  if (algorithm.order == Order::points) return run_by_points(job, pool, scratch);
  if (algorithm.order == Order::blocks) {
    return run_by_blocks(job, packed, algorithm.block, algorithm.vectors, pool, scratch);
  }
  run_by_panels(job, packed, algorithm.block, algorithm.vectors, algorithm.order, pool, scratch);
}

}  // namespace rvgg
