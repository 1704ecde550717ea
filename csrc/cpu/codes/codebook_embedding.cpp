#include "decode.h"

namespace kmq::cpu {

void codebook_embedding(const int64_t* ids, int64_t count, const Packed& packed, const void* codebook, Dtype dtype,
                        int64_t group_rows, void* out, const Parallel& parallel) {
  const int64_t grain = 1 + 65536 / (packed.cols + 1);
  parallel(count, grain, [&](int64_t begin, int64_t end) {
    const auto run = [&](auto type) {
      using T = decltype(type);
      const Region region{ids, begin, end - begin, 0, packed.cols, packed.cols};
      decode_rows(packed, static_cast<const T*>(codebook), group_rows, region, static_cast<T*>(out) + begin * packed.cols);
    };
    if (dtype == Dtype::f64) run(double{});
    else if (dtype == Dtype::f32) run(float{});
    else run(uint16_t{});
  });
}

}  // namespace kmq::cpu
