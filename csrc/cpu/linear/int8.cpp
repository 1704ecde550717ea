// Products of quantized inputs with packed weights, see int8.h.
//
// A task is a panel: 16 rows of the weight, decoded to integers in the cache, and then multiplied with all rows of the input, 4 at a
// time. The panel holds columns by fours (wide tables: by twos) and in each the 16 rows, so that a tile reads it as a stream and
// broadcasts 4 bytes of an input row:
//
//     panel    t(r, c) at [c / 4][r][c % 4], one byte each      wide: [c / 2][r][c % 2], two bytes each
//
// Decoding reads every packed row in its own order, through its own codebook, and turns 8 rows at a time.
#include "int8.h"

#include <cmath>

#include "../codes/decode.h"
#include "../encoder/activation.h"

namespace kmq::cpu {
namespace {

constexpr int64_t kGrainWork = 1 << 20;  // multiplications (a decoded weight counts as 4) that are worth a thread
constexpr int64_t kRowsPerTask = 512;    // of the input: a long one is also cut

// sums [rows][16] of `rows` input rows and a panel; A is uint8_t with int8_t entries, or int16_t with int16_t.
template <typename A, typename W>
void tile_scalar(int64_t rows, int64_t cols, const A* a, int64_t lda, const W* panel, int32_t* sums) {
  constexpr int64_t group = 4 / sizeof(A);
  std::fill(sums, sums + rows * kInt8Rows, 0);
  for (int64_t c = 0; c < cols; ++c)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t r = 0; r < kInt8Rows; ++r)
        sums[i * kInt8Rows + r] += int32_t(a[i * lda + c]) * int32_t(panel[c / group * kInt8Rows * group + r * group + c % group]);
}

template <typename W>
void decode_scalar(const LinearWeight& weight, int64_t row, int64_t rows, W* panel) {
  constexpr int64_t group = 4 / sizeof(W);
  const Packed& packed = weight.packed;
  uint8_t index[kBlock];
  for (int64_t r = 0; r < kInt8Rows; ++r) {
    const int64_t from = row + std::min(r, rows - 1);
    const int8_t* table = weight.table + ((from / weight.group_rows) << packed.bits);
    for (int64_t col = 0; col < packed.cols; col += kBlock) {
      decode_block(packed.data + from * packed.row_bytes() + col / kBlock * kLanes * packed.bits, packed.bits, index);
      W* to = panel + col * kInt8Rows + r * group;
      for (int64_t c = 0; c < kBlock; ++c) to[c / group * kInt8Rows * group + c % group] = table[index[c]];
    }
  }
}

#ifdef KMQ_X86

// One table of `bits` bits: up to 4 bits in a register; above, 16 entries a register, chosen by the upper bits of the index.
template <int bits>
struct Lookup {
  static constexpr int kTables = bits <= 4 ? 1 : 1 << (bits - 4);
  const int8_t* table;

  KMQ_AVX2_INLINE __m256i part(int t) const {
    if constexpr (bits >= 4) {
      return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * t)));
    } else if constexpr (bits == 3) {
      return _mm256_broadcastsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(table)));
    } else {
      int32_t entries = 0;
      std::memcpy(&entries, table, 1 << bits);
      return _mm256_set1_epi32(entries);
    }
  }

  // Entries at the indices; vpblendvb looks at the top bit of a byte, to which the shift brings bit `level` of the index.
  KMQ_AVX2_INLINE __m256i operator()(__m256i index) const {
    if constexpr (bits <= 4) {
      return _mm256_shuffle_epi8(part(0), index);
    } else {
      const __m256i low = _mm256_and_si256(index, _mm256_set1_epi8(15));
      const __m256i select[4] = {_mm256_slli_epi16(index, 3), _mm256_slli_epi16(index, 2), _mm256_slli_epi16(index, 1), index};
      return tree<kTables>(low, select, 0);
    }
  }

  template <int tables>
  KMQ_AVX2_INLINE __m256i tree(__m256i low, const __m256i select[4], int first) const {
    if constexpr (tables == 1) {
      return _mm256_shuffle_epi8(part(first), low);
    } else {
      constexpr int level = tables == 2 ? 0 : tables == 4 ? 1 : tables == 8 ? 2 : 3;
      const __m256i below = tree<tables / 2>(low, select, first), above = tree<tables / 2>(low, select, first + tables / 2);
      return _mm256_blendv_epi8(below, above, select[level]);
    }
  }
};

// Writes 8 rows of a half of a panel: from[r], 32 bytes of row r each, hold columns by fours in the order of index_vectors.
template <typename W>
KMQ_AVX2_INLINE void turn(const uint8_t (*from)[32], int half, int nibble, W* panel) {
#pragma GCC unroll 2
  for (int lane = 0; lane < 2; ++lane) {
    __m256i r[4], pair[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m128i low = _mm_load_si128(reinterpret_cast<const __m128i*>(from[i] + 16 * lane));
      const __m128i high = _mm_load_si128(reinterpret_cast<const __m128i*>(from[i + 4] + 16 * lane));
      r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
    pair[0] = _mm256_unpacklo_epi32(r[0], r[1]);
    pair[1] = _mm256_unpackhi_epi32(r[0], r[1]);
    pair[2] = _mm256_unpacklo_epi32(r[2], r[3]);
    pair[3] = _mm256_unpackhi_epi32(r[2], r[3]);
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) {
      const __m256i four = b % 2 ? _mm256_unpackhi_epi64(pair[b / 2], pair[b / 2 + 2]) : _mm256_unpacklo_epi64(pair[b / 2], pair[b / 2 + 2]);
      W* const to = panel + (8 * b + 4 * nibble + 2 * half + lane) * 4 * kInt8Rows;
      if constexpr (sizeof(W) == 1) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), four);
      } else {
        // The bytes go to the upper halves of words; the shift brings them down with their sign.
        const __m256i first = _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13));
        const __m256i second = _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, 2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15));
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_srai_epi16(_mm256_shuffle_epi8(four, first), 8));
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + 2 * kInt8Rows), _mm256_srai_epi16(_mm256_shuffle_epi8(four, second), 8));
      }
    }
  }
}

template <int bits, typename W>
KMQ_AVX2 void decode_avx2(const LinearWeight& weight, int64_t row, int64_t rows, W* panel) {
  const Packed& packed = weight.packed;
  const int64_t bytes = packed.row_bytes();
  alignas(32) uint8_t decoded[2][2][8][32];  // half, nibble, row
  for (int64_t col = 0; col < packed.cols; col += kBlock, panel += kBlock * kInt8Rows)
#pragma GCC unroll 1
    for (int64_t first = 0; first < kInt8Rows; first += 8) {
#pragma GCC unroll 1
      for (int64_t i = 0; i < 8; ++i) {
        const int64_t from = row + std::min(first + i, rows - 1);
        const uint8_t* block = packed.data + from * bytes + col / kBlock * (kLanes * bits);
        const Lookup<bits> look_up{weight.table + ((from / weight.group_rows) << bits)};
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          __m256i index[2];
          index_vectors<bits>(block, half, index);
#pragma GCC unroll 2
          for (int nibble = 0; nibble < 2; ++nibble)
            _mm256_store_si256(reinterpret_cast<__m256i*>(decoded[half][nibble][i]), look_up(index[nibble]));
        }
      }
#pragma GCC unroll 1
      for (int part = 0; part < 4; ++part) turn(decoded[part / 2][part % 2], part / 2, part % 2, panel + first * (4 / sizeof(W)));
    }
}

KMQ_AVX2_INLINE __m256i broadcast4(const void* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return _mm256_set1_epi32(four);
}

// R rows by 16: with 4 rows the 8 sums, the panel's 2 registers and what is multiplied stay in registers.
template <int R>
KMQ_AVX2 void tile_avx2(int64_t steps, const uint8_t* a, int64_t lda, const int8_t* panel, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sum[R][2];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
#pragma GCC unroll 1
  for (int64_t k = 0; k < steps; ++k, a += 4, panel += 64) {
    const __m256i right[2] = {_mm256_load_si256(reinterpret_cast<const __m256i*>(panel)),
                              _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + 32))};
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const __m256i left = broadcast4(a + i * lda);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) sum[i][v] = _mm256_add_epi32(sum[i][v], _mm256_madd_epi16(ones, _mm256_maddubs_epi16(left, right[v])));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) _mm256_store_si256(reinterpret_cast<__m256i*>(sums + 16 * i + 8 * v), sum[i][v]);
}

template <int R>
KMQ_AVX2 void tile_avx2(int64_t steps, const int16_t* a, int64_t lda, const int16_t* panel, int32_t* sums) {
  __m256i sum[R][2];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
#pragma GCC unroll 2
  for (int64_t k = 0; k < steps; ++k, a += 2, panel += 32) {
    const __m256i right[2] = {_mm256_load_si256(reinterpret_cast<const __m256i*>(panel)),
                              _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + 16))};
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const __m256i left = broadcast4(a + i * lda);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) sum[i][v] = _mm256_add_epi32(sum[i][v], _mm256_madd_epi16(left, right[v]));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) _mm256_store_si256(reinterpret_cast<__m256i*>(sums + 16 * i + 8 * v), sum[i][v]);
}

#endif  // KMQ_X86

template <typename W>
void decode(const LinearWeight& weight, int64_t row, int64_t rows, W* panel) {
#ifdef KMQ_X86
  if (avx2()) return with_small(weight.packed.bits, [&](auto bits) { decode_avx2<bits(), W>(weight, row, rows, panel); });
#endif
  decode_scalar<W>(weight, row, rows, panel);
}

// Input rows are zero from the last column to a multiple of four, so that a tile may take whole steps.
template <typename A, typename W>
void tile(int64_t rows, int64_t cols, const A* a, int64_t lda, const W* panel, int32_t* sums) {
#ifdef KMQ_X86
  if (avx2()) {
    const int64_t steps = ceil_div(cols * sizeof(A), 4);
    if (rows == 4) tile_avx2<4>(steps, a, lda, panel, sums);
    else if (rows == 3) tile_avx2<3>(steps, a, lda, panel, sums);
    else if (rows == 2) tile_avx2<2>(steps, a, lda, panel, sums);
    else tile_avx2<1>(steps, a, lda, panel, sums);
    return;
  }
#endif
  tile_scalar<A, W>(rows, cols, a, lda, panel, sums);
}

// What a panel's sums become: one of these for the rows of the weight in a panel.
struct Epilogue {
  alignas(64) float factor[kInt8Rows], bias[kInt8Rows];
  alignas(64) int32_t offset[kInt8Rows];
  alignas(64) float added[4][kInt8Rows];  // by outliers
  bool outliers;

  Epilogue(const LinearWeight& weight, int64_t row, int64_t rows, bool wide) {
    for (int64_t r = 0; r < kInt8Rows; ++r) {
      factor[r] = r < rows ? weight.factor[row + r] : 0.0f;
      bias[r] = r < rows && weight.bias ? weight.bias[row + r] : 0.0f;
      offset[r] = r < rows && !wide ? weight.offset[row + r] : 0;
    }
    std::fill(added[0], added[0] + 4 * kInt8Rows, 0.0f);
    outliers = false;
  }

  KMQ_PLAIN void plain(const int32_t* sums, const float* scale, int64_t rows, float* out) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t r = 0; r < kInt8Rows; ++r)
        out[i * kInt8Rows + r] = float(sums[i * kInt8Rows + r] - offset[r]) * scale[i] * factor[r] + added[i][r] + bias[r];
  }

#ifdef KMQ_X86
  KMQ_AVX2 void vector(const int32_t* sums, const float* scale, int64_t rows, float* out) const { plain(sums, scale, rows, out); }
#endif

  void operator()(const int32_t* sums, const float* scale, int64_t rows, float* out) const {
#ifdef KMQ_X86
    if (avx2()) return vector(sums, scale, rows, out);
#endif
    plain(sums, scale, rows, out);
  }
};

#ifdef KMQ_X86
template <typename T>
KMQ_AVX2 void store_avx2(const float* from, T* to) {
  store8(to, _mm256_load_ps(from));
  store8(to + 8, _mm256_load_ps(from + 8));
}
#endif

template <typename T>
void store(const float* from, int64_t count, T* to) {
#ifdef KMQ_X86
  if (avx2() && count == kInt8Rows) return store_avx2(from, to);
#endif
  for (int64_t r = 0; r < count; ++r) narrow(from[r], to[r]);
}

// The outliers of 16 rows of a weight from `row` on, times rows of the input; in the order of their positions.
template <typename V>
void add_outliers(const LinearWeight& weight, int64_t row, int64_t rows, const V* values, int64_t count, float (*added)[kInt8Rows]) {
  const int64_t cols = weight.packed.cols;
  const int32_t *begin = weight.outlier_index, *end = begin + weight.outliers;
  const int32_t* at = std::lower_bound(begin, end, row * cols, [](int32_t a, int64_t b) { return a < b; });
  std::fill(added[0], added[0] + 4 * kInt8Rows, 0.0f);
  for (; at != end && *at < (row + rows) * cols; ++at) {
    const int64_t r = *at / cols - row, c = *at % cols;
    for (int64_t i = 0; i < count; ++i) added[i][r] += static_cast<float>(values[i * cols + c]) * weight.outlier_delta[at - begin];
  }
}

// Rows begin .. end of the input with one panel.
template <typename A, typename W, typename V, typename T>
void multiply_panel(const Int8Input& input, const V* values, const Int8Product<T>& product, int64_t row, int64_t begin, int64_t end,
                    const W* panel) {
  const LinearWeight& weight = *product.weight;
  const int64_t rows = std::min<int64_t>(kInt8Rows, weight.packed.rows - row), stride = int8_stride(input.cols, input.wide);
  Epilogue epilogue(weight, row, rows, input.wide);
  alignas(64) int32_t sums[4 * kInt8Rows];
  alignas(64) float out[4 * kInt8Rows];
  for (int64_t m = begin; m < end; m += 4) {
    const int64_t here = std::min<int64_t>(4, end - m);
    tile<A, W>(here, input.cols, reinterpret_cast<const A*>(input.data + m * stride), stride / int64_t(sizeof(A)), panel, sums);
    if (weight.outliers) add_outliers(weight, row, rows, values + m * input.cols, here, epilogue.added);
    epilogue(sums, input.scale + m, here, out);
    activate(product.activation, out, here * kInt8Rows);
    for (int64_t i = 0; i < here; ++i) store(out + i * kInt8Rows, rows, product.out + (m + i) * product.ld + row);
  }
}

template <typename A, typename W, typename V, typename T>
void multiply(const Int8Input& input, const V* values, const std::vector<Int8Product<T>>& products, const Parallel& parallel) {
  const int64_t parts = ceil_div(input.rows, kRowsPerTask), depth = round_up(std::max<int64_t>(input.cols, 1), kBlock);
  std::vector<int64_t> first{0};  // task of each product
  for (const auto& product : products) first.push_back(first.back() + ceil_div(product.weight->packed.rows, kInt8Rows) * parts);
  const int64_t work = kInt8Rows * (input.cols + 1) * (std::min(input.rows, kRowsPerTask) + 4);
  parallel(first.back(), ceil_div(kGrainWork, work), [&](int64_t begin, int64_t end) {
    W* const panel = reinterpret_cast<W*>(workspace(depth * kInt8Rows * sizeof(W) / sizeof(float)));
    size_t p = 0;
    int64_t decoded = -1;
    for (int64_t task = begin; task < end; ++task) {
      while (task >= first[p + 1]) ++p;
      const int64_t row = (task - first[p]) / parts * kInt8Rows, part = (task - first[p]) % parts;
      const LinearWeight& weight = *products[p].weight;
      if (part == 0 || decoded != task - 1) decode<W>(weight, row, std::min<int64_t>(kInt8Rows, weight.packed.rows - row), panel);
      decoded = task;
      multiply_panel<A, W>(input, values, products[p], row, part * kRowsPerTask, std::min(input.rows, (part + 1) * kRowsPerTask), panel);
    }
  });
}

// The largest magnitude as the bits of a float: NaN counts as more than Inf.
template <typename T>
KMQ_PLAIN uint32_t largest_plain(const T* x, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, bits_of(static_cast<float>(x[i])) & 0x7fffffff);
  return most;
}

template <typename T>
KMQ_PLAIN void round_plain(const T* x, int64_t count, float inverse, bool wide, uint8_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    // As the vector form does: adding 1.5 * 2^23 rounds to the nearest integer, even on a tie, in the low bits.
    const int32_t q = int32_t(bits_of(static_cast<float>(x[i]) * inverse + 12582912.0f)) - 0x4b400000;
    if (wide) reinterpret_cast<int16_t*>(to)[i] = int16_t(q);
    else to[i] = uint8_t(q + 128);
  }
}

#ifdef KMQ_X86

template <typename T>
KMQ_AVX2 uint32_t largest_avx2(const T* x, int64_t count) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i most[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) most[v] = _mm256_max_epi32(most[v], _mm256_and_si256(_mm256_castps_si256(load8(x + i + 8 * v)), magnitude));
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_max_epi32(most[0], most[1]));
  uint32_t result = largest_plain(x + i, count - i);
  for (const uint32_t lane : lanes) result = std::max(result, lane);
  return result;
}

template <typename T>
KMQ_AVX2 void round_avx2(const T* x, int64_t count, float inverse, bool wide, uint8_t* to) {
  const __m256 factor = _mm256_set1_ps(inverse);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(load8(x + i), factor));
    const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(load8(x + i + 8), factor));
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    if (wide) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * i), words);
    } else {
      const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm_xor_si128(bytes, _mm_set1_epi8(-128)));
    }
  }
  round_plain(x + i, count - i, inverse, wide, to + i * (wide ? 2 : 1));
}

#endif

}  // namespace

int int8_limit(int bits) { return int8_wide(bits) ? 127 : 63; }

template <typename T>
void int8_quantize(const T* input, int64_t ld, int64_t begin, int64_t end, const Int8Input& out) {
  const int64_t stride = int8_stride(out.cols, out.wide), size = out.wide ? 2 : 1;
  for (int64_t m = begin; m < end; ++m) {
    const T* const x = input + m * ld;
    uint8_t* const to = out.data + m * stride;
    std::memset(to + out.cols * size, 0, stride - out.cols * size);
    uint32_t most;
#ifdef KMQ_X86
    if (avx2()) most = largest_avx2(x, out.cols);
    else
#endif
      most = largest_plain(x, out.cols);
    const float largest = float_of(most);
    // 127 / largest must be finite: smaller numbers are zeros.
    const bool finite = most < 0x7f800000, zero = !(largest >= 1e-36f);
    out.scale[m] = finite ? zero ? 0.0f : largest / 127.0f : std::nanf("");
    if (!finite || zero) {
      if (out.wide) std::memset(to, 0, out.cols * size);
      else std::memset(to, 128, out.cols);
      continue;
    }
    const float inverse = 127.0f / largest;
#ifdef KMQ_X86
    if (avx2()) {
      round_avx2(x, out.cols, inverse, out.wide, to);
      continue;
    }
#endif
    round_plain(x, out.cols, inverse, out.wide, to);
  }
}

template <typename V, typename T>
void int8_multiply(const Int8Input& input, const V* values, const std::vector<Int8Product<T>>& products, const Parallel& parallel) {
  if (input.rows == 0) return;
  if (input.wide) multiply<int16_t, int16_t>(input, values, products, parallel);
  else multiply<uint8_t, int8_t>(input, values, products, parallel);
}

template void int8_quantize<float>(const float*, int64_t, int64_t, int64_t, const Int8Input&);
template void int8_multiply<float, float>(const Int8Input&, const float*, const std::vector<Int8Product<float>>&, const Parallel&);

namespace {

template <typename T>
void linear(const T* input, int64_t M, const LinearWeight& weight, Activation activation, T* output, const Parallel& parallel) {
  const int64_t cols = weight.packed.cols;
  const bool wide = int8_wide(weight.packed.bits);
  const int64_t stride = int8_stride(cols, wide);
  const Scratch owned = scratch(ceil_div(M * stride, 4) + M);
  const Int8Input quantized{reinterpret_cast<uint8_t*>(owned.get() + M), owned.get(), M, cols, wide};
  parallel(M, ceil_div(kGrainWork, 16 * (cols + 1)), [&](int64_t begin, int64_t end) { int8_quantize(input, cols, begin, end, quantized); });
  int8_multiply<T, T>(quantized, input, {{&weight, output, weight.packed.rows, activation}}, parallel);
}

}  // namespace

void int8_linear(const void* input, Dtype dtype, int64_t M, const LinearWeight& weight, Activation activation, void* output,
                 const Parallel& parallel) {
  if (M == 0 || weight.packed.rows == 0) return;
  if (dtype == Dtype::f32) return linear(static_cast<const float*>(input), M, weight, activation, static_cast<float*>(output), parallel);
  if (dtype == Dtype::bf16) return linear(static_cast<const bf16*>(input), M, weight, activation, static_cast<bf16*>(output), parallel);
  linear(static_cast<const f16*>(input), M, weight, activation, static_cast<f16*>(output), parallel);
}

}  // namespace kmq::cpu
