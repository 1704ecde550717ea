// The tile of the integer linear layer on AMX: the panels, the inputs and the sums are those of int8_vnni.h.
//
// A tile register has up to 16 rows of 64 bytes. TDPBUSD multiplies 16 input rows (unsigned bytes, 64 columns) with 16 rows of the
// weight (signed, 16 groups of 4 columns, a group a row of the register): 16,384 products. Instructions are written out, since the
// intrinsics of GCC 12 do not say that they read memory, and stores before them are lost.
#pragma once
#include "int8_vnni.h"

#ifdef KMQ_X86
namespace kmq::cpu {

constexpr int kTileRowsAmx = 32, kFewestRowsAmx = 9;  // up to 8 rows the tiles of VNNI were faster, from 12 on these

// Tiles 0 to 3 are sums, [input rows 0-15 or 16-31][panel rows 0-15 or 16-31]; 4 and 5 input rows; 6 and 7 the panel's. A thread
// has its tiles shaped while this lives; other code of the process may use them before and after.
class AmxTiles {
 public:
  AmxTiles() = default;
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
  ~AmxTiles() {
    if (rows_) asm volatile("tilerelease" ::: "memory");
  }

  // For `rows` input rows, 1 .. 32.
  void shape(int64_t rows) {
    if (rows == rows_) return;
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof config == 64);
    const auto set = [&](int tile, int64_t count) {
      config.row_bytes[tile] = count ? 64 : 0;
      config.rows[tile] = uint8_t(count);
    };
    const int64_t first = std::min<int64_t>(rows, 16), second = rows - first;
    for (int tile : {0, 1, 4}) set(tile, first);
    for (int tile : {2, 3, 5}) set(tile, second);
    for (int tile : {6, 7}) set(tile, 16);
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
    rows_ = rows;
  }

 private:
  int64_t rows_ = 0;
};

// sums [rows][32] of the input rows that the tiles are shaped for; groups in 16s.
inline void tile_amx(bool second, int64_t groups, const uint8_t* a, int64_t lda, const int8_t* panel, int32_t* sums) {
  constexpr int64_t step = 16 * 128;
  const uint8_t* const below = a + 16 * lda;
  asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1" ::: "memory");
  if (second) {
    asm volatile("tilezero %%tmm2\n\ttilezero %%tmm3" ::: "memory");
    for (int64_t g = 0; g < groups; g += 16, panel += step)
      asm volatile(
          "tileloadd (%[panel], %[ldp]), %%tmm6\n\t"
          "tileloadd (%[a], %[lda]), %%tmm4\n\t"
          "tdpbusd %%tmm6, %%tmm4, %%tmm0\n\t"
          "tileloadd 64(%[panel], %[ldp]), %%tmm7\n\t"
          "tdpbusd %%tmm7, %%tmm4, %%tmm1\n\t"
          "tileloadd (%[b], %[lda]), %%tmm5\n\t"
          "tdpbusd %%tmm6, %%tmm5, %%tmm2\n\t"
          "tdpbusd %%tmm7, %%tmm5, %%tmm3"
          ::[panel] "r"(panel), [a] "r"(a + 4 * g), [b] "r"(below + 4 * g), [lda] "r"(lda), [ldp] "r"(int64_t(128))
          : "memory");
    asm volatile("tilestored %%tmm2, (%0, %1)\n\ttilestored %%tmm3, 64(%0, %1)" ::"r"(sums + 16 * 32), "r"(int64_t(128)) : "memory");
  } else {
    for (int64_t g = 0; g < groups; g += 16, panel += step)
      asm volatile(
          "tileloadd (%[a], %[lda]), %%tmm4\n\t"
          "tileloadd (%[panel], %[ldp]), %%tmm6\n\t"
          "tdpbusd %%tmm6, %%tmm4, %%tmm0\n\t"
          "tileloadd 64(%[panel], %[ldp]), %%tmm7\n\t"
          "tdpbusd %%tmm7, %%tmm4, %%tmm1"
          ::[panel] "r"(panel), [a] "r"(a + 4 * g), [lda] "r"(lda), [ldp] "r"(int64_t(128))
          : "memory");
  }
  asm volatile("tilestored %%tmm0, (%0, %1)\n\ttilestored %%tmm1, 64(%0, %1)" ::"r"(sums), "r"(int64_t(128)) : "memory");
}

}  // namespace kmq::cpu
#endif
