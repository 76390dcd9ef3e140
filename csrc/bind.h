// Shared by the bind_* files. A binding checks its arguments, releases the GIL, calls the engine
// and returns arrays. It has no loop over samples or embeddings.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

#include "buffers.h"
#include "matrix.h"
#include "simd.h"

namespace clsp_python {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using FloatArray = Array<float>;

// Returns the elements of a C-contiguous array of T, which must be writable unless T is const.
template <class T>
clsp::Span<T> parse_vector(const py::array& array, std::size_t size, const char* name) {
  if (!Array<std::remove_const_t<T>>::check_(array) ||
      static_cast<std::size_t>(array.size()) != size ||
      (!std::is_const_v<T> && !array.writeable())) {
    throw py::value_error(std::string(name) + " has the wrong dtype, layout or size");
  }
  return {static_cast<T*>(const_cast<void*>(array.data())), size};
}

template <class T>
clsp::Matrix<T> parse_matrix(const Array<T>& array, const char* name) {
  if (array.ndim() != 2 || array.shape(1) < 1) {
    throw py::value_error(std::string(name) + " must have two dimensions and a column or more");
  }
  if (array.shape(0) > std::numeric_limits<std::int32_t>::max()) {
    throw py::value_error(std::string(name) + " must have fewer than 2^31 rows");
  }
  return {array.data(), static_cast<std::size_t>(array.shape(0)),
          static_cast<std::size_t>(array.shape(1))};
}

template <class T>
std::pair<clsp::Matrix<T>, clsp::Matrix<T>> parse_matrices(const Array<T>& a, const char* a_name,
                                                           const Array<T>& b, const char* b_name) {
  const auto first = parse_matrix(a, a_name), second = parse_matrix(b, b_name);
  if (first.depth != second.depth)
    throw py::value_error("matrices must have the same number of columns");
  return {first, second};
}

inline FloatArray check_waveform(const py::handle& object) {
  if (!FloatArray::check_(object)) {
    throw py::type_error("waveforms must be C-contiguous float32 arrays");
  }
  auto array = py::reinterpret_borrow<FloatArray>(object);
  if (array.ndim() != 1) throw py::value_error("waveforms must have one dimension");
  return array;
}

inline clsp::Span<const float> view(const FloatArray& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}

void bind_audio(py::module_& m);
void bind_contrastive(py::module_& m);
void bind_similarity(py::module_& m);
void bind_voice(py::module_& m);

}  // namespace clsp_python
