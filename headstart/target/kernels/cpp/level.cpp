// The kernels for one set of instructions. This file is compiled once for each, with HEADSTART_LEVEL as the name of its table.
#include "attention.hpp"
#include "choose.hpp"
#include "linear.hpp"
#include "norm.hpp"
#include "rope.hpp"

extern const headstart::Kernels HEADSTART_LEVEL;
const headstart::Kernels HEADSTART_LEVEL = {linear, norm, attention, prepare, choose_children, add};
