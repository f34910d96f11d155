// What the kernels of every instruction set offer. All numbers are fp32, but for weights, which may
// be stored in half precision; all offsets count numbers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rvgg {

constexpr int kMaxRows = 14;      // of a register tile
constexpr int kMaxProducts = 15;  // of one dimension of a Winograd tile
// Sums of this many products are made in the registers and then added up: the error of a sum grows
// with its length, and the inverse transform of a large tile amplifies it.
constexpr int kChain = 48;
// The same of a direct convolution, where nothing amplifies the error.
constexpr int kDirectChain = 192;

// Independent ones, enough to keep every multiplier busy.
constexpr int kMultiplyAdds = 12;

// C[r][j] = bias[j] + sum over s, k of A[r][s][k] B[s][k][j], with or without ReLU.
struct Product {
  const float* a;          // A[r][s][k] = a[row[r] + segment[s] + k]
  const std::int32_t* row;
  const std::int32_t* segment;
  int segments;
  int depth;               // k of one segment
  const void* b;           // [segments][depth][vectors * lanes]
  float* c;                // C[r][j] = c[c_row[r] + j]
  const std::int32_t* c_row;
  const float* bias;       // vectors * lanes numbers
  int columns;             // how many j to store, at most vectors * lanes
  bool relu;
};

// The points of a Winograd tile: for each of them C = A B or C += A B, without bias.
struct PointProducts {
  const float* a;  // A[p][r][k] = a[p * a_point + r * a_row + k]
  std::ptrdiff_t a_point, a_row;
  int rows, depth;
  const void* b;                  // B[w][k][j] = b[w * b_weight + k * vectors * lanes + j]
  std::ptrdiff_t b_weight;
  const std::uint8_t* weight;     // which of them each point takes
  int points;
  float* c;                       // C[p][r][j], dense
  bool add = false;               // to what is there
  const char* next = nullptr;     // what will be needed then, to be fetched meanwhile
  std::ptrdiff_t next_bytes = 0;
};

// As `PointProducts`, of weights of which one dimension is transformed beforehand and the other one
// here, in the registers: those of a point are factor[0] t[0] + factor[1] t[1] + factor[2] t[2].
struct TapProducts {
  const float* a;
  std::ptrdiff_t a_point, a_row;
  int rows, depth;
  const float* taps;          // [depth][vectors][3][lanes]
  const float (*factors)[3];  // of each point
  int points;
  float* c;
  bool add;
  const char* next;  // as above
  std::ptrdiff_t next_bytes;
};

// A 1-D transform of many lines of vectors. Item i of line l is read at src[i * step + l * next]
// and written at dst[i * dst_step + l * dst_next], `lanes` numbers each.
struct Lines {
  const void* src;  // fp32, but for `Axis::kernel`
  std::ptrdiff_t step, next;
  float* dst;
  std::ptrdiff_t dst_step, dst_next;
  int count;
};

// How the last pass of the inverse transform stores: the first `items` of each line, with bias.
struct Epilogue {
  const float* bias;  // `lanes` numbers
  int items;
  int columns;        // how many numbers of each vector, at most `lanes`
  bool relu;
};

using TransformFn = void (*)(const Lines&);
using StoreFn = void (*)(const Lines&, const Epilogue&);

// One dimension of the tile: M outputs with a stride.
struct Axis {
  int outputs, stride;
  int inputs, step, products, weights;
  std::uint8_t weight[kMaxProducts];  // of each product
  double taps[kMaxProducts][3];       // of each weight
  // G, of lines in fp32 (0) and in half precision (1), where `src` points to such numbers.
  TransformFn kernel[2];
  TransformFn input;                  // B^T
  TransformFn output;                 // A^T
  StoreFn store;                      // A^T, bias, ReLU
};

struct Isa {
  const char* name;
  int lanes;
  int max_vectors;                  // of a register tile
  int max_rows[4];                  // of a register tile that is 1, 2 or 3 vectors wide
  bool (*supported)();
  // Of weights in fp32 (0) and in half precision (1).
  void (*product[2])(int rows, int vectors, const Product&);
  void (*points[2])(int vectors, const PointProducts&);
  void (*tap_points)(int vectors, const TapProducts&);
  // As fast as the processor can: `count` times kMultiplyAdds vectors, from and to `numbers`.
  void (*multiply_add)(int count, float* numbers);
  const Axis* (*axis)(int outputs, int stride);  // null if there is none
  void (*pool)(const float* src, std::ptrdiff_t pixel, std::ptrdiff_t row, int height, int width,
               int channels, float* dst);        // means; channels is a multiple of the lanes
};

// The instruction sets of this build, the best first.
const Isa* const* isas();
// By name, or the best that this processor has; null if there is none of that name here.
const Isa* find_isa(const char* name);

}  // namespace rvgg
