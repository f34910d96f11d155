// Convolutions: what an algorithm needs and costs, and the direct one.
#include "conv.hpp"

#include "tiles.hpp"

namespace rvgg {

namespace {

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
  run_winograd(isa, packed, algorithm, input, output, pool, scratch);
}

}  // namespace rvgg
