// A codebook in integers, with the scale that costs the weights the least.
#include <cmath>
#include <vector>

#include "../codes/decode.h"
#include "int8.h"

namespace kmq::cpu {
namespace {

#ifdef KMQ_X86
template <int bits>
KMQ_AVX2 void indices_of(const uint8_t* block, uint8_t* index) {
  indices_avx2<bits>(block, index);
}
#endif

// counts [K] of the indices of one row.
void count_row(const Packed& packed, int64_t row, uint32_t* counts) {
  alignas(32) uint8_t index[kBlock];
  const uint8_t* block = packed.data + row * packed.row_bytes();
  for (int64_t col = 0; col < packed.cols; col += kBlock, block += kLanes * packed.bits) {
#ifdef KMQ_X86
    if (avx2()) with_small(packed.bits, [&](auto bits) { indices_of<bits()>(block, index); });
    else
#endif
      decode_block(block, packed.bits, index);
    const int64_t count = std::min(packed.cols - col, kBlock);
    for (int64_t c = 0; c < count; ++c) ++counts[index[c]];
  }
}

// One codebook, padded to a multiple of kLanes entries that nothing uses.
struct Entries {
  alignas(64) double value[256], members[256], rounded[256];
  int64_t count;
  bool left_out;  // entries above the magnitude that leave_out returned
};

// Rounds the entries at a scale of 1 / inverse; returns sum n c t, sum n t^2 and sum n t of the integers t.
struct Rounded {
  double product, square, sum;
};

KMQ_PLAIN Rounded round_plain(Entries& e, double inverse, double limit) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  double products[kLanes] = {}, squares[kLanes] = {}, sums[kLanes] = {};
  for (int64_t k = 0; k < e.count; k += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) {
      const double up = e.value[k + l] * inverse, low = up > limit ? limit : up, in = low < -limit ? -limit : low;
      const double t = (in + kRound) - kRound, weighted = e.members[k + l] * t;
      e.rounded[k + l] = t;
      products[l] += weighted * e.value[k + l];
      squares[l] += weighted * t;
      sums[l] += weighted;
    }
  Rounded total{};
  for (int64_t l = 0; l < kLanes; ++l) total.product += products[l], total.square += squares[l], total.sum += sums[l];
  return total;
}

#ifdef KMQ_X86
KMQ_AVX2 Rounded round_avx2(Entries& e, double inverse, double limit) {
  return round_plain(e, inverse, limit);
}
#endif

Rounded round_entries(Entries& e, double inverse, double limit) {
#ifdef KMQ_X86
  if (avx2()) return round_avx2(e, inverse, limit);
#endif
  return round_plain(e, inverse, limit);
}

// The largest magnitude in use. One step for all would leave most entries few steps where entries of at most a 4096th of the weights, or of
// one weight, are at least twice as large as all others. Those of them that are more than kLittleMore as large count as not in use: each of
// their weights costs time.
constexpr double kLittleMore = 1.4;

double leave_out(Entries& e, int64_t K) {
  int64_t order[256];
  double total = 0, seen = 0, most = 0;
  for (int64_t k = 0; k < K; ++k) order[k] = k, total += e.members[k];
  std::sort(order, order + K, [&](int64_t a, int64_t b) { return std::fabs(e.value[a]) > std::fabs(e.value[b]); });
  e.left_out = false;
  for (int64_t i = 0; i < K; ++i) {
    const double members = e.members[order[i]], magnitude = std::fabs(e.value[order[i]]);
    if (members == 0) continue;
    if (most == 0) most = magnitude;
    seen += members;
    if (seen <= std::max(1.0, total / 4096)) continue;
    if (magnitude == 0 || 2 * magnitude > most) return most;
    e.left_out = true;
    most = magnitude;
    for (int64_t k = 0; k < K; ++k) {
      const double here = std::fabs(e.value[k]);
      if (here > kLittleMore * magnitude) e.members[k] = 0;
      else if (e.members[k] > 0) most = std::max(most, here);
    }
    return most;
  }
  return most;
}

// What the square of the sum of a row's errors counts for beside the sum of their squares: inputs whose mean is not zero see it.
// K-means leaves no such sum; rounding a codebook moves all weights of a cluster alike. Rows of one codebook are taken for alike.
constexpr double kMeanWeight = 0.1;

// table and scale of one codebook. For each candidate scale the entries are rounded, and the scale is fitted again to the rounded
// entries: of integers t, sum n c t / sum n t^2 has the least squared error. The candidate of least cost is taken.
float fit(Entries& e, int64_t K, int64_t rows, int limit, int8_t* table) {
  std::memset(table, 0, size_t(K));
  for (int64_t k = 0; k < K; ++k)
    if (!std::isfinite(e.value[k])) return std::nanf("");
  const double most = leave_out(e, K);
  if (most == 0) return 0;
  const int candidates = int(std::clamp<int64_t>(1024 / K, 8, 64));
  double squares = 0, sum = 0;
  for (int64_t k = 0; k < K; ++k) squares += e.members[k] * e.value[k] * e.value[k], sum += e.members[k] * e.value[k];
  double best = HUGE_VAL, best_scale = most / limit;
  for (int i = 0; i < candidates; ++i) {
    // From the whole range down to half of it: at a coarser scale the entries would lose more than chance can win.
    const double inverse = limit * (1 - 0.5 * i / candidates) / most;
    const Rounded of = round_entries(e, inverse, limit);
    if (!(of.square > 0)) continue;
    const double scale = of.product / of.square, off = sum - scale * of.sum;
    const double cost = squares - scale * of.product + kMeanWeight * off * off / double(rows);
    if (cost >= best) continue;
    best = cost;
    best_scale = scale;
    for (int64_t k = 0; k < K; ++k) table[k] = std::fabs(e.value[k]) > most && e.left_out ? int8_t(0) : int8_t(e.rounded[k]);
  }
  return float(best_scale);
}

}  // namespace

void int8_codebook(const Packed& packed, const float* codebook, int64_t group_rows, int8_t* table, float* scale, int32_t* row_sum,
                   const Parallel& parallel) {
  const int64_t rows = packed.rows, K = int64_t(1) << packed.bits, groups = ceil_div(rows, group_rows);
  std::vector<uint32_t> counts(rows * K);
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / (packed.cols + 1));
  parallel(rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) count_row(packed, r, counts.data() + r * K);
  });
  parallel(groups, std::max<int64_t>(1, 64 / K), [&](int64_t begin, int64_t end) {
    Entries entries;
    entries.count = round_up(K, kLanes);
    for (int64_t g = begin; g < end; ++g) {
      for (int64_t k = 0; k < entries.count; ++k) {
        entries.value[k] = k < K ? codebook[g * K + k] : 0;
        entries.members[k] = 0;
      }
      for (int64_t r = g * group_rows; r < std::min(rows, (g + 1) * group_rows); ++r)
        for (int64_t k = 0; k < K; ++k) entries.members[k] += counts[r * K + k];
      scale[g] = fit(entries, K, std::min(rows - g * group_rows, group_rows), kInt8Limit, table + g * K);
      for (int64_t r = g * group_rows; r < std::min(rows, (g + 1) * group_rows); ++r) {
        int64_t sum = 0;
        for (int64_t k = 0; k < K; ++k) sum += int64_t(counts[r * K + k]) * table[g * K + k];
        row_sum[r] = int32_t(sum);
      }
    }
  });
}

}  // namespace kmq::cpu
