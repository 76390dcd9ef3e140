#include <cmath>
#include <cstring>

#include "bind.h"
#include "voice.h"

namespace clsp_python {
namespace {

constexpr const char* kPartFields[] = {
    "start_s", "duration_s", "level_db", "voiced",  "clear_voice",   "f0_hz",
    "f0_sd",   "f0_range",   "f0_slope", "nuclei",  "voiced_nuclei", "pauses",
    "pause_s", "hnr_db",     "creak",    "tilt_db",
};
static_assert(sizeof(clsp::VoicePart) == std::size(kPartFields) * sizeof(double));

// (recordings, values): the parts, then formants, bandwidth and SNR.
Array<double> measure_voices(const py::list& waveforms, int num_threads,
                             const std::string& isa_name) {
  const clsp::Isa isa = clsp::parse_isa(isa_name);
  std::vector<FloatArray> inputs;
  std::vector<clsp::Span<const float>> views;
  for (const py::handle& item : waveforms) {
    inputs.push_back(check_waveform(item));
    views.push_back(view(inputs.back()));
  }
  std::vector<clsp::Voice> voices;
  {
    const py::gil_scoped_release release;
    voices = clsp::measure_voices(views, num_threads, isa);
  }
  Array<double> out({voices.size(), clsp::kVoiceValues});
  if (!voices.empty()) std::memcpy(out.mutable_data(), voices.data(), out.nbytes());
  return out;
}

py::tuple track_voice(const py::object& waveform, const std::string& isa_name) {
  const clsp::Isa isa = clsp::parse_isa(isa_name);
  const FloatArray array = check_waveform(waveform);
  const clsp::VoiceTrack track = [&] {
    const py::gil_scoped_release release;
    return clsp::track_voice(view(array), isa);
  }();
  const auto to_array = [](const std::vector<double>& values) {
    return Array<double>(static_cast<py::ssize_t>(values.size()), values.data());
  };
  return py::make_tuple(to_array(track.f0_hz), to_array(track.strength), to_array(track.level_db));
}

}  // namespace

void bind_voice(py::module_& m) {
  using py::arg;
  clsp::make_voice_tables();  // at import, because a process forked during it would hang
  py::tuple fields(std::size(kPartFields));
  for (std::size_t i = 0; i < std::size(kPartFields); ++i) fields[i] = kPartFields[i];
  m.attr("VOICE_PART_FIELDS") = fields;
  m.def("measure_voices", &measure_voices, arg("waveforms"), py::kw_only(), arg("num_threads"),
        arg("isa") = "auto");
  m.def("track_voice", &track_voice, arg("waveform"), py::kw_only(), arg("isa") = "auto");
}

}  // namespace clsp_python
