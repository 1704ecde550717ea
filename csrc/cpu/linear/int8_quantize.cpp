// Rows of an input rounded to integers, see int8.h.
#include "int8.h"

#include <cmath>

#include "../lanes.h"

namespace kmq::cpu {
namespace {

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, even on a tie, in the low bits
constexpr int32_t kRoundBits = 0x4b400000;
constexpr int64_t kParts = 2, kFields = 8;  // of a block: groups p * 16 + l
static_assert(kLanes == kWidth);

KMQ_PLAIN int32_t round_of(float x, float inverse) { return int32_t(bits_of(x * inverse + kRound)) - kRoundBits; }
template <int W>
KMQ_PLAIN Ints<W> round_of(Floats<W> x, float inverse) {
  return Ints<W>(x * inverse + kRound) - kRoundBits;
}

// The largest and least of each group and 0, and of all. Returns whether all numbers are finite.
template <int W>
KMQ_PLAIN bool extremes(const float* x, int64_t padded, float* most, float* least, float& high, float& low) {
  Sixteen<float, W> sum(0), up(0), down(0);
  const float* from = x;
  for (int64_t col = 0; col < padded; col += kBlock, from += kBlock)
    for (int64_t p = 0; p < kParts; ++p)
      for (int h = 0; h < kWidth / W; ++h, most += W, least += W) {
        Floats<W> above{}, below{};
        for (int64_t f = p; f < kFields; f += kParts) {
          const Floats<W> value = load_floats<W>(from + f * kLanes + h * W);
          above = Larger::of(value, above);
          below = Smaller::of(value, below);
          sum.part[h] += value;
        }
        store_floats<W>(most, above);
        store_floats<W>(least, below);
        up.part[h] = Larger::of(above, up.part[h]);
        down.part[h] = Smaller::of(below, down.part[h]);
      }
  high = up.template fold<Larger>();
  low = down.template fold<Smaller>();
  if (std::isfinite(sum.template fold<Sum>())) return true;
  bool finite = true;  // the sum alone may be too large
  for (int64_t i = 0; i < padded; ++i) finite = finite && std::isfinite(x[i]);
  return finite;
}

// How many products more a row costs in steps of 1 / inverse, in a window from `first` on.
template <int W>
KMQ_PLAIN int32_t cost_of(const float* most, const float* least, int64_t groups, float inverse, int32_t first) {
  Sixteen<int32_t, W> cost(0);
  for (int64_t g = 0; g < groups; g += W) {
    const Ints<W> above = round_of<W>(load_floats<W>(most + g), inverse) - (first + 255);
    const Ints<W> below = first - round_of<W>(load_floats<W>(least + g), inverse);
    cost.part[0] += (Larger::of(above, Ints<W>{}) + 255) >> 8;
    cost.part[0] += (Larger::of(below, Ints<W>{}) + 255) >> 8;
  }
  return cost.template fold<Sum>();
}

template <int W>
KMQ_PLAIN void round_words(const float* x, int64_t padded, float inverse, int32_t first, int32_t last, int16_t* to) {
  for (int64_t i = 0; i < padded; i += W) {
    const Ints<W> q = Smaller::of(Larger::of(round_of<W>(load_floats<W>(x + i), inverse), Ints<W>{} + first), Ints<W>{} + last);
    const auto words = __builtin_convertvector(q, typename Vector<int16_t, W>::type);
    std::memcpy(to + i, &words, sizeof words);
  }
}

#ifdef KMQ_X86
// Bytes in the order of groups: the four columns of one are one dword.
KMQ_PLAIN void round_bytes(const float* x, int64_t padded, float inverse, int32_t first, uint8_t* to) {
  constexpr int W = kWidthAvx512;
  for (int64_t col = 0; col < padded; col += kBlock, x += kBlock)
    for (int64_t p = 0; p < kParts; ++p, to += sizeof(Ints<W>)) {
      Ints<W> four{};
      for (int64_t f = p; f < kFields; f += kParts) {
        const Ints<W> q = round_of<W>(load_floats<W>(x + f * kLanes), inverse) - first;
        four |= Smaller::of(Larger::of(q, Ints<W>{}), Ints<W>{} + 255) << int32_t(4 * (f - p));
      }
      std::memcpy(to, &four, sizeof four);
    }
}

// Lists what is outside of the window: above its last step, or (sign -1) below its first.
KMQ_VNNI int32_t list_outside(const float* x, const float* extreme, int64_t groups, float inverse, int32_t edge, int32_t sign, Int8Added* list) {
  int32_t count = 0;
  for (int64_t first = 0; first < groups; first += kLanes) {
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(extreme + first), _mm512_set1_ps(inverse)));
    // 16 bits wide: GCC 12.2 spills a mask that is widened as 16 bits and reads 32 back, of which half are anything.
    __mmask16 outside = sign > 0 ? _mm512_cmpgt_epi32_mask(q, _mm512_set1_epi32(edge)) : _mm512_cmplt_epi32_mask(q, _mm512_set1_epi32(edge));
    for (; outside; outside &= __mmask16(outside - 1)) {
      const int64_t g = first + __builtin_ctz(outside);
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
  return count;
}
#endif

// How a row is rounded: to integers of x * inverse in a window from `first` on.
struct Rounding {
  float step, inverse;  // step 0 for a row of zeros, NaN for one that is not finite
  int32_t first;
  bool halved;
};

// `most` and `least` [padded / 4] are scratch.
template <int W>
KMQ_PLAIN Rounding rounding_of(const float* x, int64_t cols, float* most, float* least) {
  const int64_t padded = int8_padded(cols), groups = padded / kInt8Group;
  float high, low;
  if (!extremes<W>(x, padded, most, least, high, low)) return {std::nanf(""), 0, 0, false};
  const float step = high / 255.0f - low / 255.0f;
  if (!(step >= 1e-36f)) return {0, 0, 0, false};  // of smaller ones the inverse might not be finite
  Rounding found{step, 1.0f / step, 0, false};
  found.first = round_of(low, found.inverse);
  const int32_t limit = int32_t(int8_most_added(cols));
  for (int i = 0; i < kInt8Halvings; ++i) {
    const float inverse = found.inverse * 2;
    const int32_t first = std::max(round_of(low, inverse), -128);
    if (cost_of<W>(most, least, groups, inverse, first) > limit) break;
    found = {found.step * 0.5f, inverse, first, true};
  }
  return found;
}

// Without halving, rounding may leave one step outside the window, which is cut off.
template <int W>
KMQ_PLAIN Int8Row quantize_words(const float* x, int64_t cols, float* scratch, int16_t* to) {
  const int64_t padded = int8_padded(cols);
  const Rounding found = rounding_of<W>(x, cols, scratch, scratch + padded / kInt8Group);
  if (found.inverse == 0) std::memset(to, 0, size_t(padded) * sizeof(int16_t));
  else round_words<W>(x, padded, found.inverse, found.halved ? -32768 : found.first, found.halved ? 32767 : found.first + 255, to);
  return {found.step, 0, 0, 0};
}

#ifdef KMQ_X86
KMQ_AVX2 Int8Row quantize_words_avx2(const float* x, int64_t cols, float* scratch, int16_t* to) {
  return quantize_words<kWidthAvx2>(x, cols, scratch, to);
}

KMQ_VNNI Int8Row quantize_bytes(const float* x, int64_t cols, float* scratch, uint8_t* to, Int8Added* list) {
  const int64_t padded = int8_padded(cols), groups = padded / kInt8Group;
  float *const most = scratch, *const least = scratch + groups;
  const Rounding found = rounding_of<kWidthAvx512>(x, cols, most, least);
  Int8Row row{found.step, found.first, 0, 0};
  if (found.inverse == 0) {
    std::memset(to, 0, size_t(padded));
    return row;
  }
  round_bytes(x, padded, found.inverse, found.first, to);
  // Beyond the last column a panel holds anything, and the byte 0 is not the number 0.
  for (int64_t c = cols; c < padded; ++c) to[(c / kBlock * 32 + c / kLanes % kParts * kLanes + c % kLanes) * kInt8Group + c % kBlock / 32] = 0;
  if (found.halved) {
    row.above = list_outside(x, most, groups, found.inverse, found.first + 255, 1, list);
    row.below = list_outside(x, least, groups, found.inverse, found.first, -1, list + row.above);
  }
  return row;
}
#endif

}  // namespace

template <typename T>
void int8_quantize(const T* input, int64_t ld, int64_t begin, int64_t end, const Int8Input& out) {
  const int64_t padded = int8_padded(out.cols);
  float* const scratch = workspace(padded + padded / 2);
  float* const row = scratch + padded / 2;
  std::fill(row, row + padded, 0.0f);
  for (int64_t m = begin; m < end; ++m) {
    const float* x = row;
    if constexpr (std::is_same_v<T, float>) {
      if (out.cols == padded) x = input + m * ld;
      else std::copy(input + m * ld, input + m * ld + out.cols, row);
    } else {
      for (int64_t c = 0; c < out.cols; ++c) row[c] = static_cast<float>(input[m * ld + c]);
    }
    uint8_t* const to = out.data + m * out.stride;
#ifdef KMQ_X86
    if (vnni()) {
      out.row[m] = quantize_bytes(x, out.cols, scratch, to, out.list(m));
      continue;
    }
    if (avx2()) {
      out.row[m] = quantize_words_avx2(x, out.cols, scratch, reinterpret_cast<int16_t*>(to));
      continue;
    }
#endif
    out.row[m] = quantize_words<kWidthScalar>(x, out.cols, scratch, reinterpret_cast<int16_t*>(to));
  }
}

template void int8_quantize<float>(const float*, int64_t, int64_t, int64_t, const Int8Input&);
template void int8_quantize<bf16>(const bf16*, int64_t, int64_t, int64_t, const Int8Input&);
template void int8_quantize<f16>(const f16*, int64_t, int64_t, int64_t, const Int8Input&);

}  // namespace kmq::cpu
