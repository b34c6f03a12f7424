#include <ATen/Version.h>

#include "kernels.h"
#include "launch_cpu.h"
#include "tasks.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <string>

namespace oe_ext::cpu {
namespace {

struct Choice {
  const char* name;
  const Kernels* kernels;
};

// Chooses like torch: the widest instruction set of the processor, unless ATEN_CPU_CAPABILITY names
// a lower one. A name that is not known here means more than AVX2.
Choice choose_kernels() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  // clang before 15 does not know the name of F16C.
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  const bool has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c;
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && capability != "AVX2" && capability != "DEFAULT") {
    return {"AVX512", &kKernelsAvx512};
  }
  if (has_avx2 && capability != "DEFAULT") {
    return {"AVX2", &kKernelsAvx2};
  }
#endif
  return {"DEFAULT", &kKernelsDefault};
}

const Choice& chosen() {
  static const Choice choice = choose_kernels();
  return choice;
}

}  // namespace

const Kernels& chosen_kernels() { return *chosen().kernels; }

const char* capability() { return chosen().name; }

}  // namespace oe_ext::cpu
