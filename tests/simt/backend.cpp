// Another CPU backend for the operators: the CUDA launchers and kernels on CPU tensors, each
// allowed to touch the buffers that it is given and nothing else. And the controls of the harness,
// for the tests.
#include <dlfcn.h>

#include <memory>
#include <sstream>

#include "../../csrc/ops/upsampled_outlier_exposure_backend.h"
#include "guard.h"
#include "launchers.h"
#include "simt.h"
#include "watch.h"

namespace oe_ext {

// For the linker: what is composed of other operators calls them.
at::Tensor call_loss(const LossInputs&) { TORCH_CHECK(false, "call_loss: not in the harness"); }
ForwardResult call_forward(const LossInputs&, const OptionalTensor&, std::optional<bool>) {
  TORCH_CHECK(false, "call_forward: not in the harness");
}
at::Tensor call_backward(const at::Tensor&, const LossInputs&, const RowStatistics&) {
  TORCH_CHECK(false, "call_backward: not in the harness");
}

namespace {

const Launchers* launchers = nullptr;

void use_kernels(std::string_view path) {
  void* const library = dlopen(std::string(path).c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library != nullptr, dlerror());
  const auto get = reinterpret_cast<const Launchers* (*)()>(dlsym(library, kGetLaunchers));
  TORCH_CHECK(get != nullptr, dlerror());
  launchers = get();
}

template <typename scalar_t, typename acc_t>
const LaunchersOf<scalar_t, acc_t>& launchers_of() {
  return std::get<LaunchersOf<scalar_t, acc_t>>(launchers->of_dtypes);
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

template <typename scalar_t, typename Rows, typename T>
size_t extent(const UpsampledArgs<scalar_t, Rows>& args, const ImageView<T>& view) {
  if (args.num_images == 0) {
    return 0;
  }
  const int64_t last =
      (args.num_images - 1) * view.image_stride + (args.num_classes() - 1) * view.class_stride +
      (args.vertical.in - 1) * view.row_stride + (args.horizontal.in - 1) * view.column_stride;
  return (last + 1) * sizeof(T);
}

// What all kernels may touch of rows.
template <typename acc_t>
struct WatchedRows {
  template <typename Args>
  explicit WatchedRows(const Args& args)
      : bytes(args.layout.num_rows() * sizeof(acc_t)),
        labels("target", args.labels.data, bytes_of(args.labels, args.layout.num_rows())),
        alpha("alpha", args.alpha.values.data, bytes_of(args.alpha.values, args.layout.num_rows())),
        class_weights("weight", args.class_weights.data,
                      args.labels.rule.num_classes * sizeof(acc_t)),
        given_counts("given_counts", args.counts, 2 * sizeof(double)) {}

  size_t bytes;  // of one number a row
  simt::Watch labels;
  simt::Watch alpha;
  simt::Watch class_weights;
  simt::Watch given_counts;
};

// What the kernels of a forward may touch of its rows.
template <typename acc_t>
struct WatchedForward {
  template <typename Args>
  explicit WatchedForward(const Args& args)
      : rows(args),
        row_loss("row_loss", args.row_loss, rows.bytes),
        cross_entropy("row_cross_entropy", args.row_cross_entropy, rows.bytes),
        max("row_max", args.row_max, rows.bytes),
        sum_exp("row_sum_exp", args.row_sum_exp, rows.bytes),
        loss("loss", args.output.loss, sizeof(acc_t)),
        counts("counts", args.output.counts, 2 * sizeof(double)) {}

  WatchedRows<acc_t> rows;
  simt::Watch row_loss;
  simt::Watch cross_entropy;
  simt::Watch max;
  simt::Watch sum_exp;
  simt::Watch loss;
  simt::Watch counts;
};

// And those of a backward.
template <typename acc_t>
struct WatchedBackward {
  template <typename Args>
  explicit WatchedBackward(const Args& args)
      : rows(args),
        upstream("grad", args.grad.data, bytes_of(args.grad, args.layout.num_rows())),
        max("row_max", args.row_max, rows.bytes),
        sum_exp("row_sum_exp", args.row_sum_exp, rows.bytes) {}

  WatchedRows<acc_t> rows;
  simt::Watch upstream;
  simt::Watch max;
  simt::Watch sum_exp;
};

// The maps of both, or the logits and gradients of rows.
struct WatchedMaps {
  template <typename scalar_t, typename Rows>
  explicit WatchedMaps(const UpsampledArgs<scalar_t, Rows>& args)
      : logits("logits", args.logits.data, extent(args, args.logits)),
        gradient("grad_logits", args.grad.data, extent(args, args.grad)) {}

  template <typename scalar_t, typename acc_t>
  explicit WatchedMaps(const RowArgs<scalar_t, acc_t>& args)
      : logits("logits", args.logits, extent<scalar_t>(args.layout)),
        gradient("grad_logits", args.grad_logits, extent<scalar_t>(args.grad_layout)) {}

  simt::Watch logits;
  simt::Watch gradient;
};

// Scratch memory, of NaN.
struct Scratch {
  explicit Scratch(int64_t bytes)
      : words((bytes + sizeof(uint64_t) - 1) / sizeof(uint64_t), ~uint64_t(0)),
        watch("scratch", words.data(), bytes) {}

  std::vector<uint64_t> words;
  simt::Watch watch;
};

struct SimtBackend {
  static constexpr bool kSpreadsSmoothing = false;  // like the backend that it plays

  static bool fits(const UpsampledInputs& inputs) {
    const auto& [logits, target, alpha, weight, options] = inputs.loss;
    return launchers->fits_upsampled(logits.size(1), target.size(1), target.size(2),
                                     logits.scalar_type() == at::kDouble);
  }

  template <typename scalar_t, typename acc_t>
  static int64_t forward(const ForwardArgs<scalar_t, acc_t>& args) {
    const WatchedMaps maps(args);
    const WatchedForward<acc_t> rows(args);
    Scratch scratch(cuda::kScratchBytes);
    launchers_of<scalar_t, acc_t>().forward(args, scratch.words.data(), nullptr);
    simt::end_launcher();
    return -1;
  }

  template <typename scalar_t, typename acc_t>
  static int64_t backward(const BackwardArgs<scalar_t, acc_t>& args) {
    const WatchedMaps maps(args);
    const WatchedBackward<acc_t> rows(args);
    launchers_of<scalar_t, acc_t>().backward(args, nullptr);
    simt::end_launcher();
    return -1;
  }

  template <typename scalar_t, typename acc_t>
  static int64_t forward(const UpsampledForwardArgs<scalar_t, acc_t>& args) {
    const WatchedMaps maps(args);
    const WatchedForward<acc_t> rows(args.rows);
    const simt::Watch argmax("row_argmax", args.row_argmax,
                             args.rows.layout.num_rows() * sizeof(*args.row_argmax));
    Scratch scratch(launchers_of<scalar_t, acc_t>().forward_scratch(args));
    launchers_of<scalar_t, acc_t>().upsampled_forward(args, scratch.words.data(), nullptr);
    simt::end_launcher();
    return -1;
  }

  template <typename scalar_t, typename acc_t>
  static int64_t backward(const UpsampledBackwardArgs<scalar_t, acc_t>& args) {
    const WatchedMaps maps(args);
    const WatchedBackward<acc_t> rows(args.rows);
    Scratch scratch(launchers_of<scalar_t, acc_t>().backward_scratch(args));
    launchers_of<scalar_t, acc_t>().upsampled_backward(args, scratch.words.data(), nullptr);
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
  register_upsampled_backend<SimtBackend>(*active);
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
