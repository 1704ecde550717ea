// operator new for LD_PRELOAD: after arm(n), the n-th allocation that the extension _C asks for fails, on whatever thread.
#include <dlfcn.h>

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

std::atomic<long> to_failure{0};

bool from_extension(void* caller) {
  Dl_info info;
  return dladdr(caller, &info) && info.dli_fname && std::strstr(info.dli_fname, "kmq_kernels/_C");
}

void* allocate(std::size_t size, std::size_t alignment, void* caller) {
  if (to_failure > 0 && from_extension(caller) && --to_failure == 0) throw std::bad_alloc();
  void* out = alignment <= alignof(std::max_align_t) ? std::malloc(size ? size : 1) : std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  if (!out) throw std::bad_alloc();
  return out;
}

}  // namespace

extern "C" void arm(long n) { to_failure = n; }
extern "C" long left() { return to_failure; }

void* operator new(std::size_t size) { return allocate(size, 0, __builtin_return_address(0)); }
void* operator new[](std::size_t size) { return allocate(size, 0, __builtin_return_address(0)); }
void* operator new(std::size_t size, std::align_val_t a) { return allocate(size, std::size_t(a), __builtin_return_address(0)); }
void* operator new[](std::size_t size, std::align_val_t a) { return allocate(size, std::size_t(a), __builtin_return_address(0)); }
