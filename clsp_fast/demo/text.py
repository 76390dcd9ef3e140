"""The sentences that are spoken in the demo corpus."""

from __future__ import annotations

import re
from typing import Literal

import numpy as np

Split = Literal["train", "validation", "test"]

# Of every six phrases, the first belongs to the test split, the second to validation, the rest to training.
_PHRASES = {
    "subject": "the teacher|my younger brother|a tall stranger|the captain|our new neighbour"
    "|the girl next door|my cousin|the doctor|two small children|a famous painter|the gardener"
    "|his aunt|the bus driver|an old farmer|the baker|everyone here|a young soldier|the musicians",
    "action": "walked past|was waiting near|talked about|could not find|came back to|painted|opened|forgot"
    "|asked for|looked at|carried|bought|cleaned|lost|really liked|would remember|stood behind"
    "|sold",
    "object": "the empty station|a small red house|the market|the morning train|her heavy bag"
    "|the green bottle|a wooden box|the kitchen table|some fresh bread|the broken window"
    "|the long bridge|a cup of tea|the blue jacket|their garden|the last page|an apple tree"
    "|the winter coat|a silver coin",
    "event": "went home|is waiting|has arrived|will call us|came too late|smiled again|left early"
    "|was asleep|wants to help|can hear you|sat down|knows the way",
    "when": "after the rain|last Sunday|in the evening|before the holidays|on the way to town"
    "|at the same time|once more|during the long winter|early in the morning|for the second time"
    "|in the middle of June|as usual",
    "short": "come over here|open the door|leave it alone|the water is cold|we are too late"
    "|put it down there|call me later|ask him again|look at the sky|I am not sure"
    "|that was my seat|turn to the left|bring me the map|keep to the path|nobody knows"
    "|the bus has gone|stay in the car|it is your turn|she left at dawn|hold on to this"
    "|they sold the boat|wait for the bell|give me one more|dinner is ready|how far is it"
    "|who is to pay|the shop is closed|my phone is broken|did you hear that|let us go now"
    "|what a surprise|sing it again|the road was long|I found it here|so it begins"
    "|take the first one",
}
_PATTERNS = (
    "short",
    "subject event",
    "subject event when",
    "subject action object",
    "subject action object when",
)


def syllables(text: str) -> int:
    """Number of syllables of an English text: groups of vowel letters, without silent endings."""
    count = 0
    for word in re.findall(r"[a-z]+", text.lower()):
        groups = len(re.findall(r"[aeiouy]+", word))
        silent_e = word.endswith("e") and not word.endswith("le")
        silent_ed = word.endswith("ed") and word[-3:-2] not in ("t", "d", "i")
        count += max(1, groups - (groups > 1 and (silent_e or silent_ed)))
    return count


def sentences(split: Split) -> list[str]:
    """The sentences of a split, in a fixed order. No phrase occurs in two splits."""
    share = {"test": (0,), "validation": (1,), "train": (2, 3, 4, 5)}[split]
    phrases = {
        role: [phrase for i, phrase in enumerate(text.split("|")) if i % 6 in share]
        for role, text in _PHRASES.items()
    }
    rng = np.random.default_rng(len(split))
    distinct: dict[str, None] = {}
    for pattern in _PATTERNS:
        for _ in range(120):
            distinct[" ".join(str(rng.choice(phrases[role])) for role in pattern.split())] = None
    return list(distinct)
