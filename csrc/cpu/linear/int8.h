// The integer form of the linear layer, inside the CPU kernels: inputs quantized row by row, and their products with packed weights.
//
//     output(m, r) = scale[m] * factor[r] * sum over c of q(m, c) * t(r, c)   (+ outliers) + bias[r]
//
// q are integers of [-127, 127], t the entries of an int8 table at the packed indices. The sum is exact, so every path, and every
// order, gives the same integer. What is multiplied differs by the width of the index:
//
//     bits 1..5   |t| <= 63, q is stored as q + 128, unsigned: then vpmaddubsw adds two products without saturating (2 * 255 * 63
//                 fits int16), and 128 * sum of t is taken back at the end. 32 products in 3 instructions.
//     bits 6..8   |t| <= 127, which such tables need: q is stored in 16 bits, vpmaddwd. 16 products in 2 instructions.
//
// A processor with VNNI would take both in one way, with the same result.
#pragma once
#include <vector>

#include "../../kmq.h"
#include "gemm.h"

namespace kmq::cpu {

constexpr int kInt8Rows = 16;  // rows of the weight in a panel

inline bool int8_wide(int bits) { return bits > 5; }

// Bytes from one quantized row to the next. An odd number of cache lines, so that the rows of a tile fall in different sets.
inline int64_t int8_stride(int64_t cols, bool wide) { return (ceil_div(cols * (wide ? 2 : 1), 64) | 1) * 64; }

// Rows `cols` long, quantized: `data` at int8_stride apart, `scale` one each. A row that is not finite has the scale NaN.
struct Int8Input {
  uint8_t* data;
  float* scale;
  int64_t rows, cols;
  bool wide;
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

}  // namespace kmq::cpu
