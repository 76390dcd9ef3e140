// The extension module.
#include "bind.h"

#ifdef CLSP_PLANTED_BUGS
#include "planted_bug.h"
#endif

namespace clsp_python {

clsp::Isa parse_isa(const std::string& name) {
  if (name == "baseline") return clsp::Isa::kBaseline;
  const clsp::Isa best = clsp::best_isa();
  if (name == "auto") return best;
  if (name == "avx2" && best != clsp::Isa::kBaseline) return clsp::Isa::kAvx2;
  if (name == "avx512" && best == clsp::Isa::kAvx512) return clsp::Isa::kAvx512;
  throw py::value_error("isa must be 'auto' or one of instruction_sets(), got '" + name + "'");
}

namespace {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names{"baseline"};
  if (clsp::best_isa() != clsp::Isa::kBaseline) names.emplace_back("avx2");
  if (clsp::best_isa() == clsp::Isa::kAvx512) names.emplace_back("avx512");
  return names;
}

}  // namespace
}  // namespace clsp_python

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  clsp::best_isa();  // a wrong CLSP_SIMD stops the import, and nothing later
  m.attr("__version__") = CLSP_VERSION;
  m.def("instruction_sets", &clsp_python::instruction_sets);
  clsp_python::bind_audio(m);
  clsp_python::bind_similarity(m);
#ifdef CLSP_PLANTED_BUGS
  m.def("planted_bug", &clsp::planted_bug, pybind11::arg("kind"),
        pybind11::call_guard<pybind11::gil_scoped_release>());
#endif
}
