// The part of libtorch that the CPU kernels need, for processors without a libtorch here: the end
// of TORCH_CHECK.
#include <c10/util/Exception.h>

#include <stdexcept>

namespace c10::detail {

void torchCheckFail(const char*, const char*, uint32_t, const std::string& message) {
  throw std::runtime_error(message);
}

void torchCheckFail(const char*, const char*, uint32_t, const char* message) {
  throw std::runtime_error(message);
}

}  // namespace c10::detail
