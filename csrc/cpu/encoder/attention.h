// Attention of one head in one text: softmax(q @ k.T * scale + bias) @ v, with the tiles of gemm.h.
//
// Keys and values become panels once. Of the queries, kQueries at a time: their scores, cut at kDepth keys so that they are the left
// operand of the second product as they lie, stay in the second-level cache.
#pragma once
#include "../linear/gemm.h"
#include "rows.h"

namespace kmq::cpu {

struct Head {
  const float *query, *key, *value;  // [tokens, ld]
  int64_t ld, tokens, dim;
  float scale;
  const int64_t* place;  // of the tokens in their text, ascending
  const float* bias;     // [2 * reach + 1] or null
  int64_t reach, window;
  float* out;  // [tokens, ld_out]
  int64_t ld_out;
};

constexpr int64_t kQueries = 48;

// Weights of one row of scores, not yet divided by their sum, which is returned. `scores` holds pieces of kDepth keys, `piece` floats apart.
template <int W, int64_t depth>
KMQ_PLAIN float weigh_plain(const Head& head, int64_t query, float* scores, int64_t piece) {
  constexpr float kNever = -1e30f;
  const int64_t at = head.place[query];
  float most = kNever;
  for (int64_t first = 0; first < head.tokens; first += depth) {
    float* const s = scores + first / depth * piece;
    const int64_t count = first + depth < head.tokens ? depth : head.tokens - first, padded = round_up(count, kWidth);
    const int64_t* const place = head.place + first;
    if (head.bias) {
      const float* const bias = head.bias + head.reach - at;
      for (int64_t j = 0; j < count; ++j) s[j] += bias[place[j]];
    }
    if (head.window)
      for (int64_t j = 0; j < count; ++j) s[j] = place[j] - at > head.window || at - place[j] > head.window ? kNever : s[j];
    for (int64_t j = count; j < padded; ++j) s[j] = kNever;
    most = largest_of<W>(s, padded, most);
  }
  Sixteen<float, W> sum(0);
  for (int64_t first = 0; first < head.tokens; first += depth) {
    const int64_t count = first + depth < head.tokens ? depth : head.tokens - first;
    exponentials<W>(scores + first / depth * piece, round_up(count, kWidth), most, sum);
  }
  return sum.template fold<Sum>();
}

#ifdef KMQ_X86
template <int64_t depth>
KMQ_AVX2 float weigh_avx2(const Head& head, int64_t query, float* scores, int64_t piece) {
  return weigh_plain<kWidthAvx2, depth>(head, query, scores, piece);
}

template <int64_t depth>
KMQ_AVX512 float weigh_avx512(const Head& head, int64_t query, float* scores, int64_t piece) {
  return weigh_plain<kWidthAvx512, depth>(head, query, scores, piece);
}
#endif

template <int64_t depth>
float weigh(const Head& head, int64_t query, float* scores, int64_t piece) {
#ifdef KMQ_X86
  if (avx512()) return weigh_avx512<depth>(head, query, scores, piece);
  if (avx2()) return weigh_avx2<depth>(head, query, scores, piece);
#endif
  return weigh_plain<kWidthScalar, depth>(head, query, scores, piece);
}

// Floats of scratch that `attend` needs.
template <typename Gemm>
int64_t attention_scratch(int64_t tokens, int64_t dim) {
  constexpr int64_t W = Gemm::kCols, ld = Gemm::kDepth + 16, rows = kQueries + Gemm::kRows;
  return round_up(tokens, W) * dim + round_up(dim, W) * tokens + rows * ld * (ceil_div(dim, Gemm::kDepth) + ceil_div(tokens, Gemm::kDepth));
}

template <typename Gemm>
void attend(const Head& head, float* scratch) {
  constexpr int64_t W = Gemm::kCols, depth = Gemm::kDepth, ld = depth + 16, piece = (kQueries + Gemm::kRows) * ld;
  const int64_t tokens = head.tokens, dim = head.dim;
  float *const keys = scratch, *const values = keys + round_up(tokens, W) * dim, *const queries = values + round_up(dim, W) * tokens;
  float* const scores = queries + piece * ceil_div(dim, depth);
  for (int64_t j = 0; j < tokens; j += W) Gemm::template pack_rows<W>(head.key + j * head.ld, head.ld, std::min(W, tokens - j), dim, keys + j * dim);
  for (int64_t e = 0; e < dim; e += W) Gemm::template pack_cols<W>(head.value + e, head.ld, std::min(W, dim - e), tokens, values + e * tokens);
  for (int64_t first = 0; first < tokens; first += kQueries) {
    const int64_t rows = std::min(kQueries, tokens - first);
    float factors[kQueries];
    std::fill(factors, factors + rows, head.scale);
    for (int64_t d = 0; d < dim; d += depth)
      scale_rows(head.query + first * head.ld + d, head.ld, rows, std::min(depth, dim - d), factors, queries + d / depth * piece, ld);
    for (int64_t i = 0, here; i < rows; i += here) {
      here = Gemm::rows_of_next(rows - i);
      for (int64_t j = 0; j < tokens; j += W)
        for (int64_t d = 0; d < dim; d += depth)
          Gemm::template tile<ld, 1>(here, std::min(depth, dim - d), queries + d / depth * piece + i * ld, keys + j * dim + d * W,
                                     scores + j / depth * piece + i * ld + j % depth, ld, tokens - j, nullptr, d > 0);
    }
    for (int64_t i = 0; i < rows; ++i) factors[i] = 1.0f / weigh<depth>(head, first + i, scores + i * ld, piece);
    float* const out = head.out + first * head.ld_out;
    for (int64_t i = 0, here; i < rows; i += here) {
      here = Gemm::rows_of_next(rows - i);
      for (int64_t e = 0; e < dim; e += W)
        for (int64_t j = 0; j < tokens; j += depth)
          Gemm::template tile<ld, 1>(here, std::min(depth, tokens - j), scores + j / depth * piece + i * ld, values + e * tokens + j * W,
                                     out + i * head.ld_out + e, head.ld_out, dim - e, nullptr, j > 0);
    }
    scale_rows(out, head.ld_out, rows, dim, factors, out, head.ld_out);
  }
}

}  // namespace kmq::cpu
