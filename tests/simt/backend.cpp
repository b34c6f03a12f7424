// Another CPU backend for the operators: the CUDA launchers and kernels on CPU tensors, each
// allowed to touch the buffers that it is given and nothing else. And the controls of the harness,
// for the tests.
#include <dlfcn.h>

#include <memory>
#include <sstream>

#include "../../csrc/ops/outlier_exposure_backend.h"
#include "guard.h"
#include "launchers.h"
#include "simt.h"
#include "watch.h"

namespace oe_ext {

// For the linker: a derivative that no backend computes calls it.
at::Tensor call_loss(const LossInputs&) { TORCH_CHECK(false, "call_loss: not in the harness"); }

namespace {

const Launchers* launchers = nullptr;

void use_kernels(std::string_view path) {
  void* const library = dlopen(std::string(path).c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library != nullptr, dlerror());
  const auto get = reinterpret_cast<const Launchers* (*)()>(dlsym(library, kGetLaunchers));
  TORCH_CHECK(get != nullptr, dlerror());
  launchers = get();
}

template <typename scalar_t>
size_t extent(const RowLayout& layout) {
  if (layout.num_rows() == 0) {
    return 0;
  }
  const int64_t last = (layout.num_outer - 1) * layout.outer_stride +
                       (layout.num_inner - 1) * layout.inner_stride +
                       (layout.num_classes - 1) * layout.class_stride;
  return (last + 1) * sizeof(scalar_t);
}

size_t bytes_of(const Labels& labels, int64_t num_rows) {
  return num_rows *
         with_label_type(labels.type, labels.data, [](const auto* data) { return sizeof(*data); });
}

template <typename T>
size_t bytes_of(const PerRow<T>& values, int64_t num_rows) {
  return num_rows == 0 ? 0 : ((num_rows - 1) * values.stride + 1) * sizeof(T);
}

struct SimtBackend {
  static constexpr bool kSpreadsSmoothing = false;  // like the backend that it plays

  template <typename scalar_t, typename acc_t>
  static int64_t forward(const ForwardArgs<scalar_t, acc_t>& args) {
    const int64_t num_rows = args.layout.num_rows();
    const size_t row_bytes = num_rows * sizeof(acc_t);
    std::vector<uint64_t> scratch(cuda::kScratchBytes / sizeof(uint64_t), ~uint64_t(0));  // NaN
    const simt::Watch logits("logits", args.logits, extent<scalar_t>(args.layout));
    const simt::Watch gradient("grad_logits", args.grad_logits, extent<scalar_t>(args.grad_layout));
    const simt::Watch labels("target", args.labels.data, bytes_of(args.labels, num_rows));
    const simt::Watch alpha("alpha", args.alpha.values.data, bytes_of(args.alpha.values, num_rows));
    const simt::Watch class_weights("weight", args.class_weights.data,
                                    args.labels.rule.num_classes * sizeof(acc_t));
    const simt::Watch row_loss("row_loss", args.row_loss, row_bytes);
    const simt::Watch cross_entropy("row_cross_entropy", args.row_cross_entropy, row_bytes);
    const simt::Watch max("row_max", args.row_max, row_bytes);
    const simt::Watch sum_exp("row_sum_exp", args.row_sum_exp, row_bytes);
    const simt::Watch given_counts("given_counts", args.counts, 2 * sizeof(double));
    const simt::Watch loss("loss", args.output.loss, sizeof(acc_t));
    const simt::Watch counts("counts", args.output.counts, 2 * sizeof(double));
    const simt::Watch partials("scratch", scratch.data(), cuda::kScratchBytes);
    std::get<LauncherPair<scalar_t, acc_t>>(*launchers).forward(args, scratch.data(), nullptr);
    simt::end_launcher();
    return -1;
  }

  template <typename scalar_t, typename acc_t>
  static int64_t backward(const BackwardArgs<scalar_t, acc_t>& args) {
    const int64_t num_rows = args.layout.num_rows();
    const size_t row_bytes = num_rows * sizeof(acc_t);
    const simt::Watch logits("logits", args.logits, extent<scalar_t>(args.layout));
    const simt::Watch gradient("grad_logits", args.grad_logits, extent<scalar_t>(args.grad_layout));
    const simt::Watch labels("target", args.labels.data, bytes_of(args.labels, num_rows));
    const simt::Watch alpha("alpha", args.alpha.values.data, bytes_of(args.alpha.values, num_rows));
    const simt::Watch class_weights("weight", args.class_weights.data,
                                    args.labels.rule.num_classes * sizeof(acc_t));
    const simt::Watch upstream("grad", args.grad.data, bytes_of(args.grad, num_rows));
    const simt::Watch max("row_max", args.row_max, row_bytes);
    const simt::Watch sum_exp("row_sum_exp", args.row_sum_exp, row_bytes);
    const simt::Watch counts("counts", args.counts, 2 * sizeof(double));
    std::get<LauncherPair<scalar_t, acc_t>>(*launchers).backward(args, nullptr);
    simt::end_launcher();
    return -1;
  }
};

// As JSON.
std::string traffic_to_json(const std::map<std::string, simt::Traffic>& traffic) {
  std::ostringstream out;
  out << "{";
  const char* separator = "";
  for (const auto& [buffer, moved] : traffic) {
    out << separator << '"' << buffer << "\": {\"bytes\": " << moved.bytes
        << ", \"requests\": " << moved.requests << ", \"sectors\": " << moved.sectors
        << ", \"least_sectors\": " << moved.least_sectors
        << ", \"wide_bytes\": " << moved.wide_bytes << "}";
    separator = ", ";
  }
  out << "}";
  return out.str();
}

std::string stop_counting() {
  std::ostringstream out;
  out << "[";
  const char* separator = "";
  for (const simt::LaunchRecord& record : simt::stop_counting()) {
    out << separator << "{\"kernel\": \"" << record.kernel << "\", \"blocks\": " << record.blocks
        << ", \"threads\": " << record.threads << ", \"shared_bytes\": " << record.shared_bytes
        << ", \"reads\": " << traffic_to_json(record.reads)
        << ", \"writes\": " << traffic_to_json(record.writes) << "}";
    separator = ", ";
  }
  out << "]";
  return out.str();
}

void set_limits(int64_t max_blocks, int64_t max_stage_bytes) {
  TORCH_CHECK_VALUE(max_blocks >= 1 && max_blocks <= cuda::kMaxBlocks, "max_blocks: ", max_blocks);
  simt::max_blocks = max_blocks;
  simt::max_stage_bytes = max_stage_bytes;
}

// The kernels of this backend, in the place of the CPU's, while it is set.
std::unique_ptr<torch::Library> active;

void activate() {
  active = std::make_unique<torch::Library>(torch::Library::IMPL, "oe_ext", c10::DispatchKey::CPU,
                                            __FILE__, __LINE__);
  register_backend<SimtBackend>(*active);
}

void deactivate() { active.reset(); }

}  // namespace

TORCH_LIBRARY(oe_ext_simt, m) {
  m.def("activate() -> ()", TORCH_FN(activate));
  m.def("deactivate() -> ()", TORCH_FN(deactivate));
  m.def("use_kernels(str path) -> ()", TORCH_FN(use_kernels));
  m.def("set_seed(int seed) -> ()",
        [](int64_t seed) { simt::set_seed(static_cast<unsigned>(seed)); });
  m.def("set_limits(int max_blocks, int max_stage_bytes) -> ()", TORCH_FN(set_limits));
  m.def("start_guarding() -> ()", TORCH_FN(simt::start_guarding));
  m.def("stop_guarding() -> ()", TORCH_FN(simt::stop_guarding));
  m.def("open_device_memory() -> ()", TORCH_FN(simt::open_device_memory));
  m.def("close_device_memory() -> ()", TORCH_FN(simt::close_device_memory));
  m.def("start_counting() -> ()", TORCH_FN(simt::start_counting));
  m.def("stop_counting() -> str", TORCH_FN(stop_counting));
}

}  // namespace oe_ext
