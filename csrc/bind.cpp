// The only file that knows Python: checks arguments, releases the GIL, calls the engine, returns
// arrays. It holds no loop over samples.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "batch.h"
#include "fft.h"
#include "rank.h"
#include "resample.h"
#ifdef CLSP_PLANTED_BUGS
#include "planted_bug.h"
#endif

namespace py = pybind11;

namespace {

using FloatArray = py::array_t<float, py::array::c_style>;

clsp::Isa parse_isa(const std::string& name) {
  if (name == "baseline") return clsp::Isa::kBaseline;
  const clsp::Isa best = clsp::best_isa();
  if (name == "auto") return best;
  if (name == "avx2" && best != clsp::Isa::kBaseline) return clsp::Isa::kAvx2;
  if (name == "avx512" && best == clsp::Isa::kAvx512) return clsp::Isa::kAvx512;
  throw py::value_error("isa must be 'auto' or one of instruction_sets(), got '" + name + "'");
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names{"baseline"};
  if (clsp::best_isa() != clsp::Isa::kBaseline) names.emplace_back("avx2");
  if (clsp::best_isa() == clsp::Isa::kAvx512) names.emplace_back("avx512");
  return names;
}

FloatArray check_waveform(const py::handle& object) {
  if (!FloatArray::check_(object)) {
    throw py::type_error("waveforms must be C-contiguous float32 arrays");
  }
  auto array = py::reinterpret_borrow<FloatArray>(object);
  if (array.ndim() != 1) throw py::value_error("waveforms must have one dimension");
  return array;
}

clsp::Span<const float> view(const FloatArray& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}

// Hands the samples to numpy without a copy.
FloatArray to_array(clsp::Samples samples) {
  auto owner = std::make_unique<clsp::Samples>(std::move(samples));
  const float* data = owner->data();
  const auto size = static_cast<py::ssize_t>(owner->size());
  const py::capsule capsule(owner.release(),
                            [](void* p) { delete static_cast<clsp::Samples*>(p); });
  return FloatArray({size}, data, capsule);
}

// float32 array, or (reason, message).
py::object to_object(clsp::Loaded loaded) {
  if (loaded.reason.empty()) return to_array(std::move(loaded.samples));
  return py::make_tuple(loaded.reason, loaded.message);
}

clsp::Part parse_part(double start_s, std::optional<double> duration_s,
                      std::optional<int> channel) {
  return {start_s, duration_s.value_or(-1.0), channel.value_or(-1)};
}

// The views of Python buffers that a batch reads, held until it is done.
struct Requests {
  std::vector<clsp::LoadRequest> items;
  std::vector<py::buffer_info> held;
};

Requests parse_requests(const py::list& sources) {
  Requests requests;
  for (const py::handle& item : sources) {
    const auto fields = item.cast<py::tuple>();
    if (fields.size() != 4)
      throw py::value_error("a source is (data, start_s, duration_s, channel)");
    clsp::LoadRequest request;
    request.part = parse_part(fields[1].cast<double>(), fields[2].cast<std::optional<double>>(),
                              fields[3].cast<std::optional<int>>());
    if (py::isinstance<py::bytes>(fields[0]) || !py::isinstance<py::str>(fields[0])) {
      requests.held.push_back(fields[0].cast<py::buffer>().request());
      const py::buffer_info& info = requests.held.back();
      if (info.ndim > 1 || (info.ndim == 1 && info.strides[0] != info.itemsize)) {
        throw py::value_error("bytes must be contiguous");
      }
      request.bytes = {static_cast<const std::uint8_t*>(info.ptr),
                       static_cast<std::size_t>(info.size * info.itemsize)};
    } else {
      // The same bytes as the file system has, whatever the locale.
      const auto name =
          py::reinterpret_steal<py::bytes>(PyUnicode_EncodeFSDefault(fields[0].ptr()));
      if (!name) throw py::error_already_set();
      request.path = name.cast<std::string>();
      if (request.path.empty()) throw py::value_error("a path must not be empty");
    }
    requests.items.push_back(std::move(request));
  }
  return requests;
}

py::list load_batch(const py::list& sources, const clsp::LoadPolicy& policy, int num_threads,
                    const std::string& isa_name) {
  const clsp::Isa isa = parse_isa(isa_name);
  const Requests requests = parse_requests(sources);
  std::vector<clsp::Loaded> loaded;
  {
    const py::gil_scoped_release release;
    loaded = clsp::load_batch(requests.items, policy, num_threads, isa);
  }
  py::list out;
  for (clsp::Loaded& item : loaded) out.append(to_object(std::move(item)));
  return out;
}

py::object finish(const py::object& waveform, int sample_rate_hz, const clsp::LoadPolicy& policy) {
  const FloatArray array = check_waveform(waveform);
  clsp::Loaded loaded;
  {
    const py::gil_scoped_release release;
    loaded = clsp::finish(view(array), sample_rate_hz, policy, clsp::best_isa());
  }
  return to_object(std::move(loaded));
}

py::tuple select_section(int channels, int sample_rate_hz, std::uint64_t frames, double start_s,
                         std::optional<double> duration_s, std::optional<int> channel,
                         const clsp::LoadPolicy& policy) {
  try {
    const clsp::Section section = clsp::select_section(
        {channels, sample_rate_hz, frames}, parse_part(start_s, duration_s, channel), policy);
    return py::make_tuple(section.first, section.count);
  } catch (const clsp::AudioFailure& failure) {
    return py::make_tuple(failure.reason(), failure.what());
  }
}

py::list resample_batch(const py::list& waveforms, int from_hz, int to_hz, int num_threads,
                        const std::string& isa_name) {
  const clsp::Isa isa = parse_isa(isa_name);
  std::vector<FloatArray> held;
  for (const py::handle& item : waveforms) held.push_back(check_waveform(item));
  std::vector<clsp::Samples> out(held.size());
  {
    std::vector<clsp::Span<const float>> in;
    for (const FloatArray& array : held) in.push_back(view(array));
    const py::gil_scoped_release release;
    const auto plan = clsp::resample_plan(from_hz, to_hz);
    clsp::for_each(in.size(), num_threads, [&](std::size_t i) {
      out[i] = clsp::Samples(clsp::resampled_size(in[i].size(), from_hz, to_hz));
      clsp::resample(*plan, in[i], out[i].span(), isa);
    });
  }
  py::list arrays;
  for (clsp::Samples& samples : out) arrays.append(to_array(std::move(samples)));
  return arrays;
}

void fbank_batch(const py::list& waveforms, const py::array& out, std::size_t padded_size,
                 int num_threads, const std::string& isa_name) {
  const clsp::Isa isa = parse_isa(isa_name);
  if (!FloatArray::check_(out) || !out.writeable() || out.ndim() != 3 ||
      out.shape(0) != static_cast<py::ssize_t>(waveforms.size()) || out.shape(2) != clsp::kBins) {
    throw py::value_error("out must be a writable float32 array (len(waveforms), rows, 128)");
  }
  const auto rows = static_cast<std::size_t>(out.shape(1));
  std::vector<FloatArray> held;
  std::vector<clsp::Clip> clips;
  for (const py::handle& item : waveforms) {
    held.push_back(check_waveform(item));
    const clsp::Span<const float> samples = view(held.back());
    if (clsp::frame_count(samples.size()) > rows) throw py::value_error("out has too few rows");
    clips.push_back({samples, std::max(samples.size(), padded_size)});
  }
  auto* const begin = static_cast<float*>(py::array(out).mutable_data());
  const py::gil_scoped_release release;
  clsp::fbank_batch(clips, begin, rows, num_threads, isa);
}

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

template <class T>
clsp::Span<T> parse_vector(const py::array& array, std::size_t size, const char* name) {
  using Array = py::array_t<std::remove_const_t<T>, py::array::c_style>;
  if (!Array::check_(array) || static_cast<std::size_t>(array.size()) != size ||
      (!std::is_const_v<T> && !array.writeable())) {
    throw py::value_error(std::string(name) + " has the wrong dtype, layout or size");
  }
  return {static_cast<T*>(const_cast<void*>(array.data())), size};
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

FloatArray mel_matrix() {
  FloatArray matrix({clsp::FftPlan::kComplex + 1, clsp::kBins});
  clsp::mel_matrix(matrix.mutable_data());
  return matrix;
}

FloatArray povey_window() {
  return FloatArray({static_cast<py::ssize_t>(clsp::kWindow)}, clsp::povey_window());
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  using py::arg;
  m.attr("__version__") = CLSP_VERSION;
  clsp::fft_plan();  // now, so that no fork() meets it half made

  py::class_<clsp::LoadPolicy>(m, "LoadPolicy")
      .def(py::init([](int sample_rate_hz, double min_s, double max_s, double slack_s,
                       int min_rate_hz, int max_rate_hz, int max_channels, float max_amplitude) {
             return clsp::LoadPolicy{sample_rate_hz, min_s,       max_s,        slack_s,
                                     min_rate_hz,    max_rate_hz, max_channels, max_amplitude};
           }),
           py::kw_only(), arg("sample_rate_hz"), arg("min_s"), arg("max_s"), arg("slack_s"),
           arg("min_rate_hz"), arg("max_rate_hz"), arg("max_channels"), arg("max_amplitude"));

  m.def("load_batch", &load_batch, arg("sources"), py::kw_only(), arg("policy"), arg("num_threads"),
        arg("isa") = "auto");
  m.def("finish", &finish, arg("waveform"), py::kw_only(), arg("sample_rate_hz"), arg("policy"));
  m.def("select_section", &select_section, arg("channels"), arg("sample_rate_hz"), arg("frames"),
        arg("start_s"), arg("duration_s"), arg("channel"), arg("policy"));
  m.def("resample_batch", &resample_batch, arg("waveforms"), py::kw_only(), arg("from_hz"),
        arg("to_hz"), arg("num_threads") = 1, arg("isa") = "auto");
  m.def("fbank_batch", &fbank_batch, arg("waveforms"), arg("out"), py::kw_only(),
        arg("padded_size") = 0, arg("num_threads") = 1, arg("isa") = "auto");
  m.def("rank_targets", &rank_targets, arg("audio").noconvert(), arg("text").noconvert(),
        arg("owner"), py::kw_only(), arg("num_threads"), arg("isa") = "auto");
  m.def("count_ahead", &count_ahead, arg("audio").noconvert(), arg("text").noconvert(),
        py::kw_only(), arg("first_text"), arg("audio_targets"), arg("text_targets"),
        arg("audio_ahead"), arg("text_ahead"), arg("num_threads"), arg("isa") = "auto");
  m.def("update_best", &update_best, arg("queries").noconvert(), arg("rows").noconvert(),
        py::kw_only(), arg("first_row"), arg("scores"), arg("index"), arg("num_threads"),
        arg("isa") = "auto");
  m.def("resampled_size", &clsp::resampled_size, arg("samples"), arg("from_hz"), arg("to_hz"));
  m.def("frame_count", &clsp::frame_count, arg("samples"));
  m.def("mel_matrix", &mel_matrix);
  m.def("povey_window", &povey_window);
  m.def("instruction_sets", &instruction_sets);
#ifdef CLSP_PLANTED_BUGS
  m.def("planted_bug", &clsp::planted_bug, arg("kind"), py::call_guard<py::gil_scoped_release>());
#endif
}
