// Rows of an input rounded to integers, see int8.h.
#include "int8.h"

#include <cmath>

namespace kmq::cpu {
namespace {

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, even on a tie, in the low bits
constexpr int32_t kRoundBits = 0x4b400000;
constexpr int64_t kParts = 2, kFields = 8;  // of a block: groups p * 16 + l

KMQ_PLAIN int32_t round_of(float x, float inverse) { return int32_t(bits_of(x * inverse + kRound)) - kRoundBits; }

// The largest and least of each group and 0. Returns 0, or NaN where a number is not finite.
KMQ_PLAIN float extremes(const float* x, int64_t padded, float* most, float* least) {
  float probe[kLanes] = {};
  for (int64_t col = 0; col < padded; col += kBlock, x += kBlock)
    for (int64_t p = 0; p < kParts; ++p, most += kLanes, least += kLanes) {
      float high[kLanes] = {}, low[kLanes] = {};
      for (int64_t f = p; f < kFields; f += kParts)
        for (int64_t l = 0; l < kLanes; ++l) {
          const float value = x[f * kLanes + l];
          high[l] = high[l] < value ? value : high[l];
          low[l] = value < low[l] ? value : low[l];
          probe[l] += value * 0.0f;
        }
      for (int64_t l = 0; l < kLanes; ++l) most[l] = high[l];
      for (int64_t l = 0; l < kLanes; ++l) least[l] = low[l];
    }
  float total = 0;
  for (int64_t l = 0; l < kLanes; ++l) total += probe[l];
  return total;
}

KMQ_PLAIN void range_of(const float* most, const float* least, int64_t groups, float& high, float& low) {
  float up[kLanes] = {}, down[kLanes] = {};
  for (int64_t g = 0; g < groups; g += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) {
      up[l] = up[l] < most[g + l] ? most[g + l] : up[l];
      down[l] = least[g + l] < down[l] ? least[g + l] : down[l];
    }
  high = low = 0;
  for (int64_t l = 0; l < kLanes; ++l) {
    high = high < up[l] ? up[l] : high;
    low = down[l] < low ? down[l] : low;
  }
}

// How many products more a row costs in steps of 1 / inverse, in a window from `first` on.
KMQ_PLAIN int32_t cost_of(const float* most, const float* least, int64_t groups, float inverse, int32_t first) {
  int32_t cost[kLanes] = {};
  for (int64_t g = 0; g < groups; g += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) {
      const int32_t above = round_of(most[g + l], inverse) - (first + 255), below = first - round_of(least[g + l], inverse);
      cost[l] += ((above > 0 ? above : 0) + 255) >> 8;
      cost[l] += ((below > 0 ? below : 0) + 255) >> 8;
    }
  int32_t total = 0;
  for (int64_t l = 0; l < kLanes; ++l) total += cost[l];
  return total;
}

KMQ_PLAIN void round_words(const float* x, int64_t padded, float inverse, int32_t first, int32_t last, int16_t* to) {
  for (int64_t i = 0; i < padded; ++i) {
    const int32_t q = round_of(x[i], inverse), low = q < first ? first : q;
    to[i] = int16_t(low > last ? last : low);
  }
}

// Bytes in the order of groups: the four columns of one are one dword.
KMQ_PLAIN void round_bytes(const float* x, int64_t padded, float inverse, int32_t first, uint32_t* to) {
  for (int64_t col = 0; col < padded; col += kBlock, x += kBlock)
    for (int64_t p = 0; p < kParts; ++p, to += kLanes) {
      uint32_t four[kLanes] = {};
      for (int64_t f = p; f < kFields; f += kParts)
        for (int64_t l = 0; l < kLanes; ++l) {
          const int32_t q = round_of(x[f * kLanes + l], inverse) - first, low = q < 0 ? 0 : q, in = low > 255 ? 255 : low;
          four[l] |= uint32_t(in) << (4 * (f - p));
        }
      for (int64_t l = 0; l < kLanes; ++l) to[l] = four[l];
    }
}

// Lists what is outside of the window, above it or (sign -1) below.
void list_outside(const float* x, const float* extreme, int64_t groups, float inverse, int32_t edge, int32_t sign, Int8Added* list, int32_t& count) {
  for (int64_t g = 0; g < groups; ++g) {
    if (sign * (round_of(extreme[g], inverse) - edge) <= 0) continue;
    const float* const four = x + g / (kParts * kLanes) * kBlock + g % (kParts * kLanes) / kLanes * kLanes + g % kLanes;
    int32_t left[kInt8Group], most = 0;
    for (int64_t i = 0; i < kInt8Group; ++i) {
      left[i] = std::max(0, sign * (round_of(four[i * kParts * kLanes], inverse) - edge));
      most = std::max(most, left[i]);
    }
    for (; most > 0; most -= 255) {
      Int8Added& added = list[count++];
      added = {int32_t(g), 0};
      for (int64_t i = 0; i < kInt8Group; ++i) {
        const int32_t here = std::min(255, left[i]);
        added.bytes |= uint32_t(here) << (8 * i);
        left[i] -= here;
      }
    }
  }
}

// One row of `padded` numbers; returns its scale. `group` [2 * padded / 4] is scratch.
KMQ_PLAIN float quantize_row(const float* x, int64_t cols, float* group, bool bytes, uint8_t* to, Int8Tail* tail) {
  const int64_t padded = int8_padded(cols), groups = padded / kInt8Group;
  float *const most = group, *const least = group + groups, high, low;
  const float probe = extremes(x, padded, most, least);
  range_of(most, least, groups, high, low);
  float step = high / 255.0f - low / 255.0f;
  const bool finite = probe == 0, zero = !(step >= 1e-36f);  // of smaller ones the inverse might not be finite
  if (tail) *tail = {};
  if (!finite || zero) {
    std::memset(to, 0, padded * (bytes ? 1 : 2));
    return finite ? 0.0f : std::nanf("");
  }
  float inverse = 1.0f / step;
  int32_t first = round_of(low, inverse);
  const int32_t limit = int32_t(int8_most_added(cols));
  bool halved = false;
  for (int i = 0; i < kInt8Halvings; ++i) {
    const int32_t least_of_all = round_of(low, inverse * 2), next = least_of_all < -128 ? -128 : least_of_all;
    if (cost_of(most, least, groups, inverse * 2, next) > limit) break;
    inverse *= 2, step *= 0.5f, first = next, halved = true;
  }
  // Without halving, rounding may leave one step outside the window, which is cut off.
  if (bytes) {
    round_bytes(x, padded, inverse, first, reinterpret_cast<uint32_t*>(to));
    // Beyond the last column a panel holds anything, and the byte 0 is not the number 0.
    for (int64_t c = cols; c < padded; ++c) to[(c / kBlock * 32 + c / kLanes % kParts * kLanes + c % kLanes) * kInt8Group + c % kBlock / 32] = 0;
    tail->least = first;
    if (halved) {
      int32_t count = 0;
      list_outside(x, most, groups, inverse, first + 255, 1, tail->list(), count);
      tail->above = count;
      list_outside(x, least, groups, inverse, first, -1, tail->list(), count);
      tail->below = count - tail->above;
    }
  } else {
    const int32_t end = halved ? 32767 : first + 255;
    round_words(x, padded, inverse, halved ? -32768 : first, end, reinterpret_cast<int16_t*>(to));
  }
  return step;
}

#ifdef KMQ_X86
KMQ_AVX2 float quantize_row_avx2(const float* x, int64_t cols, float* group, uint8_t* to) {
  return quantize_row(x, cols, group, false, to, nullptr);
}

KMQ_VNNI float quantize_row_vnni(const float* x, int64_t cols, float* group, uint8_t* to, Int8Tail* tail) {
  return quantize_row(x, cols, group, true, to, tail);
}
#endif

}  // namespace

template <typename T>
void int8_quantize(const T* input, int64_t ld, int64_t begin, int64_t end, const Int8Input& out) {
  const int64_t padded = int8_padded(out.cols), stride = out.stride();
  float* const group = workspace(padded + padded / 2);
  float* const row = group + padded / 2;
  std::fill(row, row + padded, 0.0f);
  for (int64_t m = begin; m < end; ++m) {
    const float* x = row;
    if constexpr (std::is_same_v<T, float>) {
      if (out.cols == padded) x = input + m * ld;
      else std::copy(input + m * ld, input + m * ld + out.cols, row);
    } else {
      for (int64_t c = 0; c < out.cols; ++c) row[c] = static_cast<float>(input[m * ld + c]);
    }
    uint8_t* const to = out.data + m * stride;
#ifdef KMQ_X86
    if (vnni()) out.scale[m] = quantize_row_vnni(x, out.cols, group, to, out.tail(m));
    else if (avx2()) out.scale[m] = quantize_row_avx2(x, out.cols, group, to);
    else
#endif
      out.scale[m] = quantize_row(x, out.cols, group, false, to, nullptr);
  }
}

template void int8_quantize<float>(const float*, int64_t, int64_t, int64_t, const Int8Input&);
template void int8_quantize<bf16>(const bf16*, int64_t, int64_t, int64_t, const Int8Input&);
template void int8_quantize<f16>(const f16*, int64_t, int64_t, int64_t, const Int8Input&);

}  // namespace kmq::cpu
