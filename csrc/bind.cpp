#include "bind.h"

#ifdef CLSP_PLANTED_BUGS
#include "planted_bug.h"
#endif

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  clsp::best_isa();  // throws for a wrong CLSP_SIMD: at import, not in a later call
  m.attr("__version__") = CLSP_VERSION;
  m.def("instruction_sets", &clsp::instruction_sets);
  clsp_python::bind_audio(m);
  clsp_python::bind_contrastive(m);
  clsp_python::bind_similarity(m);
  clsp_python::bind_voice(m);
#ifdef CLSP_PLANTED_BUGS
  m.def("planted_bug", &clsp::planted_bug, pybind11::arg("kind"),
        pybind11::call_guard<pybind11::gil_scoped_release>());
#endif
}
