#include <optional>

#include "batch.h"
#include "bind.h"
#include "fft.h"
#include "resample.h"

namespace clsp_python {
namespace {

// Makes a numpy array that owns the samples, without a copy.
FloatArray to_array(clsp::Samples samples) {
  auto owner = std::make_unique<clsp::Samples>(std::move(samples));
  const float* data = owner->data();
  const auto size = static_cast<py::ssize_t>(owner->size());
  const py::capsule capsule(owner.release(),
                            [](void* p) { delete static_cast<clsp::Samples*>(p); });
  return FloatArray({size}, data, capsule);
}

// Returns a float32 array, or (reason, message) if loading failed.
py::object to_object(clsp::Loaded loaded) {
  if (loaded.reason.empty()) return to_array(std::move(loaded.samples));
  return py::make_tuple(loaded.reason, loaded.message);
}

clsp::Part parse_part(double start_s, std::optional<double> duration_s,
                      std::optional<int> channel) {
  return {start_s, duration_s.value_or(-1.0), channel.value_or(-1)};
}

// The requests read from `buffers`, which keeps the Python objects alive.
struct Requests {
  std::vector<clsp::LoadRequest> items;
  std::vector<py::buffer_info> buffers;
};

// Sets the path or the bytes of a request. `data` is a path, or a buffer, which is added to
// `buffers`.
void set_data(clsp::LoadRequest* request, const py::object& data,
              std::vector<py::buffer_info>* buffers) {
  if (py::isinstance<py::bytes>(data) || !py::isinstance<py::str>(data)) {
    buffers->push_back(data.cast<py::buffer>().request());
    const py::buffer_info& info = buffers->back();
    if (info.ndim > 1 || (info.ndim == 1 && info.strides[0] != info.itemsize)) {
      throw py::value_error("bytes must be contiguous");
    }
    request->bytes = {static_cast<const std::uint8_t*>(info.ptr),
                      static_cast<std::size_t>(info.size * info.itemsize)};
  } else {
    // The encoding of Python's own file functions, which need not be UTF-8.
    const auto name = py::reinterpret_steal<py::bytes>(PyUnicode_EncodeFSDefault(data.ptr()));
    if (!name) throw py::error_already_set();
    request->path = name.cast<std::string>();
    if (request->path.empty()) throw py::value_error("a path must not be empty");
  }
}

Requests parse_requests(const py::list& sources) {
  Requests requests;
  for (const py::handle& item : sources) {
    const auto fields = item.cast<py::tuple>();
    if (fields.size() != 4)
      throw py::value_error("a source is (data, start_s, duration_s, channel)");
    clsp::LoadRequest request;
    request.part = parse_part(fields[1].cast<double>(), fields[2].cast<std::optional<double>>(),
                              fields[3].cast<std::optional<int>>());
    set_data(&request, fields[0], &requests.buffers);
    requests.items.push_back(std::move(request));
  }
  return requests;
}

py::list load_batch(const py::list& sources, const clsp::LoadPolicy& policy, int num_threads,
                    const std::string& isa_name) {
  const clsp::Isa isa = clsp::parse_isa(isa_name);
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

// Returns (offset, channels, rate, frames), where frames is None if the header does not state them;
// (offset,) if another decoder has to read the recording; or (reason, message) on failure.
py::tuple probe(const py::object& source) {
  clsp::LoadRequest request;
  std::vector<py::buffer_info> buffers;
  set_data(&request, source, &buffers);
  try {
    const clsp::Probed probed = [&] {
      const py::gil_scoped_release release;
      return clsp::probe(request);
    }();
    if (!probed.header) return py::make_tuple(probed.offset);
    const clsp::Header& header = *probed.header;
    const auto frames =
        probed.frames_known ? std::optional<std::uint64_t>(header.frames) : std::nullopt;
    return py::make_tuple(probed.offset, header.channels, header.sample_rate_hz, frames);
  } catch (const clsp::AudioFailure& failure) {
    return py::make_tuple(failure.reason(), failure.what());
  }
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
  const clsp::Isa isa = clsp::parse_isa(isa_name);
  std::vector<FloatArray> inputs;
  std::vector<clsp::Span<const float>> views;
  for (const py::handle& item : waveforms) {
    inputs.push_back(check_waveform(item));
    views.push_back(view(inputs.back()));
  }
  std::vector<clsp::Samples> resampled;
  {
    const py::gil_scoped_release release;
    resampled = clsp::resample_batch(views, from_hz, to_hz, num_threads, isa);
  }
  py::list arrays;
  for (clsp::Samples& samples : resampled) arrays.append(to_array(std::move(samples)));
  return arrays;
}

void fbank_batch(const py::list& waveforms, const py::array& out, std::size_t padded_size,
                 int num_threads, const std::string& isa_name) {
  const clsp::Isa isa = clsp::parse_isa(isa_name);
  if (!FloatArray::check_(out) || !out.writeable() || out.ndim() != 3 ||
      out.shape(0) != static_cast<py::ssize_t>(waveforms.size()) || out.shape(2) != clsp::kBins) {
    throw py::value_error("out must be a writable float32 array (len(waveforms), rows, 128)");
  }
  const auto rows = static_cast<std::size_t>(out.shape(1));
  std::vector<FloatArray> inputs;
  std::vector<clsp::Clip> clips;
  for (const py::handle& item : waveforms) {
    inputs.push_back(check_waveform(item));
    const clsp::Span<const float> samples = view(inputs.back());
    if (clsp::frame_count(samples.size()) > rows) throw py::value_error("out has too few rows");
    clips.push_back({samples, std::max(samples.size(), padded_size)});
  }
  auto* const begin = static_cast<float*>(py::array(out).mutable_data());
  const py::gil_scoped_release release;
  clsp::fbank_batch(clips, begin, rows, num_threads, isa);
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

void bind_audio(py::module_& m) {
  using py::arg;
  clsp::fft_plan();  // at import, because a process forked during its computation would hang

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
  m.def("probe", &probe, arg("source"));
  m.def("finish", &finish, arg("waveform"), py::kw_only(), arg("sample_rate_hz"), arg("policy"));
  m.def("select_section", &select_section, arg("channels"), arg("sample_rate_hz"), arg("frames"),
        arg("start_s"), arg("duration_s"), arg("channel"), arg("policy"));
  m.def("resample_batch", &resample_batch, arg("waveforms"), py::kw_only(), arg("from_hz"),
        arg("to_hz"), arg("num_threads") = 1, arg("isa") = "auto");
  m.def("fbank_batch", &fbank_batch, arg("waveforms"), arg("out"), py::kw_only(),
        arg("padded_size") = 0, arg("num_threads") = 1, arg("isa") = "auto");
  m.def("resampled_size", &clsp::resampled_size, arg("samples"), arg("from_hz"), arg("to_hz"));
  m.def("frame_count", &clsp::frame_count, arg("samples"));
  m.def("mel_matrix", &mel_matrix);
  m.def("povey_window", &povey_window);
}

}  // namespace clsp_python
