// Ranks, nearest neighbours, and sums over negative pairs.
#include <limits>
#include <optional>

#include "bind.h"
#include "contrastive.h"
#include "rank.h"

namespace clsp_python {
namespace {

clsp::Matrix parse_matrix(const FloatArray& array, const char* name) {
  if (array.ndim() != 2 || array.shape(1) < 1) {
    throw py::value_error(std::string(name) + " must have two dimensions and a column or more");
  }
  if (array.shape(0) > std::numeric_limits<std::int32_t>::max()) {
    throw py::value_error(std::string(name) + " must have less than 2^31 rows");
  }
  return {array.data(), static_cast<std::size_t>(array.shape(0)),
          static_cast<std::size_t>(array.shape(1))};
}

void check_depth(const clsp::Matrix& a, const clsp::Matrix& b) {
  if (a.depth != b.depth) throw py::value_error("matrices must have as many columns");
}

py::tuple rank_targets(const FloatArray& audio_array, const FloatArray& text_array,
                       const py::array& owner_array, int num_threads, const std::string& isa_name) {
  const clsp::Isa isa = parse_isa(isa_name);
  const clsp::Matrix audio = parse_matrix(audio_array, "audio");
  const clsp::Matrix text = parse_matrix(text_array, "text");
  check_depth(audio, text);
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
  const clsp::Matrix audio = parse_matrix(audio_array, "audio");
  const clsp::Matrix text = parse_matrix(text_array, "text");
  check_depth(audio, text);
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
  const clsp::Matrix queries = parse_matrix(query_array, "queries");
  const clsp::Matrix rows = parse_matrix(row_array, "rows");
  check_depth(queries, rows);
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

clsp::Embeddings parse_embeddings(const py::array& array, const std::string& dtype) {
  if (array.ndim() != 2 || !(array.flags() & py::array::c_style)) {
    throw py::value_error("embeddings must be C-contiguous matrices");
  }
  if (array.shape(0) < 1) throw py::value_error("embeddings must have a row or more");
  const clsp::Dtype parsed = dtype == "float32"    ? clsp::Dtype::kFloat32
                             : dtype == "float64"  ? clsp::Dtype::kFloat64
                             : dtype == "bfloat16" ? clsp::Dtype::kBFloat16
                             : dtype == "float16"
                                 ? clsp::Dtype::kFloat16
                                 : throw py::value_error("unknown dtype '" + dtype + "'");
  const py::ssize_t bytes = dtype == "float64" ? 8 : dtype == "float32" ? 4 : 2;
  if (array.itemsize() != bytes) throw py::value_error("embeddings must be of dtype " + dtype);
  return {array.data(), parsed, static_cast<std::size_t>(array.shape(0)),
          static_cast<std::size_t>(array.shape(1))};
}

clsp::Negatives parse_negatives(const std::string& kind, const py::array& audio,
                                const py::array& text, const std::string& dtype,
                                const py::array& owner, double scale, double bias, int num_threads,
                                const std::string& isa) {
  if (kind != "softmax" && kind != "sigmoid") throw py::value_error("unknown kind '" + kind + "'");
  const clsp::Embeddings a = parse_embeddings(audio, dtype), t = parse_embeddings(text, dtype);
  if (a.depth != t.depth) throw py::value_error("audio and text must have as many columns");
  return {kind == "softmax" ? clsp::NegativesKind::kSoftmax : clsp::NegativesKind::kSigmoid,
          a,
          t,
          parse_vector<const std::int64_t>(owner, t.rows, "owner"),
          scale,
          bias,
          num_threads,
          parse_isa(isa)};
}

template <class T>
clsp::PerRowAndColumn<T> parse_sums(const clsp::Negatives& pairs, const py::tuple& sums) {
  const bool both = pairs.kind == clsp::NegativesKind::kSoftmax;
  return {parse_vector<T>(sums[0].cast<py::array>(), pairs.audio.rows, "row sums"),
          parse_vector<T>(sums[1].cast<py::array>(), both ? pairs.text.rows : 0, "column sums")};
}

template <class T>
void sum_negatives_as(const clsp::Negatives& pairs, const py::tuple& out, const py::array& kept) {
  const clsp::PerRowAndColumn<T> sums = parse_sums<T>(pairs, out);
  const auto logits = parse_vector<T>(kept, static_cast<std::size_t>(kept.size()), "kept");
  const py::gil_scoped_release release;
  clsp::sum_negatives(pairs, sums, logits);
}

void sum_negatives(const std::string& kind, const py::array& audio, const py::array& text,
                   const std::string& dtype, const py::array& owner, double scale, double bias,
                   const py::tuple& out, const py::array& kept, int num_threads,
                   const std::string& isa) {
  const clsp::Negatives pairs =
      parse_negatives(kind, audio, text, dtype, owner, scale, bias, num_threads, isa);
  if (pairs.audio.dtype == clsp::Dtype::kFloat64) {
    sum_negatives_as<double>(pairs, out, kept);
  } else {
    sum_negatives_as<float>(pairs, out, kept);
  }
}

template <class T>
py::tuple sum_negatives_backward_as(const clsp::Negatives& pairs, const py::tuple& out,
                                    const py::tuple& d_out, const py::array& kept,
                                    const py::array& d_audio, const py::array& d_text) {
  const auto sums = parse_sums<const T>(pairs, out), d_sums = parse_sums<const T>(pairs, d_out);
  const auto logits = parse_vector<const T>(kept, static_cast<std::size_t>(kept.size()), "kept");
  const std::size_t depth = pairs.audio.depth;
  T* const rows = parse_vector<T>(d_audio, pairs.audio.rows * depth, "d_audio").data();
  T* const columns = parse_vector<T>(d_text, pairs.text.rows * depth, "d_text").data();
  clsp::ScalarGradients scalars{};
  {
    const py::gil_scoped_release release;
    scalars = clsp::sum_negatives_backward(pairs, sums, d_sums, logits, rows, columns);
  }
  return py::make_tuple(scalars.scale, scalars.bias);
}

py::tuple sum_negatives_backward(const std::string& kind, const py::array& audio,
                                 const py::array& text, const std::string& dtype,
                                 const py::array& owner, double scale, double bias,
                                 const py::tuple& out, const py::tuple& d_out,
                                 const py::array& kept, const py::array& d_audio,
                                 const py::array& d_text, int num_threads, const std::string& isa) {
  const clsp::Negatives pairs =
      parse_negatives(kind, audio, text, dtype, owner, scale, bias, num_threads, isa);
  return pairs.audio.dtype == clsp::Dtype::kFloat64
             ? sum_negatives_backward_as<double>(pairs, out, d_out, kept, d_audio, d_text)
             : sum_negatives_backward_as<float>(pairs, out, d_out, kept, d_audio, d_text);
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
  m.def("sum_negatives", &sum_negatives, arg("kind"), arg("audio"), arg("text"), arg("dtype"),
        arg("owner"), arg("scale"), arg("bias"), arg("out"), arg("kept"), py::kw_only(),
        arg("num_threads"), arg("isa") = "auto");
  m.def("sum_negatives_backward", &sum_negatives_backward, arg("kind"), arg("audio"), arg("text"),
        arg("dtype"), arg("owner"), arg("scale"), arg("bias"), arg("out"), arg("d_out"),
        arg("kept"), arg("d_audio"), arg("d_text"), py::kw_only(), arg("num_threads"),
        arg("isa") = "auto");
}

}  // namespace clsp_python
