#include <optional>

#include "bind.h"
#include "nearest.h"
#include "rank.h"

namespace clsp_python {
namespace {

py::tuple rank_targets(const FloatArray& audio_array, const FloatArray& text_array,
                       const py::array& owner_array, int num_threads, const std::string& isa_name) {
  const clsp::Isa isa = clsp::parse_isa(isa_name);
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
                 std::size_t first_text, const py::tuple& audio_target_arrays,
                 const py::tuple& text_target_arrays, const py::array& audio_ahead,
                 const py::array& text_ahead, int num_threads, const std::string& isa_name) {
  const clsp::Isa isa = clsp::parse_isa(isa_name);
  const auto [audio, text] = parse_matrices(audio_array, "audio", text_array, "text");
  const auto parse_targets = [](const py::tuple& pair, std::size_t size, const char* name) {
    return clsp::Targets{parse_vector<const float>(pair[0].cast<py::array>(), size, name),
                         parse_vector<const std::int32_t>(pair[1].cast<py::array>(), size, name)};
  };
  const clsp::Targets audio_targets =
      parse_targets(audio_target_arrays, audio.rows, "audio_targets");
  const clsp::Targets text_targets = parse_targets(text_target_arrays, text.rows, "text_targets");
  const auto audio_span = parse_vector<std::int64_t>(audio_ahead, audio.rows, "audio_ahead");
  const auto text_span = parse_vector<std::int64_t>(text_ahead, text.rows, "text_ahead");
  const py::gil_scoped_release release;
  clsp::count_ahead(audio, text, first_text, audio_targets, text_targets, audio_span, text_span,
                    num_threads, isa);
}

// Returns the first of `rows` that is not finite, or None.
std::optional<std::size_t> update_best(const FloatArray& query_array, const FloatArray& row_array,
                                       std::size_t first_row, const py::array& scores,
                                       const py::array& index, int num_threads,
                                       const std::string& isa_name) {
  const clsp::Isa isa = clsp::parse_isa(isa_name);
  const auto [queries, rows] = parse_matrices(query_array, "queries", row_array, "rows");
  if (scores.ndim() != 2 || scores.shape(1) < 1) throw py::value_error("scores must be (Q, K)");
  const auto k = static_cast<std::size_t>(scores.shape(1));
  const std::size_t size = clsp::checked_multiply(queries.rows, k);
  const auto score_span = parse_vector<float>(scores, size, "scores");
  const auto index_span = parse_vector<std::int64_t>(index, size, "index");
  const py::gil_scoped_release release;
  const std::size_t bad_row =
      clsp::update_best(queries, rows, first_row, k, score_span, index_span, num_threads, isa);
  return bad_row == clsp::kNoRow ? std::nullopt : std::make_optional(bad_row);
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
}

}  // namespace clsp_python
