// How compiled autograd traces our nodes. A file of its own, to keep compiled autograd's header out
// of the others.
#include <torch/csrc/dynamo/compiled_autograd.h>

#include "outlier_exposure_nodes.h"
#include "upsampled_outlier_exposure_nodes.h"

namespace oe_ext {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

void LossNode::compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const {
  for (const SavedVariable& variable : saved_) {
    args.collect(variable, /*is_output=*/false);
  }
  args.collect(options_.alpha);
  args.collect(std::string(options_.reduction.name));
  args.collect(options_.ignore_index);
  args.collect(options_.ood_index);
  args.collect(options_.label_smoothing);
}

void UpsampledOutlierExposureLossBackward0::compiled_args(
    torch::dynamo::autograd::CompiledNodeArgs& args) const {
  LossNode::compiled_args(args);
  args.collect(align_corners_);
}

variable_list LossNode::apply_with_saved(const variable_list& inputs,
                                         torch::dynamo::autograd::SwapSavedVariables& saved) {
  for (SavedVariable& variable : saved_) {
    saved.before(variable);
  }
  saved.before(options_.ignore_index);
  saved.before(options_.ood_index);
  variable_list result = apply(variable_list(inputs));
  for (SavedVariable& variable : saved_) {
    saved.after(variable);
  }
  saved.after(options_.ignore_index);
  saved.after(options_.ood_index);
  return result;
}

}  // namespace oe_ext
