#include <cstdlib>
#include <cstring>

#include "../kmq.h"

namespace kmq::cpu {

const char* path() {
#if defined(__x86_64__)
  static const bool avx2 = [] {
    const char* chosen = std::getenv("KMQ_CPU_PATH");  // "scalar" tests the other path on a machine that has both
    const bool scalar = chosen && std::strcmp(chosen, "scalar") == 0;
    return !scalar && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }();
  return avx2 ? "avx2" : "scalar";
#else
  return "scalar";
#endif
}

}  // namespace kmq::cpu
