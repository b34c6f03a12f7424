#include "schemas.h"

TORCH_LIBRARY(oe_ext, m) { oe_ext::define_operators(m); }
