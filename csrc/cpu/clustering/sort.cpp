// From the values of one problem to points by sorting them.
#include <algorithm>
#include <cmath>

#include "kmeans.h"
#include "../simd.h"

namespace kmq::cpu {
namespace {

float load(const void* values, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f32) return static_cast<const float*>(values)[i];
  return dtype == Dtype::bf16 ? float(static_cast<const bf16*>(values)[i]) : float(static_cast<const f16*>(values)[i]);
}

// Stable radix sort by the 32 bits from `shift` on.
template <typename T>
void radix_sort(std::vector<T>& items, int shift) {
  constexpr int kDigit = 11;
  std::vector<T> other(items.size());
  std::vector<int64_t> start(size_t(1) << kDigit);  // a problem may have more values than 32 bits count
  constexpr T kMask = (T(1) << kDigit) - 1;
  for (int bit = 0; bit < 32; bit += kDigit) {
    std::fill(start.begin(), start.end(), 0);
    const int at = shift + bit;
    for (const T item : items) ++start[(item >> at) & kMask];
    int64_t sum = 0;
    for (int64_t& s : start) {
      const int64_t count = s;
      s = sum;
      sum += count;
    }
    for (const T item : items) other[start[(item >> at) & kMask]++] = item;
    items.swap(other);
  }
}

// Few values are sorted as items: a key of 18 bits, which grows with the value in even steps near the middle of the data; the
// value in sorting order; its position. Two passes order the keys, and what shares a key is put right by insertion.
constexpr int kIndexBits = 14, kKeyBits = 18, kDigit = kKeyBits / 2, kKeyShift = kIndexBits + 32;
constexpr uint32_t kIndexMask = (1 << kIndexBits) - 1, kDigitMask = (1 << kDigit) - 1;
constexpr uint32_t kHalfKeys = 5 << 14;  // five octaves of 2^14 steps for each sign
static_assert(kSmall <= 1 << kIndexBits && 2 * kHalfKeys <= 1 << kKeyBits);

struct Middle { float origin, scale; };

Middle middle_of(const float* x, int64_t n) {
  constexpr int kProbes = 15;
  float probes[kProbes], roots = 0;
  for (int i = 0; i < kProbes; ++i) {
    const float probe = x[i * n / kProbes];
    probes[i] = std::fabs(probe) <= kLargest ? probe : 0;
  }
  std::sort(probes, probes + kProbes);
  const float origin = probes[kProbes / 2];
  for (const float probe : probes) roots += std::sqrt(std::fabs(probe - origin));
  return {origin, std::max(3 * (roots / kProbes) * (roots / kProbes), 1e-30f)};
}

// False where a value is not finite.
KMQ_PLAIN bool make_items(const float* x, int64_t n, Middle middle, uint64_t* items) {
  const uint32_t first = bits_of(middle.scale);
  uint32_t outside = 0;
  for (int64_t i = 0; i < n; ++i) {
    outside |= !(std::fabs(x[i]) <= kLargest);
    const float y = x[i] - middle.origin;
    const uint32_t steps = std::min((bits_of(std::fabs(y) + middle.scale) - first) >> 9, kHalfKeys - 1);
    const uint32_t key = y < 0 ? kHalfKeys - 1 - steps : kHalfKeys + steps;
    items[i] = uint64_t(key) << kKeyShift | uint64_t(sort_key(x[i])) << kIndexBits | uint64_t(i);
  }
  return !outside;
}

// False where a value occurs twice.
KMQ_PLAIN bool take_values(const uint64_t* items, int64_t n, double* x) {
  uint32_t repeated = 0;
  for (int64_t i = 0; i < n; ++i) x[i] = value_of(static_cast<uint32_t>(items[i] >> kIndexBits));
  for (int64_t i = 1; i < n; ++i) repeated |= x[i] == x[i - 1];
  return !repeated;
}

#ifdef KMQ_X86
KMQ_AVX2 bool make_items_avx2(const float* x, int64_t n, Middle middle, uint64_t* items) { return make_items(x, n, middle, items); }
KMQ_AVX2 bool take_values_avx2(const uint64_t* items, int64_t n, double* x) { return take_values(items, n, x); }
KMQ_AVX512 bool make_items_avx512(const float* x, int64_t n, Middle middle, uint64_t* items) { return make_items(x, n, middle, items); }
KMQ_AVX512 bool take_values_avx512(const uint64_t* items, int64_t n, double* x) { return take_values(items, n, x); }
#endif

bool make_items_path(const float* x, int64_t n, uint64_t* items) {
  const Middle middle = middle_of(x, n);
#ifdef KMQ_X86
  if (avx512()) return make_items_avx512(x, n, middle, items);
  if (avx2()) return make_items_avx2(x, n, middle, items);
#endif
  return make_items(x, n, middle, items);
}

bool take_values_path(const uint64_t* items, int64_t n, double* x) {
#ifdef KMQ_X86
  if (avx512()) return take_values_avx512(items, n, x);
  if (avx2()) return take_values_avx2(items, n, x);
#endif
  return take_values(items, n, x);
}

void sort_items(uint64_t* items, uint64_t* others, int64_t n) {
  uint32_t start[2][1 << kDigit] = {};
  for (int64_t i = 0; i < n; ++i) {
    ++start[0][items[i] >> kKeyShift & kDigitMask];
    ++start[1][items[i] >> (kKeyShift + kDigit)];
  }
  uint32_t sums[2] = {0, 0};
  for (int digit = 0; digit < 1 << kDigit; ++digit)
    for (int pass = 0; pass < 2; ++pass) {
      const uint32_t count = start[pass][digit];
      start[pass][digit] = sums[pass];
      sums[pass] += count;
    }
  for (int64_t i = 0; i < n; ++i) others[start[0][items[i] >> kKeyShift & kDigitMask]++] = items[i];
  for (int64_t i = 0; i < n; ++i) items[start[1][others[i] >> (kKeyShift + kDigit)]++] = others[i];
  int64_t moves = 0;
  for (int64_t i = 1; i < n; ++i) {
    const uint64_t item = items[i];
    if (items[i - 1] <= item) continue;
    int64_t at = i;
    for (; at > 0 && items[at - 1] > item; --at) items[at] = items[at - 1];
    items[at] = item;
    if ((moves += i - at) > 8 * n) {  // many values share a key
      std::sort(items, items + n);
      return;
    }
  }
}

KmeansFault few_points(const void* values, Dtype dtype, const float* weight, int64_t n, Scratch& scratch, Points& points) {
  const float* x = static_cast<const float*>(values);
  if (dtype != Dtype::f32) {
    scratch.wide.resize(n);
    for (int64_t i = 0; i < n; ++i) scratch.wide[i] = load(values, dtype, i);
    x = scratch.wide.data();
  }
  scratch.items.resize(n);
  scratch.others.resize(n);
  uint64_t* items = scratch.items.data();
  if (!make_items_path(x, n, items)) return KmeansFault::values_not_finite;
  int64_t used = n;
  if (weight) {
    used = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (const KmeansFault fault = weight_fault(weight[i]); fault != KmeansFault::none) return fault;
      items[used] = items[i];
      used += weight[i] > 0;
    }
    if (used == 0) return KmeansFault::weights_zero;
  }
  sort_items(items, scratch.others.data(), used);
  points.x.resize(used);
  if (take_values_path(items, used, points.x.data()) && !weight) return KmeansFault::none;
  points.w.resize(used);
  int64_t at = -1;
  for (int64_t i = 0; i < used; ++i) {
    const double w = weight ? weight[items[i] & kIndexMask] : 1.0f;
    if (at >= 0 && points.x[i] == points.x[at]) {
      points.w[at] += w;
    } else {
      points.x[++at] = points.x[i];
      points.w[at] = w;
    }
  }
  points.x.resize(at + 1);
  points.w.resize(at + 1);
  return KmeansFault::none;
}

}  // namespace

KmeansFault weight_fault(float weight) {
  if (!(std::fabs(weight) <= kLargest)) return KmeansFault::weights_not_finite;
  return weight < 0 ? KmeansFault::weights_negative : KmeansFault::none;
}

void add_point(Points& points, double x, double w) {
  if (!points.x.empty() && points.x.back() == x) {
    points.w.back() += w;
  } else {
    points.x.push_back(x);
    points.w.push_back(w);
  }
}

KmeansFault sorted_points(const void* values, Dtype dtype, const float* weight, int64_t n, Scratch& scratch, Points& points) {
  points.clear();
  if (n <= kSmall) return few_points(values, dtype, weight, n, scratch, points);
  if (weight) {
    std::vector<uint64_t> items;
    items.reserve(n);
    for (int64_t i = 0; i < n; ++i) {
      const float x = load(values, dtype, i), w = weight[i];
      if (!(std::fabs(x) <= kLargest)) return KmeansFault::values_not_finite;
      if (const KmeansFault fault = weight_fault(w); fault != KmeansFault::none) return fault;
      if (w > 0) items.push_back(uint64_t(sort_key(x)) << 32 | bits_of(w));
    }
    if (items.empty()) return KmeansFault::weights_zero;
    radix_sort(items, 32);
    points.x.reserve(items.size());
    points.w.reserve(items.size());
    for (const uint64_t item : items) add_point(points, value_of(uint32_t(item >> 32)), float_of(uint32_t(item)));
    return KmeansFault::none;
  }
  std::vector<uint32_t> items(n);
  for (int64_t i = 0; i < n; ++i) {
    const float x = load(values, dtype, i);
    if (!(std::fabs(x) <= kLargest)) return KmeansFault::values_not_finite;
    items[i] = sort_key(x);
  }
  radix_sort(items, 0);
  points.x.reserve(n);
  points.w.reserve(n);
  for (const uint32_t item : items) add_point(points, value_of(item), 1.0);
  return KmeansFault::none;
}

}  // namespace kmq::cpu
