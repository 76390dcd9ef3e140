// Ranks, nearest neighbours, and sums over negative pairs.
#include <limits>
#include <optional>
#include <utility>

#include "bind.h"
#include "contrastive.h"
#include "rank.h"

namespace clsp_python {
namespace {

template <class T>
clsp::Matrix<T> parse_matrix(const Array<T>& array, const char* name) {
  if (array.ndim() != 2 || array.shape(1) < 1) {
    throw py::value_error(std::string(name) + " must have two dimensions and a column or more");
  }
  if (array.shape(0) > std::numeric_limits<std::int32_t>::max()) {
    throw py::value_error(std::string(name) + " must have less than 2^31 rows");
  }
  return {array.data(), static_cast<std::size_t>(array.shape(0)),
          static_cast<std::size_t>(array.shape(1))};
}

template <class T>
std::pair<clsp::Matrix<T>, clsp::Matrix<T>> parse_matrices(const Array<T>& a, const char* a_name,
                                                           const Array<T>& b, const char* b_name) {
  const auto first = parse_matrix(a, a_name), second = parse_matrix(b, b_name);
  if (first.depth != second.depth) throw py::value_error("matrices must have as many columns");
  return {first, second};
}

py::tuple rank_targets(const FloatArray& audio_array, const FloatArray& text_array,
                       const py::array& owner_array, int num_threads, const std::string& isa_name) {
  const clsp::Isa isa = parse_isa(isa_name);
  const auto [audio, text] = parse_matrices(audio_array, "audio", text_array, "text");
  const auto owner = parse_vector<const std::int32_t>(owner_array, text.rows, "owner");
  FloatArray text_score(text_array.shape(0)), audio_score(audio_array.shape(0));
  py::array_t<std::int32_t> audio_index(audio_array.shape(0));
  const clsp::Span<float> text_span(text_score.mutable_data(), text.rows);
  const clsp::Span<float> audio_span(audio_score.mutable_data(), audio.rows);
  const clsp::Span<std::int32_t> index_span(audio_index.mutable_data(), audio.rows);
  {
    const py::gil_scoped_release release;
    clsp::rank_targets(audio, text, owner, text_span, audio_span, index_span, num_threads, isa);
  }
  return py::make_tuple(text_score, audio_score, audio_index);
}

void count_ahead(const FloatArray& audio_array, const FloatArray& text_array,
                 std::size_t first_text, const py::tuple& audio_targets,
                 const py::tuple& text_targets, const py::array& audio_ahead,
                 const py::array& text_ahead, int num_threads, const std::string& isa_name) {
  const clsp::Isa isa = parse_isa(isa_name);
  const auto [audio, text] = parse_matrices(audio_array, "audio", text_array, "text");
  const auto targets = [](const py::tuple& pair, std::size_t size, const char* name) {
    return clsp::Targets{parse_vector<const float>(pair[0].cast<py::array>(), size, name),
                         parse_vector<const std::int32_t>(pair[1].cast<py::array>(), size, name)};
  };
  const clsp::Targets of_audio = targets(audio_targets, audio.rows, "audio_targets");
  const clsp::Targets of_text = targets(text_targets, text.rows, "text_targets");
  const auto audio_span = parse_vector<std::int64_t>(audio_ahead, audio.rows, "audio_ahead");
  const auto text_span = parse_vector<std::int64_t>(text_ahead, text.rows, "text_ahead");
  const py::gil_scoped_release release;
  clsp::count_ahead(audio, text, first_text, of_audio, of_text, audio_span, text_span, num_threads,
                    isa);
}

// The first row that is not finite, or None.
std::optional<std::size_t> update_best(const FloatArray& query_array, const FloatArray& row_array,
                                       std::size_t first_row, const py::array& scores,
                                       const py::array& index, int num_threads,
                                       const std::string& isa_name) {
  const clsp::Isa isa = parse_isa(isa_name);
  const auto [queries, rows] = parse_matrices(query_array, "queries", row_array, "rows");
  if (scores.ndim() != 2 || scores.shape(1) < 1) throw py::value_error("scores must be (Q, K)");
  const auto k = static_cast<std::size_t>(scores.shape(1));
  const std::size_t size = clsp::checked_multiply(queries.rows, k);
  const auto score_span = parse_vector<float>(scores, size, "scores");
  const auto index_span = parse_vector<std::int64_t>(index, size, "index");
  const py::gil_scoped_release release;
  const std::size_t bad =
      clsp::update_best(queries, rows, first_row, k, score_span, index_span, num_threads, isa);
  return bad == clsp::kNoRow ? std::nullopt : std::make_optional(bad);
}

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
          parse_isa(isa)};
}

template <class T, class U>
clsp::PerRowAndColumn<U> parse_sums(const clsp::Negatives<T>& pairs, const py::tuple& sums) {
  const bool both = pairs.kind == clsp::NegativesKind::kSoftmax;
  return {parse_vector<U>(sums[0].cast<py::array>(), pairs.audio.rows, "row sums"),
          parse_vector<U>(sums[1].cast<py::array>(), both ? pairs.text.rows : 0, "column sums")};
}

// As many numbers as the matrix has, or none: null.
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
  T* const by_audio = parse_gradient<T>(d_audio, audio, "d_audio");
  T* const by_text = parse_gradient<T>(d_text, text, "d_text");
  if (by_audio == nullptr && by_text == nullptr) {
    throw py::value_error("d_audio or d_text must have elements");
  }
  const py::gil_scoped_release release;
  const clsp::ScalarGradients scalars =
      clsp::sum_negatives_backward(pairs, sums, d_sums, logits, by_audio, by_text);
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

void bind_similarity(py::module_& m) {
  using py::arg;
  m.def("rank_targets", &rank_targets, arg("audio").noconvert(), arg("text").noconvert(),
        arg("owner"), py::kw_only(), arg("num_threads"), arg("isa") = "auto");
  m.def("count_ahead", &count_ahead, arg("audio").noconvert(), arg("text").noconvert(),
        py::kw_only(), arg("first_text"), arg("audio_targets"), arg("text_targets"),
        arg("audio_ahead"), arg("text_ahead"), arg("num_threads"), arg("isa") = "auto");
  m.def("update_best", &update_best, arg("queries").noconvert(), arg("rows").noconvert(),
        py::kw_only(), arg("first_row"), arg("scores"), arg("index"), arg("num_threads"),
        arg("isa") = "auto");
  m.attr("LOGIT_TILES") = py::make_tuple(clsp::kUnit, clsp::kTile, clsp::kPanel, clsp::kBlock);
  bind_negatives<float>(m);
  bind_negatives<double>(m);
}

}  // namespace clsp_python
