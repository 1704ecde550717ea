// From the values of one problem to points by counting them in a histogram.
//
// The histogram's key of y = value - origin is the bit pattern of |y| + scale without its low bits: bins of equal width below
// `scale`, twice as wide in each octave beyond, one addition and a few integer operations a value, no pass for the range. The low
// bits are summed beside the count, so every bin knows the exact mean of its members. 16-bit values count under their own bits.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"
#include "kmeans.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kmq::cpu {
namespace {

constexpr int kLowBits = 11;                    // 4096 bins an octave
constexpr uint32_t kLowMask = (1u << kLowBits) - 1;
constexpr uint32_t kHalfBins = 5 << (23 - kLowBits);  // five octaves for each sign
constexpr int64_t kBins = 2 * kHalfBins;
constexpr int64_t kHalfKeys = 1 << 16;
constexpr int64_t kSample = 4096;
constexpr size_t kMostOutside = 1 << 15;        // of a segment
constexpr size_t kFewBins = 2048, kFewDistinct = 8192;  // fewer occupied bins may mean few distinct values
constexpr size_t kTooFewBins = 1024;             // to resolve the values

}  // namespace

Histogram::Histogram(const void* values, Dtype dtype, const float* weight, int64_t n)
    : values_(values), dtype_(dtype), weight_(weight), n_(n), parts_((n + kSegment - 1) / kSegment) {
  if (dtype != Dtype::f32) return;
  std::vector<float> sample;
  const int64_t stride = std::max<int64_t>(1, n / kSample);
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
  origin_ = std::fabs(median) < 2 * around_median ? 0.0f : median;
  const double size = origin_ == 0 ? size_around(0) : around_median;
  if (size > 0) scale_ = static_cast<float>(std::ldexp(1.0, std::clamp(static_cast<int>(std::ceil(std::log2(3 * size))), -100, 120)));
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

struct Keys {
  float origin, scale;
  uint32_t first;  // key of scale itself
};

constexpr int kGroup = 256;  // values whose keys are computed at a time

// Bins and low bits of kGroup values. False where one of them lies outside (or is not finite).
bool keys_scalar(const float* values, const Keys& keys, uint32_t* bin, uint32_t* low) {
  bool inside = true;
  for (int i = 0; i < kGroup; ++i) {
    const float y = values[i] - keys.origin;
    const uint32_t u = bits_of(std::fabs(y) + keys.scale), key = (u >> kLowBits) - keys.first;
    inside &= key < kHalfBins;
    bin[i] = key + (bits_of(y) >> 31) * kHalfBins;
    low[i] = u & kLowMask;
  }
  return inside;
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) bool keys_avx2(const float* values, const Keys& keys, uint32_t* bin, uint32_t* low) {
  const __m256 origin = _mm256_set1_ps(keys.origin), scale = _mm256_set1_ps(keys.scale);
  const __m256i first = _mm256_set1_epi32(static_cast<int>(keys.first)), last = _mm256_set1_epi32(kHalfBins - 1);
  const __m256i half = _mm256_set1_epi32(kHalfBins), low_mask = _mm256_set1_epi32(kLowMask);
  const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256i outside = _mm256_setzero_si256();
  for (int i = 0; i < kGroup; i += 8) {
    const __m256 y = _mm256_sub_ps(_mm256_loadu_ps(values + i), origin);
    const __m256i u = _mm256_castps_si256(_mm256_add_ps(_mm256_and_ps(y, no_sign), scale));
    const __m256i key = _mm256_sub_epi32(_mm256_srli_epi32(u, kLowBits), first);
    outside = _mm256_or_si256(outside, _mm256_cmpgt_epi32(key, last));
    const __m256i negative = _mm256_srai_epi32(_mm256_castps_si256(y), 31);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bin + i), _mm256_add_epi32(key, _mm256_and_si256(negative, half)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + i), _mm256_and_si256(u, low_mask));
  }
  return _mm256_testz_si256(outside, outside);
}
#endif

template <typename F, typename Add, typename Outside>
void count_values(const float* values, int64_t begin, int64_t end, const F& keys_of, const Keys& keys, const Add& add,
                  const Outside& add_outside) {
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
    if (keys_of(group, keys, bin, low)) {
      for (int lane = 0; lane < count; ++lane) add(i + lane, bin[lane], low[lane]);
      continue;
    }
    for (int lane = 0; lane < count; ++lane) {
      const uint32_t key = (bits_of(std::fabs(group[lane] - keys.origin) + keys.scale) >> kLowBits) - keys.first;
      if (key < kHalfBins) add(i + lane, bin[lane], low[lane]);
      else add_outside(i + lane);
    }
  }
}

}  // namespace

void Histogram::count_float(Part& part, int64_t begin, int64_t end) {
  const float* values = static_cast<const float*>(values_);
  const Keys keys{origin_, scale_, bits_of(scale_) >> kLowBits};
  const auto add_outside = [&](int64_t i) {
    if (!(std::fabs(values[i]) <= kLargest)) part.fault = KmeansFault::values_not_finite;
    if (weight_ && part.fault == KmeansFault::none) part.fault = weight_fault(weight_[i]);
    if (part.outside.size() <= kMostOutside) part.outside.push_back(i);
  };
  const auto run = [&](const auto& add) {
#if defined(__x86_64__)
    if (avx2()) return count_values(values, begin, end, keys_avx2, keys, add, add_outside);
#endif
    count_values(values, begin, end, keys_scalar, keys, add, add_outside);
  };
  if (!weight_) {
    // Count and sum of the low bits share one integer: 2^21 values of 11 bits sum to less than 2^32.
    part.counts.assign(kBins, 0);
    uint64_t* counts = part.counts.data();
    run([=](int64_t, uint32_t bin, uint32_t low) { counts[bin] += (uint64_t(1) << 32) + low; });
    return;
  }
  part.bins.assign(kBins, Bin{0, 0});
  Bin* bins = part.bins.data();
  const float* weight = weight_;
  KmeansFault fault = KmeansFault::none;
  run([&](int64_t i, uint32_t bin, uint32_t low) {
    const double w = weight[i];
    if (!(w >= 0 && w <= 3.4028234e38)) fault = weight_fault(weight[i]);
    bins[bin].weight += w;
    bins[bin].sum += w * low;
  });
  if (part.fault == KmeansFault::none) part.fault = fault;
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
        total.weight += double(halves ? packed : packed >> 32);
        total.sum += double(halves ? packed : packed & 0xffffffffu);
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
  for (int64_t b = 0; b < kBins; ++b) {
    const double weight = bin_of(b).weight;
    occupied += weight > 0;
    total += weight;
  }
  if (weight_)
    for (const Part& part : parts_)
      for (const int64_t i : part.outside) total += weight_[i];
  if (weight_ && !(total > 0)) return KmeansFault::weights_zero;
  const bool resolved = occupied >= kFewBins && outside <= kMostOutside;
  if (!resolved && few_distinct(points)) return KmeansFault::none;
  if (occupied < kTooFewBins || outside > kMostOutside) return sorted_points(values_, dtype_, weight_, n_, scratch, points);

  std::vector<std::pair<double, double>> far;  // values outside the bins, exact
  const float* values = static_cast<const float*>(values_);
  for (const Part& part : parts_)
    for (const int64_t i : part.outside)
      if (!weight_ || weight_[i] > 0) far.emplace_back(values[i], weight_ ? weight_[i] : 1.0);
  std::stable_sort(far.begin(), far.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  const auto add_far = [&](bool negative) {
    for (const auto& [x, w] : far)
      if ((x < origin_) == negative) {
        add_point(points, x, w);
        points.spread.resize(points.x.size(), 0.0);
      }
  };
  const uint32_t first = bits_of(scale_) >> kLowBits;
  const auto add_bin = [&](uint32_t key, bool negative) {
    const Bin bin = bin_of(key + negative * kHalfBins);
    if (bin.weight <= 0) return;
    const double low = float_of((first + key) << kLowBits), high = float_of((first + key + 1) << kLowBits);
    const double at = low + (high - low) / (kLowMask + 1) * (bin.sum / bin.weight), y = at - scale_;
    points.x.push_back(origin_ + (negative ? -y : y));
    points.w.push_back(bin.weight);
    points.spread.push_back(!weight_ && bin.weight == 1 ? 0.0 : bin.weight * (at - low) * (high - at));
  };
  for (std::vector<double>* column : {&points.x, &points.w, &points.spread}) column->reserve(occupied + far.size());
  add_far(true);
  for (uint32_t key = kHalfBins; key-- > 0;) add_bin(key, true);
  for (uint32_t key = 0; key < kHalfBins; ++key) add_bin(key, false);
  add_far(false);
  // The bins on either side of the origin may both have their mean there.
  for (size_t i = 1; i < points.x.size(); ++i) {
    if (points.x[i] > points.x[i - 1]) continue;
    points.x[i] = std::nextafter(points.x[i - 1], HUGE_VAL);
  }
  // |y| + scale is rounded to half a unit of its last bit, which is widest in the last octave; value - origin likewise.
  const double reach = 32.0 * scale_;
  points.blur = (reach + std::fabs(origin_)) * 0x1p-23;
  return KmeansFault::none;
}

}  // namespace kmq::cpu
