#include <utility>

#include "bind.h"
#include "contrastive.h"

namespace clsp_python {
namespace {

template <class T>
clsp::Negatives<T> parse_negatives(const std::string& kind, const Array<T>& audio_array,
                                   const Array<T>& text_array, const py::array& owner, T scale,
                                   T bias, int num_threads, const std::string& isa) {
  if (kind != "softmax" && kind != "sigmoid") throw py::value_error("unknown kind '" + kind + "'");
  const auto [audio, text] = parse_matrices(audio_array, "audio", text_array, "text");
  if (audio.rows == 0 || text.rows == 0) throw py::value_error("matrices must have a row or more");
  return {kind == "softmax" ? clsp::NegativesKind::kSoftmax : clsp::NegativesKind::kSigmoid,
          audio,
          text,
          parse_vector<const std::int64_t>(owner, text.rows, "owner"),
          scale,
          bias,
          num_threads,
          clsp::parse_isa(isa)};
}

template <class T, class U>
clsp::PerRowAndColumn<U> parse_sums(const clsp::Negatives<T>& pairs, const py::tuple& sums) {
  const bool has_columns = pairs.kind == clsp::NegativesKind::kSoftmax;
  return {
      parse_vector<U>(sums[0].cast<py::array>(), pairs.audio.rows, "row sums"),
      parse_vector<U>(sums[1].cast<py::array>(), has_columns ? pairs.text.rows : 0, "column sums")};
}

// Returns the elements of a gradient, which has the size of `matrix`, or null if it is empty.
template <class T>
T* parse_gradient(const py::array& gradient, const Array<T>& matrix, const char* name) {
  if (gradient.size() == 0) return nullptr;
  return parse_vector<T>(gradient, static_cast<std::size_t>(matrix.size()), name).data();
}

template <class T>
void sum_negatives(const std::string& kind, const Array<T>& audio, const Array<T>& text,
                   const py::array& owner, T scale, T bias, const py::tuple& out,
                   const py::array& kept, int num_threads, const std::string& isa) {
  const auto pairs = parse_negatives<T>(kind, audio, text, owner, scale, bias, num_threads, isa);
  const auto sums = parse_sums<T, T>(pairs, out);
  const auto logits = parse_vector<T>(kept, static_cast<std::size_t>(kept.size()), "kept");
  const py::gil_scoped_release release;
  clsp::sum_negatives(pairs, sums, logits);
}

template <class T>
std::pair<double, double> sum_negatives_backward(const std::string& kind, const Array<T>& audio,
                                                 const Array<T>& text, const py::array& owner,
                                                 T scale, T bias, const py::tuple& out,
                                                 const py::tuple& d_out, const py::array& kept,
                                                 const py::array& d_audio, const py::array& d_text,
                                                 int num_threads, const std::string& isa) {
  const auto pairs = parse_negatives<T>(kind, audio, text, owner, scale, bias, num_threads, isa);
  const auto sums = parse_sums<T, const T>(pairs, out),
             d_sums = parse_sums<T, const T>(pairs, d_out);
  const auto logits = parse_vector<const T>(kept, static_cast<std::size_t>(kept.size()), "kept");
  T* const audio_gradient = parse_gradient<T>(d_audio, audio, "d_audio");
  T* const text_gradient = parse_gradient<T>(d_text, text, "d_text");
  if (audio_gradient == nullptr && text_gradient == nullptr) {
    throw py::value_error("d_audio or d_text must have elements");
  }
  const py::gil_scoped_release release;
  const clsp::ScalarGradients scalars =
      clsp::sum_negatives_backward(pairs, sums, d_sums, logits, audio_gradient, text_gradient);
  return {scalars.scale, scalars.bias};
}

template <class T>
void bind_negatives(py::module_& m) {
  using py::arg;
  m.def("sum_negatives", &sum_negatives<T>, arg("kind"), arg("audio").noconvert(),
        arg("text").noconvert(), arg("owner"), arg("scale"), arg("bias"), arg("out"), arg("kept"),
        py::kw_only(), arg("num_threads"), arg("isa") = "auto");
  m.def("sum_negatives_backward", &sum_negatives_backward<T>, arg("kind"), arg("audio").noconvert(),
        arg("text").noconvert(), arg("owner"), arg("scale"), arg("bias"), arg("out"), arg("d_out"),
        arg("kept"), arg("d_audio"), arg("d_text"), py::kw_only(), arg("num_threads"),
        arg("isa") = "auto");
}

}  // namespace

void bind_contrastive(py::module_& m) {
  m.attr("LOGIT_TILES") =
      py::make_tuple(clsp::kTileRows, clsp::kTileColumns, clsp::kPanelRows, clsp::kPanelColumns);
  bind_negatives<float>(m);
  bind_negatives<double>(m);
}

}  // namespace clsp_python
