// The best partition of sorted points into intervals: exact, O(n log n), a handful of vector instructions a point.
//
// Every interval costs its squared error and a price. Then best[j], the cost of the points before j, is price + min over i of
// best[i] + cost(i, j), and the best last edge i moves right with j. So the ends j of a block share the candidates between the
// best edges of the block's borders; halves of a block narrow them further, and the last few are tried in vector registers. The
// optimum is convex in the number of intervals, so that some price gives the number that is asked for.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kmeans.h"
#include "../simd.h"

namespace kmq::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kFewPairs = 800, kFewWeightedPairs = 200, kFewMoments = 32;  // are all tried: faster than to narrow the candidates first

// 1 / d at [d] for d from 1 on. Not a number at 0, so that an empty interval is never the least; zeros before, where masked lanes read.
const double* reciprocals() {
  static const std::vector<double> table = [] {
    std::vector<double> out(Sums::kPad + kSmall + 2 * Sums::kPad, 0.0);
    for (size_t d = 1; d + Sums::kPad < out.size(); ++d) out[Sums::kPad + d] = 1.0 / double(d);
    out[Sums::kPad] = std::numeric_limits<double>::quiet_NaN();
    return out;
  }();
  return table.data() + Sums::kPad;
}

// Both work on gain[i] = best[i] - wxx[i]: the wxx of best[i] + cost(i, j) depends on j only, and is left out.
struct Kernels {
  int64_t few_pairs;
  // to[j] = price + min over i in [first, last] of gain[i] - S(i, j)^2 / w(i, j), S and w the sums between i and j, for j in
  // [begin, end] and up to 15 more; last <= begin, and the empty interval between equals does not count.
  void (*minima)(const Sums& sums, const double* gain, double* to, int64_t first, int64_t last, int64_t begin, int64_t end, double price);
  // The leftmost i in [first, last] that gives this minimum, without the price, for one j; last <= j.
  int64_t (*leftmost)(const Sums& sums, const double* gain, int64_t first, int64_t last, int64_t j, double& least);
};

template <bool unit>
double through(const Sums& sums, const double* gain, int64_t i, int64_t j) {
  const double first = sums.wx[j] - sums.wx[i], square = first * first;
  return gain[i] - (unit ? square * sums.reciprocal[j - i] : square / (sums.w[j] - sums.w[i]));
}

template <bool unit>
void minima_scalar(const Sums& sums, const double* gain, double* to, int64_t first, int64_t last, int64_t begin, int64_t end,
                        double price) {
  for (int64_t j = begin; j <= end; ++j) {
    double least = kInfinity;
    for (int64_t i = first; i <= last; ++i) {
      const double value = through<unit>(sums, gain, i, j);
      least = value < least ? value : least;
    }
    to[j] = least + price;
  }
}

template <bool unit>
int64_t leftmost_scalar(const Sums& sums, const double* gain, int64_t first, int64_t last, int64_t j, double& least) {
  least = kInfinity;
  int64_t answer = first;
  for (int64_t i = first; i <= last; ++i) {
    const double value = through<unit>(sums, gain, i, j);
    if (value < least) {
      least = value;
      answer = i;
    }
  }
  return answer;
}

// The same where the prefix sums do not resolve the costs.
double through_moments(const Sums& sums, const double* gain, int64_t i, int64_t j) {
  return i == j ? kInfinity : gain[i] + sums.moment(i, j).error;
}

void minima_moments(const Sums& sums, const double* gain, double* to, int64_t first, int64_t last, int64_t begin, int64_t end, double price) {
  for (int64_t j = begin; j <= end; ++j) {
    double least = kInfinity;
    for (int64_t i = first; i <= last; ++i) least = std::min(least, through_moments(sums, gain, i, j));
    to[j] = least + price;
  }
}

int64_t leftmost_moments(const Sums& sums, const double* gain, int64_t first, int64_t last, int64_t j, double& least) {
  least = kInfinity;
  int64_t answer = first;
  for (int64_t i = first; i <= last; ++i) {
    const double value = through_moments(sums, gain, i, j);
    if (value < least) {
      least = value;
      answer = i;
    }
  }
  return answer;
}

#ifdef KMQ_X86

constexpr int64_t kFewLanes = 4;  // candidates that are tried faster one by one

template <bool unit>
KMQ_AVX2_INLINE __m256d through4(__m256d wx_j, __m256d wx_i, __m256d w_j, __m256d w_i, __m256d reciprocal, __m256d gain) {
  const __m256d first = _mm256_sub_pd(wx_j, wx_i), square = _mm256_mul_pd(first, first);
  return _mm256_sub_pd(gain, unit ? _mm256_mul_pd(square, reciprocal) : _mm256_div_pd(square, _mm256_sub_pd(w_j, w_i)));
}

template <bool unit, int registers>
KMQ_AVX2_INLINE void minima4(const Sums& sums, const double* gain, double* to, int64_t first, int64_t last, int64_t j, __m256d price) {
  const double *wx = sums.wx.data(), *w = sums.w.data(), *reciprocal = unit ? sums.reciprocal + j : nullptr;
  __m256d wx_j[registers], w_j[registers], least[registers];
  for (int r = 0; r < registers; ++r) {
    wx_j[r] = _mm256_loadu_pd(wx + j + 4 * r);
    w_j[r] = _mm256_loadu_pd(w + j + 4 * r);
    least[r] = _mm256_set1_pd(kInfinity);
  }
  for (int64_t i = first; i <= last; ++i) {
    const __m256d wx_i = _mm256_broadcast_sd(wx + i), w_i = _mm256_broadcast_sd(w + i), gain_i = _mm256_broadcast_sd(gain + i);
    for (int r = 0; r < registers; ++r) {
      const __m256d inverse = unit ? _mm256_loadu_pd(reciprocal - i + 4 * r) : w_i;
      least[r] = _mm256_min_pd(through4<unit>(wx_j[r], wx_i, w_j[r], w_i, inverse, gain_i), least[r]);
    }
  }
  for (int r = 0; r < registers; ++r) _mm256_storeu_pd(to + j + 4 * r, _mm256_add_pd(least[r], price));
}

template <bool unit>
KMQ_AVX2 void minima_avx2(const Sums& sums, const double* gain, double* to, int64_t first, int64_t last, int64_t begin, int64_t end,
                          double price) {
  int64_t j = begin;
  for (; j + 8 <= end; j += 16) minima4<unit, 4>(sums, gain, to, first, last, j, _mm256_set1_pd(price));
  if (j <= end) minima4<unit, 2>(sums, gain, to, first, last, j, _mm256_set1_pd(price));
}

KMQ_AVX2_INLINE __m256d least4(__m256d x) {  // in every lane
  x = _mm256_min_pd(x, _mm256_permute2f128_pd(x, x, 1));
  return _mm256_min_pd(x, _mm256_permute_pd(x, 5));
}

template <bool unit>
KMQ_AVX2 int64_t leftmost_avx2(const Sums& sums, const double* gain, int64_t first, int64_t last, int64_t j, double& least) {
  if (last - first < kFewLanes) return leftmost_scalar<unit>(sums, gain, first, last, j, least);
  const double *wx = sums.wx.data(), *w = sums.w.data(), *reciprocal = unit ? sums.reciprocal + j - 3 : nullptr;
  const __m256d wx_j = _mm256_broadcast_sd(wx + j), w_j = _mm256_broadcast_sd(w + j), end = _mm256_set1_pd(double(last));
  const __m256d infinity = _mm256_set1_pd(kInfinity);
  __m256d lanes[2] = {infinity, infinity}, at[2] = {infinity, infinity};
  __m256d here = _mm256_add_pd(_mm256_set1_pd(double(first)), _mm256_setr_pd(0, 1, 2, 3));
  for (int64_t i = first; i <= last; i += 8)
    for (int r = 0; r < 2; ++r) {
      const __m256d w_i = _mm256_loadu_pd(w + i + 4 * r);
      const __m256d inverse = unit ? _mm256_permute4x64_pd(_mm256_loadu_pd(reciprocal - i - 4 * r), 0x1b) : w_i;
      const __m256d any = through4<unit>(wx_j, _mm256_loadu_pd(wx + i + 4 * r), w_j, w_i, inverse, _mm256_loadu_pd(gain + i + 4 * r));
      const __m256d value = _mm256_blendv_pd(any, infinity, _mm256_cmp_pd(here, end, _CMP_GT_OQ));
      at[r] = _mm256_blendv_pd(at[r], here, _mm256_cmp_pd(value, lanes[r], _CMP_LT_OQ));
      lanes[r] = _mm256_min_pd(value, lanes[r]);
      here = _mm256_add_pd(here, _mm256_set1_pd(4));
    }
  const __m256d all = least4(_mm256_min_pd(lanes[0], lanes[1]));
  for (int r = 0; r < 2; ++r) at[r] = _mm256_blendv_pd(infinity, at[r], _mm256_cmp_pd(lanes[r], all, _CMP_EQ_OQ));
  least = _mm256_cvtsd_f64(all);
  const double answer = _mm256_cvtsd_f64(least4(_mm256_min_pd(at[0], at[1])));
  return answer < kInfinity ? static_cast<int64_t>(answer) : first;
}

template <bool unit>
KMQ_AVX512_INLINE __m512d through8(__m512d wx_j, __m512d wx_i, __m512d w_j, __m512d w_i, __m512d reciprocal, __m512d gain) {
  const __m512d first = _mm512_sub_pd(wx_j, wx_i), square = _mm512_mul_pd(first, first);
  return _mm512_sub_pd(gain, unit ? _mm512_mul_pd(square, reciprocal) : _mm512_div_pd(square, _mm512_sub_pd(w_j, w_i)));
}

template <bool unit, int registers>
KMQ_AVX512_INLINE void minima8(const Sums& sums, const double* gain, double* to, int64_t first, int64_t last, int64_t j, __m512d price) {
  const double *wx = sums.wx.data(), *w = sums.w.data(), *reciprocal = unit ? sums.reciprocal + j : nullptr;
  __m512d wx_j[registers], w_j[registers], least[registers];
  for (int r = 0; r < registers; ++r) {
    wx_j[r] = _mm512_loadu_pd(wx + j + 8 * r);
    w_j[r] = _mm512_loadu_pd(w + j + 8 * r);
    least[r] = _mm512_set1_pd(kInfinity);
  }
  for (int64_t i = first; i <= last; ++i) {
    const __m512d wx_i = _mm512_set1_pd(wx[i]), w_i = _mm512_set1_pd(w[i]), gain_i = _mm512_set1_pd(gain[i]);
    for (int r = 0; r < registers; ++r) {
      const __m512d inverse = unit ? _mm512_loadu_pd(reciprocal - i + 8 * r) : w_i;
      least[r] = _mm512_min_pd(through8<unit>(wx_j[r], wx_i, w_j[r], w_i, inverse, gain_i), least[r]);
    }
  }
  for (int r = 0; r < registers; ++r) _mm512_storeu_pd(to + j + 8 * r, _mm512_add_pd(least[r], price));
}

template <bool unit>
KMQ_AVX512 void minima_avx512(const Sums& sums, const double* gain, double* to, int64_t first, int64_t last, int64_t begin, int64_t end,
                              double price) {
  int64_t j = begin;
  for (; j + 8 <= end; j += 16) minima8<unit, 2>(sums, gain, to, first, last, j, _mm512_set1_pd(price));
  if (j <= end) minima8<unit, 1>(sums, gain, to, first, last, j, _mm512_set1_pd(price));
}

KMQ_AVX512_INLINE __m512d least8(__m512d x) {  // in every lane
  x = _mm512_min_pd(x, _mm512_shuffle_f64x2(x, x, 0x4e));
  x = _mm512_min_pd(x, _mm512_permutex_pd(x, 0x4e));
  return _mm512_min_pd(x, _mm512_permute_pd(x, 0x55));
}

template <bool unit>
KMQ_AVX512 int64_t leftmost_avx512(const Sums& sums, const double* gain, int64_t first, int64_t last, int64_t j, double& least) {
  if (last - first < kFewLanes) return leftmost_scalar<unit>(sums, gain, first, last, j, least);
  const double *wx = sums.wx.data(), *w = sums.w.data(), *reciprocal = unit ? sums.reciprocal + j - 7 : nullptr;
  const __m512d wx_j = _mm512_set1_pd(wx[j]), w_j = _mm512_set1_pd(w[j]), infinity = _mm512_set1_pd(kInfinity);
  const __m512i reversed = _mm512_setr_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  __m512d lanes = infinity, at = infinity, here = _mm512_add_pd(_mm512_set1_pd(double(first)), _mm512_setr_pd(0, 1, 2, 3, 4, 5, 6, 7));
  for (int64_t i = first; i <= last; i += 8) {
    const __mmask8 in = _mm512_cmp_pd_mask(here, _mm512_set1_pd(double(last)), _CMP_LE_OQ);
    const __m512d w_i = _mm512_loadu_pd(w + i);
    const __m512d inverse = unit ? _mm512_permutexvar_pd(reversed, _mm512_loadu_pd(reciprocal - i)) : w_i;
    const __m512d value = through8<unit>(wx_j, _mm512_loadu_pd(wx + i), w_j, w_i, inverse, _mm512_loadu_pd(gain + i));
    at = _mm512_mask_mov_pd(at, _mm512_mask_cmp_pd_mask(in, value, lanes, _CMP_LT_OQ), here);
    lanes = _mm512_mask_min_pd(lanes, in, value, lanes);
    here = _mm512_add_pd(here, _mm512_set1_pd(8));
  }
  const __m512d all = least8(lanes);
  least = _mm512_cvtsd_f64(all);
  const double answer = _mm512_cvtsd_f64(least8(_mm512_mask_mov_pd(infinity, _mm512_cmp_pd_mask(lanes, all, _CMP_EQ_OQ), at)));
  return answer < kInfinity ? static_cast<int64_t>(answer) : first;
}

#endif

Kernels kernels_of(const Sums& sums) {
  if (sums.moments) return {kFewMoments, minima_moments, leftmost_moments};
  const bool unit = sums.reciprocal != nullptr;
#ifdef KMQ_X86
  if (avx512()) return unit ? Kernels{kFewPairs, minima_avx512<true>, leftmost_avx512<true>} : Kernels{kFewWeightedPairs, minima_avx512<false>, leftmost_avx512<false>};
  if (avx2()) return unit ? Kernels{kFewPairs, minima_avx2<true>, leftmost_avx2<true>} : Kernels{kFewWeightedPairs, minima_avx2<false>, leftmost_avx2<false>};
#endif
  return unit ? Kernels{kFewPairs, minima_scalar<true>, leftmost_scalar<true>} : Kernels{kFewWeightedPairs, minima_scalar<false>, leftmost_scalar<false>};
}

// to[j] for the ends j in [begin, end], whose best last edges lie in [first, last]; last <= begin.
void fill(const Kernels& kernels, const Sums& sums, const double* gain, double* to, int64_t first, int64_t last, int64_t begin, int64_t end,
          double price) {
  while ((end - begin) * (last - first) > kernels.few_pairs && end - begin >= 16) {
    const int64_t middle = begin + (end - begin) / 16 * 8 + 7;
    double least;
    const int64_t edge = kernels.leftmost(sums, gain, first, last, middle, least);
    fill(kernels, sums, gain, to, first, edge, begin, middle, price);
    begin = middle + 1;
    first = edge;
  }
  kernels.minima(sums, gain, to, first, last, begin, end, price);
}

// The best partition of all points for a price per interval. Returns its cost without the prices.
double priced_edges(const Kernels& kernels, const Sums& sums, double price, PartitionScratch& scratch, Edges& edges) {
  const int64_t n = sums.n;
  double* gain = scratch.gain[0].data();
  std::vector<PartitionScratch::Block>& blocks = scratch.blocks;
  blocks.clear();
  gain[0] = -sums.wxx[0];
  int64_t first = 0, length = 1;
  for (int64_t begin = 1; begin <= n;) {
    int64_t end = std::min(begin + length - 1, n), last;
    // A last edge inside the block leaves at least what the points before the block cost, and at least one interval.
    const double inside = begin > 1 ? std::max(gain[begin - 1] + sums.wxx[begin - 1], price) : price;
    for (double least;; end = begin + (end - begin) / 2) {
      last = kernels.leftmost(sums, gain, first, begin - 1, end, least);
      if (end == begin || least + sums.wxx[end] <= inside) break;
    }
    fill(kernels, sums, gain, gain, first, last, begin, end, price);
    blocks.push_back({end, last});
    first = last;
    length = std::max<int64_t>(1, (end - last) / 2);  // in even density, up to 2/3 of an interval would do
    begin = end + 1;
  }
  edges.clear();
  size_t block = blocks.size() - 1;
  for (int64_t j = n; j > 0;) {
    edges.push_back(j);
    while (block > 0 && blocks[block - 1].end >= j) --block;
    double least;
    j = kernels.leftmost(sums, gain, block ? blocks[block - 1].last : 0, blocks[block].last, j, least);
  }
  edges.push_back(0);
  std::reverse(edges.begin(), edges.end());
  return gain[n] + sums.wxx[n] - price * double(edges.size() - 1);
}

// The best of the partitions whose k-th edge lies in [low[k], high[k]]; each range begins where the one before ends, or later.
void edges_between(const Kernels& kernels, const Sums& sums, const Edges& low, const Edges& high, PartitionScratch& scratch, Edges& edges) {
  const int64_t count = static_cast<int64_t>(low.size()) - 1;
  const auto layer = [&](int64_t k) { return scratch.gain[k % 2].data(); };  // of every other layer, the ranges do not touch
  layer(0)[0] = -sums.wxx[0];
  for (int64_t k = 1; k < count; ++k) fill(kernels, sums, layer(k - 1), layer(k), low[k - 1], high[k - 1], low[k], high[k], 0);
  edges.resize(count + 1);
  edges[0] = 0;
  edges[count] = sums.n;
  double least;
  for (int64_t k = count - 1; k > 0; --k) edges[k] = kernels.leftmost(sums, layer(k), low[k], high[k], edges[k + 1], least);
}

// From the best partition to the best one with one interval more or fewer: their edges alternate, because the cost is Monge
// (where they did not, their ends could be exchanged, at no cost).
void step(const Kernels& kernels, const Sums& sums, bool more, PartitionScratch& scratch, Edges& edges) {
  Edges &low = scratch.low, &high = scratch.high;
  if (more) {
    low.assign(1, 0);
    low.insert(low.end(), edges.begin(), edges.end());
    high = edges;
    high.push_back(sums.n);
  } else {
    low.assign(edges.begin(), edges.end() - 1);
    high.assign(edges.begin() + 1, edges.end());
    high[0] = 0;
    low.back() = sums.n;
  }
  edges_between(kernels, sums, low, high, scratch, edges);
}

}  // namespace

void Points::clear() {
  for (std::vector<double>* column : {&x, &w, &spread}) column->clear();
  members.clear();
  blur = 0;
}

void Points::ascend() {
  for (size_t i = 1; i < x.size(); ++i)
    if (x[i] <= x[i - 1]) x[i] = std::nextafter(x[i - 1], kInfinity);
}

void Sums::set(const Points& points) {
  n = points.size();
  moments = nullptr;
  cells = nullptr;
  int64_t lost = 0;
  for (std::vector<double>* column : {&w, &wx, &wxx}) column->resize(n + 1 + kPad);
  const double *x = points.x.data(), *weight = points.w.empty() ? nullptr : points.w.data();
  double *const at_w = w.data(), *const at_wx = wx.data(), *const at_wxx = wxx.data();
  reciprocal = weight || n > kSmall ? nullptr : reciprocals();
  int64_t middle = n / 2;
  if (weight) {
    double all = 0, half = 0;
    for (int64_t i = 0; i < n; ++i) all += weight[i];
    for (middle = 0; middle + 1 < n && 2 * (half += weight[middle]) < all;) ++middle;
    // A point's weight may vanish next to all others: the sums ascend nevertheless, so that no interval is without weight.
    at_w[middle] = 0;
    for (int64_t i = middle; i < n; ++i) {
      at_w[i + 1] = at_w[i] + weight[i];
      if (at_w[i + 1] == at_w[i]) at_w[i + 1] = std::nextafter(at_w[i], kInfinity), ++lost;
    }
    for (int64_t i = middle; i-- > 0;) {
      at_w[i] = at_w[i + 1] - weight[i];
      if (at_w[i] == at_w[i + 1]) at_w[i] = std::nextafter(at_w[i + 1], -kInfinity), ++lost;
    }
  } else {
    for (int64_t i = 0; i <= n; ++i) at_w[i] = double(i - middle);
  }
  const double from = origin = x[middle];
  at_wx[middle] = at_wxx[middle] = 0;
  // To the right and to the left at once: each is a chain of additions, and waits for itself.
  double wx_up = 0, wxx_up = 0, wx_down = 0, wxx_down = 0;
  const auto right = [&](int64_t i) {
    const double y = x[i] - from, wy = weight ? weight[i] * y : y;
    at_wx[i + 1] = wx_up += wy;
    at_wxx[i + 1] = wxx_up += wy * y;
  };
  const auto left = [&](int64_t i) {
    const double y = x[i] - from, wy = weight ? weight[i] * y : y;
    at_wx[i] = wx_down -= wy;
    at_wxx[i] = wxx_down -= wy * y;
  };
  const int64_t both = std::min(middle, n - middle);
  for (int64_t step = 0; step < both; ++step) {
    right(middle + step);
    left(middle - 1 - step);
  }
  for (int64_t i = middle + both; i < n; ++i) right(i);
  for (int64_t i = middle - both; i-- > 0;) left(i);
  // Over the intervals of a partition the errors of their common edges cancel but for the distance of their means: in all, the error
  // of a prefix of weight * |x - origin| times the range, and that of a prefix of weight times its square. Each prefix is off by
  // about the square root of its length in units of its last place.
  const double reach = std::max(x[n - 1] - from, from - x[0]), unit = 0x1p-53 * (8 + 4 * std::sqrt(double(n)) + 2 * double(lost));
  rounding = unit * ((at_wx[0] + at_wx[n]) * reach + (weight ? (at_w[n] - at_w[0]) * reach * reach : 0));
  pad();
}

void Sums::use(const Moments& exact) {
  moments = &exact;
  rounding = 0;
  std::fill(wxx.begin(), wxx.end(), 0.0);
}

bool Sums::resolve(double cost) const {
  constexpr double kTolerance = 1e-6;
  return rounding <= kTolerance * cost;
}

void Sums::pick(const Sums& all, const Edges& cells) {
  n = static_cast<int64_t>(cells.size()) - 1;
  origin = all.origin;
  rounding = all.rounding;
  moments = all.moments;
  this->cells = cells.data();
  reciprocal = nullptr;
  for (std::vector<double>* column : {&w, &wx, &wxx}) column->resize(n + 1 + kPad);
  for (int64_t i = 0; i <= n; ++i) {
    w[i] = all.w[cells[i]];
    wx[i] = all.wx[cells[i]];
    wxx[i] = all.wxx[cells[i]];
  }
  pad();
}

void Sums::pad() {
  for (std::vector<double>* column : {&w, &wx, &wxx}) std::fill(column->begin() + n + 1, column->end(), (*column)[n]);
}

BestPrice best_partition(const Sums& sums, int64_t count, double price, double slope, PartitionScratch& scratch, Edges& edges) {
  constexpr int64_t kSteps = 2;  // cost less than another price
  constexpr int kGuesses = 12, kProbes = 48;  // where guesses do not close in, costs may span many decades: then the middle one is tried
  const Kernels kernels = kernels_of(sums);
  for (std::vector<double>& gain : scratch.gain) gain.resize(sums.n + 1 + Sums::kPad);
  double low = 0, high = kInfinity;  // prices that give too many and too few intervals
  int64_t nearest = std::numeric_limits<int64_t>::max();
  BestPrice best{price, 0};
  double stride = 1.0 / double(count);
  for (int probe = 0; probe < kProbes && nearest > kSteps; ++probe) {
    Edges& tried = scratch.tried;
    const double cost = priced_edges(kernels, sums, price, scratch, tried);
    const int64_t found = static_cast<int64_t>(tried.size()) - 1;
    if (std::abs(found - count) < nearest) {
      nearest = std::abs(found - count);
      best = {price, cost};
      edges.swap(tried);
    }
    (found > count ? low : high) = price;
    const double ratio = double(found) / double(count), next = slope * cost / double(found) * (ratio * ratio * ratio);
    if (low > 0 && std::isfinite(high)) price = probe < kGuesses && next > 1.01 * low && next < 0.99 * high ? next : std::sqrt(low) * std::sqrt(high);
    else price = found > count ? std::max(next, price * (1 + stride)) : std::min(next, price / (1 + stride));
    stride *= 2;
    if (!(price > low && price < high)) break;
  }
  for (int64_t found; (found = static_cast<int64_t>(edges.size()) - 1) != count;) step(kernels, sums, found < count, scratch, edges);
  return best;
}

void best_nearby(const Sums& sums, const Edges& low, const Edges& high, PartitionScratch& scratch, Edges& edges) {
  for (std::vector<double>& gain : scratch.gain) gain.resize(sums.n + 1 + Sums::kPad);
  edges_between(kernels_of(sums), sums, low, high, scratch, edges);
}

}  // namespace kmq::cpu
