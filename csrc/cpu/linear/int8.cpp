// Products of quantized inputs with packed weights, see int8.h.
//
// A task is a panel: rows of the weight, decoded to integers in the cache, and then multiplied with all rows of the input, a tile of
// them at a time. Here are the panels of AVX2 and the scalar path, 16 rows with columns by twos; int8_vnni.h has the others.
//
//     panel    t(r, c) at [c / 2][r][c % 2], two bytes each
//
// Decoding reads every packed row in its own order, through its own codebook, and turns 8 rows at a time.
#include "int8.h"

#include <cmath>

#include "../codes/decode.h"
#include "../encoder/activation.h"
#include "int8_amx.h"

namespace kmq::cpu {
namespace {

constexpr int64_t kGrainWork = 1 << 20;  // multiplications (a decoded weight counts as 4) that are worth a thread
constexpr int64_t kRowsPerTask = 768;    // of the input: a long one is also cut
constexpr int64_t kInputBytes = 1 << 20, kPanelBytes = 1 << 19;  // what stays in the cache of a core: an input; panels beside a part of it
constexpr int64_t kMostPanels = 8, kFewestTasks = 12;

// sums [rows][16] of `rows` input rows and a panel.
void tile_scalar(int64_t rows, int64_t cols, const int16_t* a, int64_t lda, const int16_t* panel, int32_t* sums) {
  std::fill(sums, sums + rows * kInt8Rows, 0);
  for (int64_t c = 0; c < cols; ++c)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t r = 0; r < kInt8Rows; ++r)
        sums[i * kInt8Rows + r] += int32_t(a[i * lda + c]) * int32_t(panel[c / 2 * kInt8Rows * 2 + r * 2 + c % 2]);
}

void decode_scalar(const LinearWeight& weight, int64_t row, int64_t rows, int16_t* panel) {
  const Packed& packed = weight.packed;
  uint8_t index[kBlock];
  for (int64_t r = 0; r < kInt8Rows; ++r) {
    const int64_t from = row + std::min(r, rows - 1);
    const int8_t* table = weight.table + ((from / weight.group_rows) << packed.bits);
    for (int64_t col = 0; col < packed.cols; col += kBlock) {
      decode_block(packed.data + from * packed.row_bytes() + col / kBlock * kLanes * packed.bits, packed.bits, index);
      int16_t* to = panel + col * kInt8Rows + r * 2;
      for (int64_t c = 0; c < kBlock; ++c) to[c / 2 * kInt8Rows * 2 + c % 2] = table[index[c]];
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
KMQ_AVX2_INLINE void turn(const uint8_t (*from)[32], int half, int nibble, int16_t* panel) {
  // The bytes go to the upper halves of words; a shift brings them down with their sign.
  const __m256i first = _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13));
  const __m256i second = _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, 2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15));
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
      int16_t* const to = panel + (8 * b + 4 * nibble + 2 * half + lane) * 4 * kInt8Rows;
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_srai_epi16(_mm256_shuffle_epi8(four, first), 8));
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + 2 * kInt8Rows), _mm256_srai_epi16(_mm256_shuffle_epi8(four, second), 8));
    }
  }
}

template <int bits>
KMQ_AVX2 void decode_avx2(const LinearWeight& weight, int64_t row, int64_t rows, int16_t* panel) {
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
      for (int part = 0; part < 4; ++part) turn(decoded[part / 2][part % 2], part / 2, part % 2, panel + first * 2);
    }
}

// sum + the products of words, by pairs.
struct MultiplyAdd {
  KMQ_AVX2_INLINE static __m256i of(__m256i sum, __m256i left, __m256i right) { return _mm256_add_epi32(sum, _mm256_madd_epi16(left, right)); }
};

// In one instruction, written out: older compilers have no name for it.
struct MultiplyAddVnni {
  KMQ_AVX2_INLINE static __m256i of(__m256i sum, __m256i left, __m256i right) {
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(left), "x"(right));
    return sum;
  }
};

// R rows by 16: the sums (8 of 4 rows, 12 of 6), the panel's 2 registers and what is multiplied stay in registers. Where a product is one
// instruction it waits for the one before: few rows are summed in `chains` parts.
template <int R, typename Product>
KMQ_AVX2 void tile_avx2(int64_t steps, const int16_t* a, int64_t lda, const int16_t* panel, int32_t* sums) {
  constexpr int chains = R == 1 ? 4 : R <= 3 ? 2 : 1;
  __m256i sum[chains][R][2];
#pragma GCC unroll 4
  for (int s = 0; s < chains; ++s)
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) sum[s][i][0] = sum[s][i][1] = _mm256_setzero_si256();
#pragma GCC unroll 1
  for (int64_t k = 0; k < steps; k += chains)
#pragma GCC unroll 4
    for (int s = 0; s < chains; ++s, a += 2, panel += 32) {
      const __m256i right[2] = {_mm256_load_si256(reinterpret_cast<const __m256i*>(panel)),
                                _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + 16))};
#pragma GCC unroll 6
      for (int i = 0; i < R; ++i) {
        int32_t two;
        std::memcpy(&two, a + i * lda, 4);
        const __m256i left = _mm256_set1_epi32(two);
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) sum[s][i][v] = Product::of(sum[s][i][v], left, right[v]);
      }
    }
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      __m256i total = sum[0][i][v];
#pragma GCC unroll 4
      for (int s = 1; s < chains; ++s) total = _mm256_add_epi32(total, sum[s][i][v]);
      _mm256_store_si256(reinterpret_cast<__m256i*>(sums + 16 * i + 8 * v), total);
    }
}

// At most 6 rows. `steps` of 2 columns, a multiple of 4.
template <typename Product>
void tile_avx2(int64_t rows, int64_t steps, const int16_t* a, int64_t lda, const int16_t* panel, int32_t* sums) {
  switch (rows) {
    case 1: return tile_avx2<1, Product>(steps, a, lda, panel, sums);
    case 2: return tile_avx2<2, Product>(steps, a, lda, panel, sums);
    case 3: return tile_avx2<3, Product>(steps, a, lda, panel, sums);
    case 4: return tile_avx2<4, Product>(steps, a, lda, panel, sums);
    case 5: return tile_avx2<5, Product>(steps, a, lda, panel, sums);
    default: return tile_avx2<6, Product>(steps, a, lda, panel, sums);
  }
}

#endif  // KMQ_X86

// What a path has: the numbers of its panels, decoding, a tile of at most kTile rows, and how its sums become outputs. State is
// what a thread holds while it multiplies.
struct Words {
  using Entry = int16_t;
  struct State {};
  static constexpr int kRows = kInt8Rows, kTile = 6;

  static void decode(const LinearWeight& weight, int64_t row, int64_t rows, int16_t* panel) {
#ifdef KMQ_X86
    if (avx2()) return with_small(weight.packed.bits, [&](auto bits) { decode_avx2<bits()>(weight, row, rows, panel); });
#endif
    decode_scalar(weight, row, rows, panel);
  }

  static void tile(State&, const Int8Input& input, int64_t m, int64_t rows, const int16_t* panel, int32_t* sums) {
    const int16_t* const a = reinterpret_cast<const int16_t*>(input.data + m * input.stride);
    const int64_t lda = input.stride / 2;
#ifdef KMQ_X86
    const int64_t steps = int8_padded(input.cols) / 2;
    if (avxvnni()) return tile_avx2<MultiplyAddVnni>(rows, steps, a, lda, panel, sums);
    if (avx2()) return tile_avx2<MultiplyAdd>(rows, steps, a, lda, panel, sums);
#endif
    tile_scalar(rows, input.cols, a, lda, panel, sums);
  }

  struct Rows {
    alignas(64) float factor[kRows], bias[kRows];
    int32_t row_sum[kRows];
  };

  KMQ_PLAIN static void finish_plain(const Int8Input& input, int64_t m, int64_t rows, const Rows& of, const float* added, const int32_t* sums,
                                     float* out) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t r = 0; r < kRows; ++r) {
        float y = float(sums[i * kRows + r]) * input.row[m + i].scale * of.factor[r];
        if (added) y += added[i * kRows + r];
        out[i * kRows + r] = y + of.bias[r];
      }
  }

#ifdef KMQ_X86
  KMQ_AVX2 static void finish_avx2(const Int8Input& input, int64_t m, int64_t rows, const Rows& of, const float* added, const int32_t* sums,
                                   float* out) {
    finish_plain(input, m, rows, of, added, sums, out);
  }

  template <typename T>
  KMQ_AVX2 static void store_avx2(const float* from, T* to) {
    store8(to, _mm256_load_ps(from));
    store8(to + 8, _mm256_load_ps(from + 8));
  }
#endif

  template <typename T>
  static void finish(Activation activation, const Int8Input& input, int64_t m, int64_t rows, int64_t count, const int16_t*, const Rows& of,
                     const float* added, const int32_t* sums, T* to, int64_t ld) {
    alignas(64) float out[kTile * kRows];
#ifdef KMQ_X86
    if (avx2()) finish_avx2(input, m, rows, of, added, sums, out);
    else
#endif
      finish_plain(input, m, rows, of, added, sums, out);
    activate(activation, out, rows * kRows);
    for (int64_t i = 0; i < rows; ++i, to += ld) {
#ifdef KMQ_X86
      if (avx2() && count == kRows) {
        store_avx2(out + i * kRows, to);
        continue;
      }
#endif
      for (int64_t r = 0; r < count; ++r) narrow(out[i * kRows + r], to[r]);
    }
  }
};

#ifdef KMQ_X86
struct Bytes {
  using Entry = int8_t;
  struct State {};
  static constexpr int kRows = kInt8RowsVnni, kTile = kTileRowsVnni;

  static void decode(const LinearWeight& weight, int64_t row, int64_t rows, int8_t* panel) {
    with_small(weight.packed.bits, [&](auto bits) { decode_vnni<bits()>(weight, row, rows, panel); });
  }

  static void tile(State&, const Int8Input& input, int64_t m, int64_t rows, const int8_t* panel, int32_t* sums) {
    tile_vnni(rows, int8_padded(input.cols) / kInt8Group, input.data + m * input.stride, input.stride, panel, sums);
  }

  using Rows = PanelRows;

  template <typename T>
  static void finish(Activation activation, const Int8Input& input, int64_t m, int64_t rows, int64_t count, const int8_t* panel, const Rows& of,
                     const float* added, const int32_t* sums, T* to, int64_t ld) {
    finish_vnni(activation, input, m, rows, count, panel, of, added, sums, to, ld);
  }
};

struct Tiles : Bytes {
  using State = AmxTiles;
  static constexpr int kTile = kTileRowsAmx;

  static void tile(State& tiles, const Int8Input& input, int64_t m, int64_t rows, const int8_t* panel, int32_t* sums) {
    const int64_t groups = int8_padded(input.cols) / kInt8Group;
    const uint8_t* const a = input.data + m * input.stride;
    if (rows < kFewestRowsAmx) return tile_vnni(rows, groups, a, input.stride, panel, sums);
    tiles.shape(rows);
    tile_amx(rows > 16, groups, a, input.stride, panel, sums);
  }
};
#endif

// Bytes that are needed soon.
struct Ahead {
  const uint8_t* data = nullptr;
  int64_t bytes = 0;

  // Asks the cache for part `i` of `parts`.
  void fetch(int64_t i, int64_t parts) const {
    for (int64_t at = bytes * i / parts, end = bytes * (i + 1) / parts; at < end; at += 64) __builtin_prefetch(data + at, 0, 2);
  }
};

// A thread's share of a product: panels of the weight side by side, from its row `row` on, and rows begin .. end of the input.
template <typename Path>
struct Share {
  const LinearWeight* weight;
  int64_t row, panels, begin, end;

  int64_t rows(int64_t panel) const { return std::min<int64_t>(Path::kRows, weight->packed.rows - row - panel * Path::kRows); }
};

// A share with its panels, each `size` long, decoded. Meanwhile what comes next is brought into the cache.
template <typename Path, typename V, typename T>
void multiply_share(const Int8Input& input, const V* values, const Int8Product<T>& product, const Share<Path>& share,
                    const typename Path::Entry* panels, int64_t size, const Ahead& ahead, typename Path::State& state) {
  constexpr int W = Path::kRows;
  const auto& [weight, row, count, begin, end] = share;
  if (begin >= end) return;
  typename Path::Rows of[kMostPanels];
  for (int64_t p = 0; p < count; ++p) {
    of[p] = {};
    for (int64_t r = 0, rows = share.rows(p), from = row + p * W; r < rows; ++r) {
      of[p].factor[r] = weight->factor[from + r];
      of[p].bias[r] = weight->bias ? weight->bias[from + r] : 0.0f;
      of[p].row_sum[r] = weight->row_sum[from + r];
    }
  }
  alignas(64) float added[Path::kTile][W];
  alignas(64) int32_t sums[Path::kTile][W];
  const int64_t tiles = ceil_div(end - begin, int64_t(Path::kTile)), most = ceil_div(end - begin, tiles);  // nearly equal ones
  for (int64_t m = begin, here; m < end; m += here) {
    here = std::min(most, end - m);
    ahead.fetch((m - begin) / most, tiles);
    for (int64_t p = 0; p < count; ++p) {
      const auto* const panel = panels + p * size;
      const int64_t from = row + p * W, rows = share.rows(p);
      Path::tile(state, input, m, here, panel, sums[0]);
      if (weight->outliers) int8_outliers<W>(*weight, from, rows, values + m * input.cols, here, added);
      Path::finish(product.activation, input, m, here, rows, panel, of[p], weight->outliers ? added[0] : nullptr, sums[0],
                   product.out + m * product.ld + from, product.ld);
    }
  }
}

// Panels side by side in a task. An input that does not stay in the cache of a core is read again for each task, so it is worth to have
// several; but not so many that few threads find a task.
int64_t panels_of(int64_t panel_bytes, int64_t input_bytes, int64_t panels, int64_t parts) {
  if (input_bytes < kInputBytes) return 1;
  int64_t side_by_side = std::clamp<int64_t>(kPanelBytes / panel_bytes, 1, kMostPanels);
  while (side_by_side > 1 && ceil_div(panels, side_by_side) * parts < kFewestTasks) --side_by_side;
  return side_by_side;
}

template <typename Path, typename V, typename T>
void multiply(const Int8Input& input, const V* values, const std::vector<Int8Product<T>>& products, const Parallel& parallel) {
  using Entry = typename Path::Entry;
  const int64_t parts = ceil_div(input.rows, kRowsPerTask), per_part = ceil_div(input.rows, parts);
  const int64_t size = int8_padded(input.cols) * Path::kRows, bytes = size * int64_t(sizeof(Entry));
  int64_t panels = 0;
  for (const auto& product : products) panels += ceil_div(product.weight->packed.rows, int64_t(Path::kRows));
  const int64_t most = panels_of(bytes, input.rows * input.stride, panels, parts), rows = most * Path::kRows;
  std::vector<int64_t> first{0};  // task of each product
  for (const auto& product : products) first.push_back(first.back() + ceil_div(product.weight->packed.rows, rows) * parts);
  const int64_t work = rows * (input.cols + 1) * (per_part + 4);
  parallel(first.back(), ceil_div(kGrainWork, work), [&](int64_t begin, int64_t end) {
    Entry* const decoded = reinterpret_cast<Entry*>(workspace(most * bytes / sizeof(float)));
    typename Path::State state;
    size_t p = 0;
    int64_t last = -1;  // the task whose panels are decoded
    for (int64_t task = begin; task < end; ++task) {
      while (task >= first[p + 1]) ++p;
      const int64_t part = (task - first[p]) % parts;
      Share<Path> share{products[p].weight, (task - first[p]) / parts * rows, 0, part * per_part, std::min(input.rows, (part + 1) * per_part)};
      const Packed& packed = share.weight->packed;
      share.panels = std::min(most, ceil_div(packed.rows - share.row, int64_t(Path::kRows)));
      for (int64_t i = 0; i < share.panels && (part == 0 || last != task - 1); ++i)
        Path::decode(*share.weight, share.row + i * Path::kRows, share.rows(i), decoded + i * size);
      last = task;
      Ahead ahead;
      if (part + 1 == parts && task + 1 < end) {
        const bool same = task + 1 < first[p + 1];
        const Packed& next = same ? packed : products[p + 1].weight->packed;
        const int64_t from = same ? share.row + rows : 0;
        ahead = {next.data + from * next.row_bytes(), std::min(rows, next.rows - from) * next.row_bytes()};
      }
      multiply_share<Path>(input, values, products[p], share, decoded, size, ahead, state);
    }
  });
}

}  // namespace

template <typename V, typename T>
void int8_multiply(const Int8Input& input, const V* values, const std::vector<Int8Product<T>>& products, const Parallel& parallel) {
  if (input.rows == 0) return;
#ifdef KMQ_X86
  if (amx()) return multiply<Tiles>(input, values, products, parallel);
  if (vnni()) return multiply<Bytes>(input, values, products, parallel);
#endif
  multiply<Words>(input, values, products, parallel);
}

template void int8_multiply<float, float>(const Int8Input&, const float*, const std::vector<Int8Product<float>>&, const Parallel&);

namespace {

template <typename T>
void linear(const T* input, int64_t M, const LinearWeight& weight, Activation activation, T* output, const Parallel& parallel) {
  const int64_t cols = weight.packed.cols, rows = round_up(M * kInt8RowFloats, 16);
  const Scratch owned = scratch(ceil_div(M * int8_stride(cols), 4) + rows);
  const Int8Input quantized{reinterpret_cast<uint8_t*>(owned.get() + rows), reinterpret_cast<Int8Row*>(owned.get()), M, cols};
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
