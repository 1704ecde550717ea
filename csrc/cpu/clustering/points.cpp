// From the values of one problem to points by counting them in a histogram.
//
// The histogram's key of y = value - origin is the bit pattern of |y| + scale without its low bits: bins of equal width below
// `scale`, twice as wide in each octave beyond, one addition and a few integer operations a value, no pass for the range. The low
// bits are summed beside the count, so every bin knows the exact mean of its members. 16-bit values count under their own bits.
// The fewer the centroids, the wider the bins may be: then they fit the first cache, and counting is twice as fast.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kmeans.h"
#include "../simd.h"

namespace kmq::cpu {
namespace {

constexpr int64_t kHalfKeys = 1 << 16;
constexpr int64_t kSample = 1024;
constexpr size_t kMostOutside = 1 << 15;        // of a segment
constexpr size_t kFewBins = 2048, kFewDistinct = 8192;  // fewer occupied bins may mean few distinct values
constexpr uint32_t kOctaves = 5;                // for each sign
constexpr uint64_t kOne = uint64_t(1) << 40;    // the count of a bin, above the sum of the low bits

}  // namespace

Histogram::Histogram(const void* values, Dtype dtype, const float* weight, int64_t n, int num_centroids)
    : values_(values), dtype_(dtype), weight_(weight), n_(n), parts_((n + kSegment - 1) / kSegment) {
  if (dtype != Dtype::f32) return;
  keys_.low_bits = num_centroids <= 16 ? 13 : num_centroids <= 64 ? 12 : 11;
  keys_.half_bins = kOctaves << (23 - keys_.low_bits);
  std::vector<float> sample;
  const int64_t stride = n / kSample | 1;  // odd: else it may meet few columns of a matrix
  for (int64_t i = 0; i < n; i += stride) sample.push_back(static_cast<const float*>(values)[i]);
  for (float& x : sample)
    if (!std::isfinite(x)) x = 0;  // reported when it is counted
  std::nth_element(sample.begin(), sample.begin() + sample.size() / 2, sample.end());
  const float median = sample[sample.size() / 2];
  // The square of the mean root: a size that one outlier in the sample hardly moves. Equal values say nothing about the scale.
  const auto size_around = [&](float origin) {
    double roots = 0;
    int64_t count = 0;
    for (const float x : sample) {
      const double y = std::fabs(double(x) - origin);
      if (y > 0) {
        roots += std::sqrt(y);
        ++count;
      }
    }
    return count ? (roots / count) * (roots / count) : 0.0;
  };
  const double around_median = size_around(median);
  keys_.origin = std::fabs(median) < 2 * around_median ? 0.0f : median;
  const double size = keys_.origin == 0 ? size_around(0) : around_median;
  if (size > 0) keys_.scale = static_cast<float>(std::ldexp(1.0, std::clamp(static_cast<int>(std::ceil(std::log2(3 * size))), -100, 120)));
  keys_.first = bits_of(keys_.scale) >> keys_.low_bits;
}

template <typename T>
void Histogram::count_half(Part& part, const T* values, int64_t begin, int64_t end) {
  if (!weight_) {
    part.counts.assign(kHalfKeys, 0);
    for (int64_t i = begin; i < end; ++i) ++part.counts[values[i].raw];
    return;
  }
  part.bins.assign(kHalfKeys, Bin{0, 0});
  for (int64_t i = begin; i < end; ++i) {
    const KmeansFault fault = weight_fault(weight_[i]);
    if (fault != KmeansFault::none && part.fault == KmeansFault::none) part.fault = fault;
    Bin& bin = part.bins[values[i].raw];
    bin.weight += weight_[i];
    bin.sum += 1;  // how many: a value of weight zero must be seen if it is not finite
  }
}

void Histogram::count(int64_t segment) {
  Part& part = parts_[segment];
  const int64_t begin = segment * kSegment, end = std::min(begin + kSegment, n_);
  if (dtype_ == Dtype::bf16) count_half(part, static_cast<const bf16*>(values_), begin, end);
  else if (dtype_ == Dtype::f16) count_half(part, static_cast<const f16*>(values_), begin, end);
  else count_float(part, begin, end);
}

namespace {

constexpr int kGroup = 64;  // values whose bins are computed at a time

// The bin of a value. What lies outside (or is not finite) gets the last bin of its sign. `u` becomes the key with its low bits.
KMQ_PLAIN uint32_t bin_of(float x, const Histogram::Keys& keys, uint32_t& u) {
  const float y = x - keys.origin;
  u = bits_of(std::fabs(y) + keys.scale);
  return std::min((u >> keys.low_bits) - keys.first, keys.half_bins) + (bits_of(y) >> 31) * (keys.half_bins + 1);
}

// Bins and low bits of kGroup values. False where one of them lies outside.
KMQ_PLAIN bool bins_of(const float* values, const Histogram::Keys& from, uint32_t* bin, uint32_t* low) {
  const Histogram::Keys keys = from;
  uint32_t outside = 0;
  for (int i = 0; i < kGroup; ++i) {
    uint32_t u;
    const uint32_t b = bin_of(values[i], keys, u);
    outside |= (b == keys.half_bins) | (b == 2 * keys.half_bins + 1);
    bin[i] = b;
    low[i] = u & ((1u << keys.low_bits) - 1);
  }
  return !outside;
}

#ifdef KMQ_X86
KMQ_AVX2 bool bins_avx2(const float* values, const Histogram::Keys& keys, uint32_t* bin, uint32_t* low) { return bins_of(values, keys, bin, low); }
KMQ_AVX512 bool bins_avx512(const float* values, const Histogram::Keys& keys, uint32_t* bin, uint32_t* low) { return bins_of(values, keys, bin, low); }
#endif

// each(first, count, bin, low) for groups of values, outside(i) for those beyond the last bin.
template <typename Each, typename Outside>
void for_bins(const float* values, int64_t begin, int64_t end, const Histogram::Keys& keys, const Each& each, const Outside& outside) {
  const auto run = [&](const auto& bins) {
    uint32_t bin[kGroup], low[kGroup];
    float padded[kGroup];
    for (int64_t i = begin; i < end; i += kGroup) {
      const int count = static_cast<int>(std::min<int64_t>(kGroup, end - i));
      const float* group = values + i;
      if (count < kGroup) {
        std::fill(padded, padded + kGroup, keys.origin);
        std::copy(group, group + count, padded);
        group = padded;
      }
      if (!bins(group, keys, bin, low))
        for (int lane = 0; lane < count; ++lane)
          if (bin[lane] % (keys.half_bins + 1) == keys.half_bins) outside(i + lane);
      each(i, count, bin, low);
    }
  };
#ifdef KMQ_X86
  if (avx512()) return run(bins_avx512);
  if (avx2()) return run(bins_avx2);
#endif
  run(bins_of);
}

}  // namespace

void Histogram::count_float(Part& part, int64_t begin, int64_t end) {
  const float* values = static_cast<const float*>(values_);
  const auto outside = [&](int64_t i) {
    if (!(std::fabs(values[i]) <= kLargest)) part.fault = KmeansFault::values_not_finite;
    if (weight_ && part.fault == KmeansFault::none) part.fault = weight_fault(weight_[i]);
    if (part.outside.size() <= kMostOutside) part.outside.push_back(i);
  };
  if (!weight_) {
    // Count and sum of the low bits share one integer: 2^21 values of 13 bits sum to 34 bits, 22 bits count them.
    part.counts.assign(num_bins(), 0);
    uint64_t* counts = part.counts.data();
    for_bins(values, begin, end, keys_, [=](int64_t, int count, const uint32_t* bin, const uint32_t* low) {
      for (int lane = 0; lane < count; ++lane) counts[bin[lane]] += kOne + low[lane];
    }, outside);
    return;
  }
  part.bins.assign(num_bins(), Bin{0, 0});
  Bin* bins = part.bins.data();
  const float* weight = weight_;
  KmeansFault fault = KmeansFault::none;
  for_bins(values, begin, end, keys_, [&](int64_t i, int count, const uint32_t* bin, const uint32_t* low) {
    for (int lane = 0; lane < count; ++lane) {
      const double w = weight[i + lane];
      if (!(w >= 0 && w <= kLargest)) fault = weight_fault(weight[i + lane]);
      bins[bin[lane]].weight += w;
      bins[bin[lane]].sum += w * low[lane];
    }
  }, outside);
  if (part.fault == KmeansFault::none) part.fault = fault;
}

namespace {

constexpr int kFiltered = 512;  // values filtered at a time

// Appends the positions from `first` on of the values whose bin is marked to found[n], and returns the new n. A vector path may
// append others.
int marked(const float* values, const Histogram::Keys& keys, const Histogram::Marks& marks, uint32_t first, uint32_t* found, int n) {
  uint32_t bin[kGroup], low[kGroup];
  for (int i = 0; i < kFiltered; i += kGroup) {
    bins_of(values + i, keys, bin, low);
    for (int lane = 0; lane < kGroup; ++lane) {
      found[n] = first + i + lane;
      n += marks.of[bin[lane]] != 0;
    }
  }
  return n;
}

#ifdef KMQ_X86

// The lowest ten bits of a key choose one of 1024 bits, set where a bin of such a key, of either sign, is marked.
KMQ_AVX2 int marked_avx2(const float* values, const Histogram::Keys& keys, const Histogram::Marks& marks, uint32_t first, uint32_t* found, int n) {
  static const auto orders = [] {  // of the lanes that are set in a byte, one after the other
    std::vector<uint64_t> out(256, 0);
    for (int byte = 0; byte < 256; ++byte)
      for (int lane = 7; lane >= 0; --lane)
        if (byte >> lane & 1) out[byte] = out[byte] << 8 | uint64_t(lane);
    return out;
  }();
  const __m256 origin = _mm256_set1_ps(keys.origin), scale = _mm256_set1_ps(keys.scale), sign = _mm256_set1_ps(-0.0f);
  const __m128i shift = _mm_cvtsi32_si128(keys.low_bits);
  const __m256i* bits = reinterpret_cast<const __m256i*>(marks.bits);
  for (int i = 0; i < kFiltered; i += 8) {
    const __m256 y = _mm256_andnot_ps(sign, _mm256_sub_ps(_mm256_loadu_ps(values + i), origin));
    const __m256i key = _mm256_srl_epi32(_mm256_castps_si256(_mm256_add_ps(y, scale)), shift), word = _mm256_srli_epi32(key, 5);
    __m256 quarters[4];
    for (int q = 0; q < 4; ++q) quarters[q] = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(_mm256_loadu_si256(bits + q), word));
    const __m256 odd = _mm256_castsi256_ps(_mm256_slli_epi32(key, 23)), upper = _mm256_castsi256_ps(_mm256_slli_epi32(key, 22));
    const __m256i chosen = _mm256_castps_si256(_mm256_blendv_ps(_mm256_blendv_ps(quarters[0], quarters[1], odd),
                                                                _mm256_blendv_ps(quarters[2], quarters[3], odd), upper));
    const __m256i hit = _mm256_sllv_epi32(chosen, _mm256_and_si256(key, _mm256_set1_epi32(31)));
    const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(hit));
    const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&orders[mask])));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(found + n), _mm256_add_epi32(order, _mm256_set1_epi32(static_cast<int>(first) + i)));
    n += __builtin_popcount(mask);
  }
  return n;
}

KMQ_AVX512 int marked_avx512(const float* values, const Histogram::Keys& keys, const Histogram::Marks& marks, uint32_t first, uint32_t* found, int n) {
  const __m512 origin = _mm512_set1_ps(keys.origin), scale = _mm512_set1_ps(keys.scale);
  const __m128i shift = _mm_cvtsi32_si128(keys.low_bits);
  const __m512i low = _mm512_loadu_si512(marks.bits), high = _mm512_loadu_si512(marks.bits + 16);
  __m512i at = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (int i = 0; i < kFiltered; i += 16) {
    const __m512 y = _mm512_abs_ps(_mm512_sub_ps(_mm512_loadu_ps(values + i), origin));
    const __m512i key = _mm512_srl_epi32(_mm512_castps_si512(_mm512_add_ps(y, scale)), shift);
    const __m512i chosen = _mm512_permutex2var_epi32(low, _mm512_srli_epi32(key, 5), high);
    const __mmask16 mask = _mm512_movepi32_mask(_mm512_rolv_epi32(chosen, key));
    _mm512_storeu_si512(found + n, _mm512_maskz_compress_epi32(mask, at));
    n += __builtin_popcount(mask);
    at = _mm512_add_epi32(at, _mm512_set1_epi32(16));
  }
  return n;
}

#endif

}  // namespace

void Histogram::mark(const std::vector<int32_t>& bins) {
  marks_.of.assign(num_bins(), 0);
  marks_.count = static_cast<int32_t>(bins.size());
  std::fill(marks_.bits, marks_.bits + 32, 0);
  for (size_t i = 0; i < bins.size(); ++i) {
    marks_.of[bins[i]] = static_cast<uint16_t>(i + 1);
    const uint32_t key = keys_.first + static_cast<uint32_t>(bins[i] % (keys_.half_bins + 1));
    marks_.bits[key / 32 % 32] |= 1u << 31 >> key % 32;  // the highest first: shifted to the left, it is the sign
  }
}

void Histogram::gather(int64_t segment) {
  Part& part = parts_[segment];
  const int64_t begin = segment * kSegment, end = std::min(begin + kSegment, n_);
  const float *values = static_cast<const float*>(values_) + begin, *weight = weight_ ? weight_ + begin : nullptr;
  constexpr int kMany = 1024;
  uint32_t found[kMany + kFiltered + 16];  // whole registers are written
  int n = 0;
  const auto keep = [&] {
    size_t size = part.found.size();
    part.found.resize(size + n);
    if (weight) part.found_weight.resize(size + n);
    for (int f = 0; f < n; ++f) {  // without branches, which nobody could foretell
      const float x = values[found[f]];
      uint32_t key;
      const uint16_t mark = marks_.of[bin_of(x, keys_, key)];
      part.found[size] = {x, mark};
      if (weight) part.found_weight[size] = weight[found[f]];
      size += (mark != 0) & (!weight || weight[found[f]] > 0);
    }
    part.found.resize(size);
    if (weight) part.found_weight.resize(size);
    n = 0;
  };
  auto* filter = marked;
#ifdef KMQ_X86
  constexpr int32_t kFewMarks = 64;  // more of them would leave few bits unset
  if (marks_.count <= kFewMarks && avx2()) filter = avx512() ? marked_avx512 : marked_avx2;
#endif
  for (int64_t i = 0; i < end - begin; i += kFiltered) {
    if (n > kMany) keep();
    if (i + kFiltered <= end - begin) n = filter(values + i, keys_, marks_, static_cast<uint32_t>(i), found, n);
    else
      for (; i < end - begin; ++i) found[n++] = static_cast<uint32_t>(i);
  }
  keep();
}

std::vector<int64_t> Histogram::take(Gathered& values) {
  const int64_t before = static_cast<int64_t>(values.x.size());
  std::vector<int64_t> ends(marks_.count + 1, 0);
  for (const Part& part : parts_)
    for (const Found& found : part.found) ++ends[found.mark];
  ends[0] = before;
  for (int32_t i = 1; i <= marks_.count; ++i) ends[i] += ends[i - 1];
  values.x.resize(ends[marks_.count]);
  if (weight_) values.w.resize(ends[marks_.count]);
  std::vector<int64_t> at(ends.begin(), ends.end() - 1);
  for (Part& part : parts_) {
    for (size_t f = 0; f < part.found.size(); ++f) {
      const int64_t to = at[part.found[f].mark - 1]++;
      values.x[to] = part.found[f].x;
      if (weight_) values.w[to] = part.found_weight[f];
    }
    part.found = {};
    part.found_weight = {};
  }
  return ends;
}

// All distinct values where there are few; false where there are many.
bool Histogram::few_distinct(Points& points) const {
  const float* values = static_cast<const float*>(values_);
  std::vector<uint32_t> keys(4 * kFewDistinct, 0);  // open addressing; no finite value has key 0
  std::vector<double> sums(keys.size(), 0.0);
  size_t used = 0;
  for (int64_t i = 0; i < n_; ++i) {
    const uint32_t key = sort_key(values[i]);
    size_t slot = (key * 2654435761u) >> 17 & (keys.size() - 1);
    while (keys[slot] && keys[slot] != key) slot = (slot + 1) & (keys.size() - 1);
    if (!keys[slot]) {
      if (++used > kFewDistinct) return false;
      keys[slot] = key;
    }
    sums[slot] += weight_ ? weight_[i] : 1.0;
  }
  std::vector<std::pair<uint32_t, double>> found;
  for (size_t slot = 0; slot < keys.size(); ++slot)
    if (keys[slot] && sums[slot] > 0) found.emplace_back(keys[slot], sums[slot]);
  std::sort(found.begin(), found.end());
  points.clear();
  for (const auto& [key, sum] : found) add_point(points, value_of(key), sum);
  return true;
}

KmeansFault Histogram::points(Scratch& scratch, Points& points) {
  points.clear();
  size_t outside = 0;
  for (const Part& part : parts_) {
    if (part.fault != KmeansFault::none) return part.fault;
    outside += part.outside.size();
  }
  // Sum of a bin over all segments, in their order; for 16-bit values `sum` is how many there are.
  const bool halves = dtype_ != Dtype::f32;
  const auto bin_of = [&](int64_t b) {
    Bin total{0, 0};
    for (const Part& part : parts_) {
      if (weight_) {
        total.weight += part.bins[b].weight;
        total.sum += part.bins[b].sum;
      } else if (const uint64_t packed = part.counts[b]) {
        total.weight += double(halves ? packed : packed / kOne);
        total.sum += double(halves ? packed : packed % kOne);
      }
    }
    return total;
  };
  if (dtype_ != Dtype::f32) {
    const uint32_t infinity = dtype_ == Dtype::bf16 ? 0x7f80 : 0x7c00;
    const auto add = [&](uint32_t raw) {
      const double weight = bin_of(raw).weight;
      if (weight <= 0) return;
      const uint16_t narrow = static_cast<uint16_t>(raw);
      add_point(points, dtype_ == Dtype::bf16 ? float(bf16{narrow}) : float(f16{narrow}), weight);
    };
    for (uint32_t raw = 0; raw < kHalfKeys; ++raw)
      if ((raw & 0x7fff) >= infinity && bin_of(raw).sum > 0) return KmeansFault::values_not_finite;
    for (uint32_t raw = infinity; raw-- > 0;) add(raw | 0x8000);
    for (uint32_t raw = 0; raw < infinity; ++raw) add(raw);
    return points.x.empty() ? KmeansFault::weights_zero : KmeansFault::none;
  }
  size_t occupied = 0;
  double total = 0;
  const int64_t half = keys_.half_bins;
  for (int64_t b = 0; b < num_bins(); ++b) {
    const double weight = b % (half + 1) == half ? 0 : bin_of(b).weight;
    occupied += weight > 0;
    total += weight;
  }
  if (weight_)
    for (const Part& part : parts_)
      for (const int64_t i : part.outside) total += weight_[i];
  if (weight_ && !(total > 0)) return KmeansFault::weights_zero;
  const bool resolved = occupied >= kFewBins && outside <= kMostOutside;
  if (!resolved && few_distinct(points)) return KmeansFault::none;
  if (occupied < static_cast<size_t>(num_bins()) / 40 || outside > kMostOutside)
    return sorted_points(values_, dtype_, weight_, n_, scratch, points);

  std::vector<std::pair<double, double>> far;  // values outside the bins, exact
  const float* values = static_cast<const float*>(values_);
  for (const Part& part : parts_)
    for (const int64_t i : part.outside)
      if (!weight_ || weight_[i] > 0) far.emplace_back(values[i], weight_ ? weight_[i] : 1.0);
  std::stable_sort(far.begin(), far.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  const auto add_far = [&](bool negative) {
    for (const auto& [x, w] : far)
      if ((x < keys_.origin) == negative) {
        add_point(points, x, w);
        points.spread.resize(points.x.size(), 0.0);
        points.members.resize(points.x.size());
      }
  };
  // |y| + scale is rounded to half a unit of its last bit, which is widest in the last octave; value - origin likewise.
  const double reach = 32.0 * keys_.scale;
  points.blur = (reach + std::fabs(keys_.origin)) * 0x1p-23;
  const double unit = std::ldexp(1.0, -keys_.low_bits);
  const auto add_bin = [&](uint32_t key, bool negative) {
    const int32_t b = static_cast<int32_t>(key + negative * (half + 1));
    const Bin bin = bin_of(b);
    if (bin.weight <= 0) return;
    const double low = float_of((keys_.first + key) << keys_.low_bits), high = float_of((keys_.first + key + 1) << keys_.low_bits);
    const double at = low + (high - low) * unit * (bin.sum / bin.weight);
    const auto value = [&](double key) { return keys_.origin + (negative ? keys_.scale - key : key - keys_.scale); };
    points.x.push_back(value(at));
    points.w.push_back(bin.weight);
    points.spread.push_back(!weight_ && bin.weight == 1 ? 0.0 : bin.weight * (at - low) * (high - at));
    const double from = value(negative ? high : low) - 2 * points.blur, to = value(negative ? low : high) + 2 * points.blur;
    points.members.push_back({0, 0, b, finite(from), finite(to)});
  };
  for (std::vector<double>* column : {&points.x, &points.w, &points.spread}) column->reserve(occupied + far.size());
  points.members.reserve(occupied + far.size());
  add_far(true);
  for (uint32_t key = keys_.half_bins; key-- > 0;) add_bin(key, true);
  for (uint32_t key = 0; key < keys_.half_bins; ++key) add_bin(key, false);
  add_far(false);
  points.ascend();  // the bins on either side of the origin may both have their mean there
  for (Part& part : parts_) {
    part.counts = {};
    part.bins = {};
  }
  return KmeansFault::none;
}

}  // namespace kmq::cpu
