// Minimal filtering algorithms F(M, R) of Toom and Cook, derived from a list of points.
//
// M outputs of a correlation with R taps, y[k] = sum_j g[j] d[k + j], come from M + R - 1 products:
//
//     y = A^T [ (G g) * (B^T d) ]
//
// With the points p_i (one of them infinity) row i of B^T holds the coefficients of the polynomial
// that is zero at every other point, column i of A^T the powers of p_i, and row i of G the powers
// of p_i divided by the value of that polynomial at p_i. All of it is computed at compile time and
// exact: the points are binary fractions of few digits. (Winograd, "Arithmetic Complexity of
// Computations", 1980; Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016.)
//
// The points are pairs +p and -p, infinity, and 0 where the number of the others is odd. The
// polynomials of a pair differ in the sign of their odd part alone, so each part is summed once.
#pragma once

#include <array>
#include <utility>

namespace rvgg {

// The positive points of each number of pairs, without and with 0. Rounding errors grow with the
// norms of the three matrices; these have the smallest among fractions of small denominators, by
// search. The usual 0, 1, 2, 1/2, 4 lose up to a digit: F(7, 3) with them is 8 times less exact.
constexpr int kMaxPairs = 4;
constexpr double kPoints[2][kMaxPairs + 1][kMaxPairs] = {
    {{}, {1}, {0.375, 1.25}, {0.25, 0.875, 1.75}, {0.25, 0.75, 1, 2.5}},
    {{}, {1}, {0.75, 1.5}, {0.5, 1, 2}, {}}};

constexpr double power(double x, int exponent) {
  double result = 1;
  while (exponent-- > 0) result *= x;
  return result;
}

template <int M, int R>
struct ToomCook {
  static constexpr int kProducts = M + R - 1;
  static constexpr int kPairs = (kProducts - 1) / 2;
  static constexpr int kZero = (kProducts - 1) % 2;  // 1 if 0 is a point: the first, then
  static constexpr int kInfinity = kProducts - 1;
  static_assert(M >= 1 && R >= 2 && kPairs >= 1 && kPairs <= kMaxPairs);
  static constexpr double point(int pair) { return kPoints[kZero][kPairs][pair]; }

  // Coefficients in y = x^2 of the product of (y - p^2) over the pairs, all or all but one.
  using Polynomial = std::array<double, kPairs + 1>;
  static constexpr Polynomial pair_product(int without) {
    Polynomial terms{1};
    int degree = 0;
    for (int i = 0; i < kPairs; ++i) {
      if (i == without) continue;
      ++degree;
      for (int j = degree; j >= 0; --j) {
        terms[j] = (j ? terms[j - 1] : 0) - terms[j] * point(i) * point(i);
      }
    }
    return terms;
  }

  // Row i of G is divided by 2^exponent and column i of A^T multiplied by it, so that transformed
  // weights are about as large as the weights: half precision could not hold them otherwise.
  static constexpr double scale(int i) {
    const std::array<double, R> row = plain_filter()[i];
    double norm = 0, result = 1;
    for (double value : row) norm += value * value;
    while (norm * result * result < 0.5) result *= 2;
    while (norm * result * result >= 2) result /= 2;
    return 1 / result;
  }

  // t = B^T d. V is any type with + - * (a number or a vector of numbers).
  template <class V>
  [[gnu::always_inline]] static void input(const V* d, V* t) {
    constexpr Polynomial all = pair_product(-1);
    if constexpr (kZero) t[0] = combine<all, kPairs + 1>(d);
    each_pair(std::make_integer_sequence<int, kPairs>{}, d, t);
    t[kInfinity] = combine<all, kPairs + 1>(d + kZero);
  }

  // y = A^T t, or y += A^T t.
  template <bool Add, class V>
  [[gnu::always_inline]] static void output(const V* t, V* y) {
    // Named, so that the compiler has to compute them, and not the processor for each line.
    constexpr auto factors = coefficients();
    constexpr float zero = kZero ? static_cast<float>(scale(0)) : 0;
    V sum[kPairs], difference[kPairs];
#pragma GCC unroll 16
    for (int i = 0; i < kPairs; ++i) {
      sum[i] = t[kZero + 2 * i] + t[kZero + 2 * i + 1];
      difference[i] = t[kZero + 2 * i] - t[kZero + 2 * i + 1];
    }
#pragma GCC unroll 16
    for (int k = 0; k < M; ++k) {
      // What is added anyway comes first: the rest are multiply-adds then.
      V value = factors[0][k] * (k % 2 ? difference[0] : sum[0]);
      if (k == M - 1) value = t[kInfinity] + value;
      if (Add) value = y[k] + value;
#pragma GCC unroll 16
      for (int i = 1; i < kPairs; ++i) {
        value += factors[i][k] * (k % 2 ? difference[i] : sum[i]);
      }
      if (kZero && k == 0) value += zero * t[0];
      y[k] = value;
    }
  }

  // G, row by row.
  static constexpr std::array<std::array<double, R>, kProducts> filter() {
    std::array<std::array<double, R>, kProducts> g = plain_filter();
    for (int i = 0; i < kProducts; ++i) {
      for (double& value : g[i]) value /= scale(i);
    }
    return g;
  }

 private:
  // Of A^T, for both points of a pair and the k-th output.
  static constexpr std::array<std::array<float, M>, kPairs> coefficients() {
    std::array<std::array<float, M>, kPairs> result{};
    for (int i = 0; i < kPairs; ++i) {
      for (int k = 0; k < M; ++k) {
        result[i][k] = static_cast<float>(power(point(i), k) * scale(kZero + 2 * i));
      }
    }
    return result;
  }

  static constexpr std::array<std::array<double, R>, kProducts> plain_filter() {
    std::array<std::array<double, R>, kProducts> g{};
    const auto value = [](const Polynomial& in_y, double x) {
      double sum = 0;
      for (int j = 0; j <= kPairs; ++j) sum += in_y[j] * power(x * x, j);
      return sum;
    };
    if (kZero) g[0][0] = 1 / value(pair_product(-1), 0);
    for (int i = 0; i < 2 * kPairs; ++i) {
      const double x = i % 2 ? -point(i / 2) : point(i / 2);
      // The polynomial: that of the other pairs, (x + p) for +p and (x - p) for -p, and x for 0.
      const double scale = value(pair_product(i / 2), x) * 2 * x * (kZero ? x : 1);
      for (int j = 0; j < R; ++j) g[kZero + i][j] = power(x, j) / scale;
    }
    g[kInfinity][R - 1] = 1;
    return g;
  }

  // sum_j C[j] d[2 j], over the first `Count` coefficients, of which the last is 1.
  template <Polynomial C, int Count, class V>
  [[gnu::always_inline]] static V combine(const V* d) {
    static_assert(C[Count - 1] == 1);
    V value = d[2 * (Count - 1)];
#pragma GCC unroll 16
    for (int j = 0; j + 1 < Count; ++j) value += static_cast<float>(C[j]) * d[2 * j];
    return value;
  }

  template <int... I, class V>
  [[gnu::always_inline]] static void each_pair(std::integer_sequence<int, I...>, const V* d, V* t) {
    (pair<I>(d + kZero, t + kZero + 2 * I), ...);
  }
  // (x +- p) times the product of the other pairs.
  template <int I, class V>
  [[gnu::always_inline]] static void pair(const V* d, V* t) {
    constexpr Polynomial others = pair_product(I);
    const V odd = combine<others, kPairs>(d + 1);
    const V even = static_cast<float>(point(I)) * combine<others, kPairs>(d);
    t[0] = odd + even;
    t[1] = odd - even;
  }
};

// One dimension of a convolution with three taps: tiles of M outputs with the given stride.
template <int M, int Stride>
struct Scheme;

template <int M>
struct Scheme<M, 1> : ToomCook<M, 3> {
  using Base = ToomCook<M, 3>;
  static constexpr int kOutputs = M, kInputs = M + 2, kStep = M, kWeights = Base::kProducts;
  // Which row of `taps` each product takes.
  static constexpr int weight(int product) { return product; }
  static constexpr std::array<std::array<double, 3>, kWeights> taps() { return Base::filter(); }
};

// Stride 2: the even samples meet the outer taps, an F(M, 2); each odd one meets the middle tap
// once. 2 M + 1 products in place of 3 M, with M + 2 different weights. (Huang et al., "DWM: A
// Decomposable Winograd Method for Convolution Acceleration", 2020.)
template <int M>
struct Scheme<M, 2> {
  using Even = ToomCook<M, 2>;
  static constexpr int kOutputs = M, kInputs = 2 * M + 1, kStep = 2 * M;
  static constexpr int kProducts = 2 * M + 1, kWeights = M + 2;
  static constexpr int weight(int product) { return product <= M ? product : M + 1; }

  template <class V>
  [[gnu::always_inline]] static void input(const V* d, V* t) {
    V even[M + 1];
#pragma GCC unroll 16
    for (int i = 0; i <= M; ++i) even[i] = d[2 * i];
    Even::input(even, t);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) t[M + 1 + i] = d[2 * i + 1];
  }
  template <bool Add, class V>
  [[gnu::always_inline]] static void output(const V* t, V* y) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) y[i] = Add ? y[i] + t[M + 1 + i] : t[M + 1 + i];
    Even::template output<true>(t, y);
  }
  static constexpr std::array<std::array<double, 3>, kWeights> taps() {
    std::array<std::array<double, 3>, kWeights> rows{};
    const auto outer = Even::filter();
    for (int i = 0; i <= M; ++i) rows[i] = {outer[i][0], 0.0, outer[i][1]};
    rows[M + 1] = {0.0, 1.0, 0.0};
    return rows;
  }
};

}  // namespace rvgg
