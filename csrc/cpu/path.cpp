#include "../kmq.h"

namespace kmq::cpu {

const char* path() {
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return avx2 ? "avx2" : "scalar";
#else
  return "scalar";
#endif
}

}  // namespace kmq::cpu
