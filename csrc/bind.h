// What the files that know Python share. They check arguments, release the GIL, call the engine and
// return arrays; they hold no loop over samples or embeddings.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <type_traits>

#include "checked.h"
#include "simd.h"

namespace clsp_python {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using FloatArray = Array<float>;

// Throws ValueError for an instruction set that this machine does not have.
clsp::Isa parse_isa(const std::string& name);

// The elements of a C-contiguous array of T, writable unless T is const.
template <class T>
clsp::Span<T> parse_vector(const py::array& array, std::size_t size, const char* name) {
  if (!Array<std::remove_const_t<T>>::check_(array) ||
      static_cast<std::size_t>(array.size()) != size ||
      (!std::is_const_v<T> && !array.writeable())) {
    throw py::value_error(std::string(name) + " has the wrong dtype, layout or size");
  }
  return {static_cast<T*>(const_cast<void*>(array.data())), size};
}

void bind_audio(py::module_& m);
void bind_similarity(py::module_& m);

}  // namespace clsp_python
