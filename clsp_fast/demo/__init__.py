"""The demo corpus: synthetic speech, made here, whose style was asked for and then measured.

A `pip install` cannot bring a recorded corpus, so the default training data is synthetic. Up to three
text-to-speech packages speak (`engines`), each with many voices. Pitch, speed, intonation, loudness and voice
quality are set, measured on the result (`clips`) and put into words (`text`). A label is what was measured: a
clip between two classes has no label for that attribute, and no caption mentions the attribute. No caption
mentions emotions, laughter, children or old voices, since no engine produces them.

A finished folder (`corpus`) holds `train.jsonl`, `validation.jsonl`, `test.jsonl`, `transfer.jsonl` (an
engine that speaks in no other split), `audio/<split>/<id>.wav` (16 kHz, 16 bit, mono) and `corpus.json`,
which is written last. A line of a manifest holds id, audio, duration_s, speaker, gender, global_captions,
finegrained_captions, tags and claims; `claims["global"][i]` belongs to `global_captions[i]` and
`claims["fine"][i]` to `finegrained_captions[i]`.

The corpus depends only on the configuration (without `workers`) and on the versions of the engines: a
separate process, with a separate seed, makes each shard.
"""

from clsp_fast.demo.corpus import DemoConfig, DemoCorpus, describe, prepare
from clsp_fast.demo.text import prompts, satisfies

__all__ = ["DemoConfig", "DemoCorpus", "describe", "prepare", "prompts", "satisfies"]
