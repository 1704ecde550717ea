#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../kmq.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace kmq::cpu {
namespace {

enum class Path { scalar, avx2, avxvnni, avx512, amx };

#if defined(__x86_64__)
bool have_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

bool have_avx512() {
  return have_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2");
}

bool have_vnni() { return have_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi"); }

// Features that older compilers have no names for: leaf 7 of cpuid.
bool have_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return have_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}

// Whether the processor has tiles of integers, and the kernel lets this process use them: it keeps room for them only when asked.
bool have_amx() {
#if defined(__linux__)
  constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  return have_vnni() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & tile) && (d & int8) &&
         syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

bool have(Path path) {
  switch (path) {
    case Path::amx: return have_amx();
    case Path::avx512: return have_avx512();
    case Path::avxvnni: return have_avxvnni();
    case Path::avx2: return have_avx2();
    default: return true;
  }
}
#else
bool have_vnni() { return false; }
bool have(Path path) { return path == Path::scalar; }
#endif

constexpr std::pair<const char*, Path> kPaths[] = {  // the fastest first
    {"amx", Path::amx}, {"avx512", Path::avx512}, {"avxvnni", Path::avxvnni}, {"avx2", Path::avx2}, {"scalar", Path::scalar}};

// KMQ_CPU_PATH selects the path of lesser processors, for tests.
Path choose() {
  const char* asked = std::getenv("KMQ_CPU_PATH");
  for (const auto& [name, path] : kPaths) {
    if (!asked || !*asked) {
      if (have(path)) return path;
    } else if (std::string(asked) == name) {
      if (have(path)) return path;
      throw std::runtime_error(std::string("KMQ_CPU_PATH=") + asked + ": this processor does not have it");
    }
  }
  throw std::runtime_error(std::string("KMQ_CPU_PATH: expected scalar, avx2, avxvnni, avx512 or amx, got ") + asked);
}

Path chosen() {
  static const Path path = choose();
  return path;
}

}  // namespace

bool avx2() { return chosen() >= Path::avx2; }
bool avxvnni() { return chosen() == Path::avxvnni; }
bool avx512() { return chosen() >= Path::avx512; }
bool amx() { return chosen() == Path::amx; }
bool vnni() {
  static const bool yes = avx512() && have_vnni();
  return yes;
}
const char* path() {
  for (const auto& [name, path] : kPaths)
    if (path == chosen()) return name;
  return "";
}

}  // namespace kmq::cpu
