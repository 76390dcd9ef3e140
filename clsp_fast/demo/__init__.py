"""The demo corpus: synthetic speech in many styles, with labels and captions.

A `pip install` cannot bring a recorded corpus, so the default training data is synthetic. Up to three
text-to-speech packages speak (`engines`), each with many voices. Pitch, speed, intonation and loudness are
set, measured on the result (`clips`) and put into words (`captioning.wording`). Their labels are those
measured. The labels of sex and voice quality are those requested. If a clip lies between two classes of an
attribute, it has no label for the attribute, and its captions do not mention it. No caption mentions
emotions, laughter, children or old voices, because no engine produces them.

A finished folder (`corpus`) holds `train.jsonl`, `validation.jsonl`, `test.jsonl`, `transfer.jsonl` (an
engine that speaks in no other split), `audio/<split>/<id>.wav` (16 kHz, 16 bit, mono) and `corpus.json`,
which is written last. A line of a manifest holds id, audio, duration_s, speaker, gender, global_captions,
finegrained_captions, tags and claims; `claims["global"][i]` belongs to `global_captions[i]` and
`claims["fine"][i]` to `finegrained_captions[i]`.

The corpus depends only on the configuration and on the versions of the engines. The number of `workers` does
not matter, because each shard is made by a separate process with a separate seed.
"""

from clsp_fast.captioning.wording import satisfies
from clsp_fast.demo.clips import prompts
from clsp_fast.demo.corpus import DemoConfig, DemoCorpus, describe, prepare

__all__ = ["DemoConfig", "DemoCorpus", "describe", "prepare", "prompts", "satisfies"]
