// The kernels, once for all instruction sets: included by a file that defines RVGG_ISA (a
// namespace), RVGG_LANES (floats in a vector), RVGG_ROWS (rows of the register tiles 1, 2 and 3
// vectors wide) and RVGG_WIDEN (a vector from numbers in half precision), and that is compiled for
// that instruction set. Nothing here may be an inline
// function with external linkage: the linker could give its code to another processor.
#include <cstring>
#include <utility>

#include "kernels.hpp"
#include "toom_cook.hpp"

namespace rvgg {
namespace {

constexpr int W = RVGG_LANES;
typedef float vec __attribute__((vector_size(4 * W)));
typedef float loose_vec __attribute__((vector_size(4 * W), aligned(4), may_alias));

[[gnu::always_inline]] inline vec load(const float* p) {
  return *reinterpret_cast<const loose_vec*>(p);
}
// Numbers of 16 bits, IEEE half precision.
[[gnu::always_inline]] inline vec load(const std::uint16_t* p) { return RVGG_WIDEN(p); }
[[gnu::always_inline]] inline void store(float* p, vec v) {
  *reinterpret_cast<loose_vec*>(p) = v;
}
[[gnu::always_inline]] inline void store_some(float* p, vec v, int count) {
  if (count >= W) {
    store(p, v);
  } else if (count > 0) {
    std::memcpy(p, &v, sizeof(float) * static_cast<std::size_t>(count));
  }
}
[[gnu::always_inline]] inline vec at_least(vec least, vec v) {  // a NaN stays one
  return least > v ? least : v;
}

constexpr int kRows[4] = {0, RVGG_ROWS};

// Weights are fetched this far ahead. They are read in order, but what the processor
// fetches by itself ends at each page; at batch 1 this is a fifth of the time of a layer.
constexpr int kAheadBytes = 8192;
constexpr int kLineBytes = 64;

template <int Bytes>
[[gnu::always_inline]] inline void fetch(const char* from) {
#pragma GCC unroll 16
  for (int i = 0; i < Bytes; i += kLineBytes) __builtin_prefetch(from + i, 0, 2);
}
// The part of `next` that belongs to one of so many points.
template <class Task>
[[gnu::always_inline]] inline void fetch_next(const Task& task, int point) {
  const char* from = task.next + point * task.next_bytes / task.points;
  const char* end = task.next + (point + 1) * task.next_bytes / task.points;
  for (; from < end; from += kLineBytes) __builtin_prefetch(from, 0, 2);
}

// Every k of a register tile, four of them at a time if it leaves registers: what counts and jumps
// takes the multipliers' place where two threads share a core. (Of tiles three vectors wide sums
// would be spilled.)
template <int Vectors, class Step>
[[gnu::always_inline]] inline void each_k(int depth, const Step& step) {
  int k = 0;
  if constexpr (Vectors < 3) {
    for (; k + 4 <= depth; k += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) step(k + i);
    }
  }
  for (; k < depth; ++k) step(k);
}

template <int Rows, int Vectors>
[[gnu::always_inline]] inline void accumulate(vec (&sum)[Rows][Vectors],
                                              const float* const (&row)[Rows], int k,
                                              const vec (&w)[Vectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) sum[r][j] += row[r][k] * w[j];
  }
}

// Adds the products of `count` numbers of each row with the weights that `b` goes through.
template <int Rows, int Vectors, class Weight>
[[gnu::always_inline]] inline void add_products(vec (&sum)[Rows][Vectors],
                                                const float* const (&row)[Rows], int first,
                                                int count, const Weight*& b) {
  each_k<Vectors>(count, [&](int k) __attribute__((always_inline)) {
    vec w[Vectors];
    fetch<Vectors * W * sizeof(Weight)>(reinterpret_cast<const char*>(b) + kAheadBytes);
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) w[j] = load(b + j * W);
    accumulate(sum, row, first + k, w);
    b += Vectors * W;
  });
}

template <int Rows, int Vectors>
[[gnu::always_inline]] inline void load_bias(const Product& task, vec (&sum)[Rows][Vectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) sum[r][j] = load(task.bias + j * W);
  }
}

template <int Rows, int Vectors>
[[gnu::always_inline]] inline void store_tile(const Product& task,
                                              const vec (&sum)[Rows][Vectors]) {
  const vec least = vec{} + (task.relu ? 0.0f : -__builtin_inff());
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    float* c = task.c + task.c_row[r];
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) {
      store_some(c + j * W, at_least(least, sum[r][j]), task.columns - j * W);
    }
  }
}

template <int Rows>
[[gnu::always_inline]] inline void find_rows(const Product& task, int segment,
                                             const float* (&row)[Rows]) {
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) row[r] = task.a + task.row[r] + task.segment[segment];
}

// One register tile, few products: the sums over (segment, k) run from the first to the last.
template <int Rows, int Vectors, class Weight>
void product(const Product& task) {
  vec sum[Rows][Vectors];
  load_bias(task, sum);
  const auto* b = static_cast<const Weight*>(task.b);
  for (int s = 0; s < task.segments; ++s) {
    const float* row[Rows];
    find_rows(task, s, row);
    add_products(sum, row, 0, task.depth, b);
  }
  store_tile(task, sum);
}

// The same, of many products: the sum of each part of a segment by itself, and then the total, which
// is in the first cache meanwhile. (For few products this takes 5 to 15 % more time.)
template <int Rows, int Vectors, class Weight>
void long_product(const Product& task) {
  vec total[Rows][Vectors];
  load_bias(task, total);
  const auto* b = static_cast<const Weight*>(task.b);
  for (int s = 0; s < task.segments; ++s) {
    const float* row[Rows];
    find_rows(task, s, row);
    for (int k = 0; k < task.depth; k += kDirectChain) {
      vec sum[Rows][Vectors];
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
        for (int j = 0; j < Vectors; ++j) sum[r][j] = vec{};
      }
      const int part = task.depth - k < kDirectChain ? task.depth - k : kDirectChain;
      add_products(sum, row, k, part, b);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
        for (int j = 0; j < Vectors; ++j) total[r][j] += sum[r][j];
      }
    }
  }
  store_tile(task, total);
}

// C = A B or C += A B over `depth` channels, of which `weights` gives one row of B after the other.
template <int Rows, int Vectors, class Weights>
[[gnu::always_inline]] inline void chain(const float* a, std::ptrdiff_t a_row, int depth, float* c,
                                         bool add, const Weights& weights) {
  const float* row[Rows];
  vec sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    row[r] = a + r * a_row;
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) sum[r][j] = vec{};
  }
  each_k<Vectors>(depth, [&](int k) __attribute__((always_inline)) {
    vec w[Vectors];
    weights(w);
    accumulate(sum, row, k, w);
  });
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) {
      float* to = c + (r * Vectors + j) * W;
      store(to, add ? load(to) + sum[r][j] : sum[r][j]);
    }
  }
}

// Weights that are needed later are fetched meanwhile: `step` bytes from `ahead` on for each k.
template <int Rows, int Vectors, class Weight>
void point_product(const float* a, std::ptrdiff_t a_row, int depth, const Weight* b, float* c,
                   bool add, const char* ahead, std::ptrdiff_t step) {
  for (int k = 0; k < depth; k += kChain) {
    const int part = depth - k < kChain ? depth - k : kChain;
    chain<Rows, Vectors>(a + k, a_row, part, c, k || add, [&](vec* w) {
      fetch<Vectors * W * sizeof(Weight)>(ahead);
#pragma GCC unroll 16
      for (int j = 0; j < Vectors; ++j) w[j] = load(b + j * W);
      b += Vectors * W;
      ahead += step;
    });
  }
}

// The weights are made of taps in the registers.
template <int Rows, int Vectors>
void tap_product(const float* a, std::ptrdiff_t a_row, int depth, const float* taps,
                 const float* factors, float* c, bool add) {
  const vec f0 = vec{} + factors[0], f1 = vec{} + factors[1], f2 = vec{} + factors[2];
  chain<Rows, Vectors>(a, a_row, depth, c, add, [&](vec* w) {
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j, taps += 3 * W) {
      w[j] = f0 * load(taps) + f1 * load(taps + W) + f2 * load(taps + 2 * W);
    }
  });
}

template <class Weight>
struct Tables {
  using ProductFn = void (*)(const Product&);
  using PointFn = void (*)(const float*, std::ptrdiff_t, int, const Weight*, float*, bool,
                           const char*, std::ptrdiff_t);
  using TapFn = void (*)(const float*, std::ptrdiff_t, int, const float*, const float*, float*, bool);
  ProductFn product[4][kMaxRows + 1]{}, long_product[4][kMaxRows + 1]{};
  PointFn point[4][kMaxRows + 1]{};
  TapFn tap[4][kMaxRows + 1]{};  // whatever the weights are stored as

  template <int Vectors, int... R>
  constexpr void fill(std::integer_sequence<int, R...>) {
    ((product[Vectors][R + 1] = rvgg::product<R + 1, Vectors, Weight>), ...);
    ((long_product[Vectors][R + 1] = rvgg::long_product<R + 1, Vectors, Weight>), ...);
    ((point[Vectors][R + 1] = point_product<R + 1, Vectors, Weight>), ...);
    ((tap[Vectors][R + 1] = tap_product<R + 1, Vectors>), ...);
  }
  constexpr Tables() {
    fill<1>(std::make_integer_sequence<int, kRows[1]>{});
    fill<2>(std::make_integer_sequence<int, kRows[2]>{});
    fill<3>(std::make_integer_sequence<int, kRows[3]>{});
  }
};
template <class Weight>
constexpr Tables<Weight> kTables;

template <class Weight>
void run_product(int rows, int vectors, const Product& task) {
  const bool at_once = task.segments * task.depth <= kDirectChain;
  const Tables<Weight>& tables = kTables<Weight>;
  (at_once ? tables.product : tables.long_product)[vectors][rows](task);
}

int row_blocks(int rows, int vectors) { return (rows + kRows[vectors] - 1) / kRows[vectors]; }

// Register tiles of all rows of each point, `each`(point, block, its first row, how many, C). Rows are
// split evenly (7 + 7 and not 12 + 2): narrow register tiles waste the multipliers.
template <class Task, class Each>
[[gnu::always_inline]] inline void each_register_tile(const Task& task, int vectors,
                                                      const Each& each) {
  const int blocks = row_blocks(task.rows, vectors);
  for (int p = 0; p < task.points; ++p) {
    fetch_next(task, p);
    for (int block = 0; block < blocks; ++block) {
      const int first = block * task.rows / blocks, end = (block + 1) * task.rows / blocks;
      each(p, block, first, end - first,
           task.c + (std::ptrdiff_t{p} * task.rows + first) * vectors * W);
    }
  }
}

template <class Weight>
void run_points(int vectors, const PointProducts& task) {
  // Each block of rows reads the weights of the point again, all but the first from the cache. They
  // share out what is to be fetched for later points, so that memory never waits.
  const int blocks = row_blocks(task.rows, vectors);
  const std::ptrdiff_t row = std::ptrdiff_t{vectors} * W * static_cast<int>(sizeof(Weight));
  const std::ptrdiff_t size = task.depth * row, step = row / blocks;
  const std::ptrdiff_t distance = blocks == 1 ? kAheadBytes : (kAheadBytes + size - 1) / size * size;
  each_register_tile(task, vectors, [&](int p, int block, int first, int rows, float* c) {
    const Weight* b = static_cast<const Weight*>(task.b) + task.weight[p] * task.b_weight;
    const char* ahead = reinterpret_cast<const char*>(b) + distance + block * task.depth * step;
    kTables<Weight>.point[vectors][rows](task.a + p * task.a_point + first * task.a_row, task.a_row,
                                         task.depth, b, c, task.add, ahead, step);
  });
}

void run_tap_points(int vectors, const TapProducts& task) {
  each_register_tile(task, vectors, [&](int p, int, int first, int rows, float* c) {
    kTables<float>.tap[vectors][rows](task.a + p * task.a_point + first * task.a_row, task.a_row,
                                      task.depth, task.taps, task.factors[p], c, task.add);
  });
}

void multiply_add(int count, float* numbers) {
  vec sum[kMultiplyAdds];
#pragma GCC unroll 16
  for (int i = 0; i < kMultiplyAdds; ++i) sum[i] = load(numbers + i * W);
  const vec a = vec{} + 0.75f, b = vec{} + 0.25f;
  for (int n = 0; n < count; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < kMultiplyAdds; ++i) sum[i] = sum[i] * a + b;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kMultiplyAdds; ++i) store(numbers + i * W, sum[i]);
}

// Every line: read In numbers, make Out of them, and give them to `finish` with their place. A copy of
// `lines` is not read again after each store.
template <int In, int Out, class Number = float, class Make, class Finish>
[[gnu::always_inline]] inline void each_line(const Lines lines, const Make& make,
                                             const Finish& finish) {
  const auto* src = static_cast<const Number*>(lines.src);
  float* dst = lines.dst;
  for (int l = 0; l < lines.count; ++l, src += lines.next, dst += lines.dst_next) {
    vec in[In], out[Out];
#pragma GCC unroll 16
    for (int i = 0; i < In; ++i) in[i] = load(src + i * lines.step);
    make(in, out);
#pragma GCC unroll 16
    for (int i = 0; i < Out; ++i) finish(dst + i * lines.dst_step, i, out[i]);
  }
}
constexpr auto kStoreAll = [](float* dst, int, vec v) { store(dst, v); };

template <class S>
void transform_input(const Lines& lines) {
  each_line<S::kInputs, S::kProducts>(
      lines, [](const vec* d, vec* t) { S::input(d, t); }, kStoreAll);
}

// Row I of G times the taps. Rows of a pair of points differ in the sign of the middle one alone, so
// what comes before it is computed once.
template <class S, int I>
[[gnu::always_inline]] inline vec transformed_tap(const vec* g) {
  constexpr auto row = S::taps()[I];
  constexpr float a = static_cast<float>(row[0]), b = static_cast<float>(row[1]),
                  c = static_cast<float>(row[2]);
  if constexpr (a == 0 && c == 0) return b * g[1];
  vec sum;
  if constexpr (a != 0 && c != 0) {
    sum = a * g[0] + c * g[2];
  } else if constexpr (a != 0) {
    sum = a * g[0];
  } else {
    sum = c * g[2];
  }
  if constexpr (b != 0) sum += b * g[1];
  return sum;
}

template <class S, int... I>
[[gnu::always_inline]] inline void transform_taps(std::integer_sequence<int, I...>, const vec* g,
                                                  vec* u) {
  ((u[I] = transformed_tap<S, I>(g)), ...);
}

template <class S, class Number>
void transform_kernel(const Lines& lines) {
  each_line<3, S::kWeights, Number>(
      lines,
      [](const vec* g, vec* u) {
        transform_taps<S>(std::make_integer_sequence<int, S::kWeights>{}, g, u);
      },
      kStoreAll);
}

template <class S>
void transform_output(const Lines& lines) {
  each_line<S::kProducts, S::kOutputs>(
      lines, [](const vec* t, vec* y) { S::template output<false>(t, y); }, kStoreAll);
}

template <class S, class Finish>
[[gnu::always_inline]] inline void finish_output(const Lines& lines, const Epilogue& epilogue,
                                                 const Finish& finish) {
  const vec bias = load(epilogue.bias);
  const vec least = vec{} + (epilogue.relu ? 0.0f : -__builtin_inff());
  each_line<S::kProducts, S::kOutputs>(
      lines,
      [&](const vec* t, vec* y) {
#pragma GCC unroll 16
        for (int i = 0; i < S::kOutputs; ++i) y[i] = bias;
        S::template output<true>(t, y);
      },
      [&](float* dst, int i, vec v) { finish(dst, i, at_least(least, v)); });
}

template <class S>
void store_output(const Lines& lines, const Epilogue& epilogue) {
  if (epilogue.items == S::kOutputs && epilogue.columns >= W) {
    finish_output<S>(lines, epilogue, kStoreAll);
  } else {
    finish_output<S>(lines, epilogue, [&](float* dst, int i, vec v) {
      if (i < epilogue.items) store_some(dst, v, epilogue.columns);
    });
  }
}

template <int M, int Stride>
constexpr Axis make_axis() {
  using S = Scheme<M, Stride>;
  static_assert(S::kProducts <= kMaxProducts);
  Axis axis{};
  axis.outputs = M;
  axis.stride = Stride;
  axis.inputs = S::kInputs;
  axis.step = S::kStep;
  axis.products = S::kProducts;
  axis.weights = S::kWeights;
  const auto taps = S::taps();
  for (int i = 0; i < S::kWeights; ++i) {
    for (int j = 0; j < 3; ++j) axis.taps[i][j] = taps[static_cast<std::size_t>(i)][j];
  }
  for (int i = 0; i < S::kProducts; ++i) {
    axis.weight[i] = static_cast<std::uint8_t>(S::weight(i));
  }
  axis.kernel[0] = transform_kernel<S, float>;
  axis.kernel[1] = transform_kernel<S, std::uint16_t>;
  axis.input = transform_input<S>;
  axis.output = transform_output<S>;
  axis.store = store_output<S>;
  return axis;
}

constexpr Axis kAxes[] = {make_axis<2, 1>(), make_axis<3, 1>(), make_axis<4, 1>(),
                          make_axis<5, 1>(), make_axis<6, 1>(), make_axis<7, 1>(),
                          make_axis<2, 2>(), make_axis<3, 2>(), make_axis<4, 2>(),
                          make_axis<5, 2>(), make_axis<7, 2>()};

const Axis* find_axis(int outputs, int stride) {
  for (const Axis& axis : kAxes) {
    if (axis.outputs == outputs && axis.stride == stride) return &axis;
  }
  return nullptr;
}

void mean_pool(const float* src, std::ptrdiff_t pixel, std::ptrdiff_t row, int height, int width,
               int channels, float* dst) {
  const float scale = 1.0f / (static_cast<float>(height) * static_cast<float>(width));
  for (int c = 0; c < channels; c += W) {
    vec sum{};
    for (int y = 0; y < height; ++y) {
      for (int x = 0; x < width; ++x) sum += load(src + y * row + x * pixel + c);
    }
    store(dst + c, sum * scale);
  }
}

}  // namespace

namespace RVGG_ISA {
bool supported();
extern const Isa isa;
const Isa isa = {RVGG_NAME,
                 W,
                 3,
                 {0, RVGG_ROWS},
                 supported,
                 {run_product<float>, run_product<std::uint16_t>},
                 {run_points<float>, run_points<std::uint16_t>},
                 run_tap_points,
                 multiply_add,
                 find_axis,
                 mean_pool};
}  // namespace RVGG_ISA
}  // namespace rvgg
