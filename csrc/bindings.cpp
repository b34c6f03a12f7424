// oe_ext._C (the JIT build gives it another name). Importing it registers the operators; its
// functions tell how it was built.
#include <pybind11/pybind11.h>

#include "build_info.h"
#include "cpu/launch_cpu.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Operators of oe_ext (registered with torch on import) and how they were built";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["torch"] = oe_ext::kBuiltWithTorch;
        info["compiler"] = oe_ext::kCompiler;
        info["cuda"] = oe_ext::kCudaVersion > 0
                           ? pybind11::object(pybind11::int_(oe_ext::kCudaVersion))
                           : pybind11::none();
        info["cuda_arch_list"] = oe_ext::kCudaArchList;
        return info;
      },
      "How this library was built: torch's version, the compiler, CUDA's version as an integer "
      "(13000 is 13.0; None without CUDA) and the architectures of the CUDA kernels.");
  m.def("cpu_capability", &oe_ext::cpu::capability,
        "The instruction set of the CPU kernels that run here: AVX512, AVX2 or DEFAULT. "
        "ATEN_CPU_CAPABILITY sets a lower one.");
}
