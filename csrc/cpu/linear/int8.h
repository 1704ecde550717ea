// The integer form of the linear layer, inside the CPU kernels: inputs quantized row by row, and their products with packed weights.
//
//     output(m, r) = scale[m] * factor[r] * sum over c of q(m, c) * t(r, c)   (+ outliers) + bias[r]
//
// t are the entries of an int8 table at the packed indices, |t| <= 127. q are integers of a row: its numbers in steps of scale[m].
// The sum is exact, so every path, and every order, gives the same integer.
//
// How a row is rounded. Let d = (max - min) / 255, both taken over the row and 0. Steps of d would fit all numbers into 8 bits; where a
// few numbers are large and all others small, steps of d / 2, d / 4, d / 8 or d / 16 serve the many better, and what the few have
// beyond 8 bits is multiplied once more. A window of 256 steps (from the least number on, but at most 128 below zero) holds the many.
// A number e steps outside counts as ceil(e / 256) more products with its column, and four columns (the same byte of them, see below) share
// these. Of the steps tried in turn, the finest is taken with which a row costs at most max(2, a 32nd of its products) more.
//
// What is multiplied differs by path:
//
//     AMX, VNNI                 q less the least of the window, 8 bits unsigned, 16,384 or 64 products in one instruction. What is outside
//                               goes into a list.
//     AVX-VNNI, AVX2, scalar    q in 16 bits, 16 products in one instruction (vpdpwssd) or two (vpmaddwd, vpaddd). Nothing is outside.
#pragma once
#include <vector>

#include "../../kmq.h"
#include "gemm.h"

namespace kmq::cpu {

// Rows of the weight in a panel.
constexpr int kInt8Rows = 16, kInt8RowsVnni = 32;
constexpr int kInt8Halvings = 4;  // of the step

// Numbers of a row that share what they have beyond the window: 16 fields below one another, of a block of 128 columns; 32 a block.
// Field f of lane l is column 16 f + l, as in the layout of packed indices; group p * 16 + l holds fields p, p + 2, p + 4 and p + 6.
constexpr int64_t kInt8Group = 4;

inline int64_t int8_padded(int64_t cols) { return round_up(std::max<int64_t>(cols, 1), kBlock); }
inline int64_t int8_most_added(int64_t cols) { return std::max<int64_t>(2, int8_padded(cols) / kInt8Group / 32); }

// What four columns have beyond the window: bytes to be multiplied once more, and where.
struct Int8Added {
  int32_t group;
  uint32_t bytes;
};

// What belongs to a quantized row. What is outside its window is a list, of VNNI only.
struct Int8Row {
  float scale;           // NaN for a row that is not finite
  int32_t least;         // q of the byte 0
  int32_t above, below;  // entries of the list that are added, then entries that are taken away
};
constexpr int64_t kInt8RowFloats = sizeof(Int8Row) / sizeof(float);

// Bytes from one quantized row to the next, its list behind its numbers. A row lists its additions by 255, but counts them by 256, so at
// most twice as many as it may cost. An odd number of cache lines, so that the rows of a tile fall in different sets.
inline int64_t int8_stride(int64_t cols) {
  const int64_t numbers = int8_padded(cols) * (vnni() ? 1 : 2), list = vnni() ? 2 * int8_most_added(cols) * sizeof(Int8Added) : 0;
  return (ceil_div(numbers + list, 64) | 1) * 64;
}

// Rows `cols` long, quantized: `data` at int8_stride apart, `row` one each.
struct Int8Input {
  uint8_t* data;
  Int8Row* row;
  int64_t rows, cols, stride = int8_stride(cols);

  Int8Added* list(int64_t m) const { return reinterpret_cast<Int8Added*>(data + m * stride + int8_padded(cols)); }
};

template <typename T>
void int8_quantize(const T* input, int64_t ld, int64_t begin, int64_t end, const Int8Input& out);

// One weight, and where its product with the input goes: rows ld apart.
template <typename T>
struct Int8Product {
  const LinearWeight* weight;
  T* out;
  int64_t ld;
  Activation activation;
};

// All products with one input. `values` [rows, cols] is the input itself, needed where a weight has outliers.
template <typename V, typename T>
void int8_multiply(const Int8Input& input, const V* values, const std::vector<Int8Product<T>>& products, const Parallel& parallel);

// The outliers of the weight rows `row` .. `row + rows` (rows <= width), times `count` rows of the input, in the order of their
// positions: added [count][width]. Four rows of the input at a time: additions of one would wait for one another.
template <int width, typename V>
void int8_outliers(const LinearWeight& weight, int64_t row, int64_t rows, const V* values, int64_t count, float (*added)[width]) {
  const int64_t cols = weight.packed.cols;
  const int32_t* const all = weight.outlier_index;
  const auto below = [](int32_t a, int64_t b) { return a < b; };
  const int32_t* const begin = std::lower_bound(all, all + weight.outliers, row * cols, below);
  const int32_t* const end = std::lower_bound(begin, all + weight.outliers, (row + rows) * cols, below);
  std::fill(added[0], added[0] + count * width, 0.0f);
  if (begin == end) return;
  for (int64_t i = 0; i < count; i += 4) {
    const V* input[4];
    float* to[4];
    for (int64_t n = 0; n < 4; ++n) input[n] = values + std::min(i + n, count - 1) * cols, to[n] = added[std::min(i + n, count - 1)];
    int64_t r = 0, start = row * cols;
    float sum[4] = {};
    const auto store = [&] {
      for (int64_t n = 0; n < 4; ++n) to[n][r] = sum[n];
    };
    for (const int32_t* at = begin; at != end; ++at) {
      if (*at - start >= cols) {
        store();
        do start += cols, ++r;
        while (*at - start >= cols);
        std::fill(sum, sum + 4, 0.0f);
      }
      const float delta = weight.outlier_delta[at - all];
      for (int64_t n = 0; n < 4; ++n) sum[n] += static_cast<float>(input[n][*at - start]) * delta;
    }
    store();
  }
}

}  // namespace kmq::cpu
