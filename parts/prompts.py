"""What a person types as a prompt: which caption the model is given, and what is said of the rest.

Idea.  A model knows the words of its training captions and no others. A prompt is met as far as these
go, word by word:

    known word         as it is                            rain
    another form       plural, -ing, -ed                   dogs barking -> dog bark
    a synonym          SoundWorld alone, SYNONYMS          puppy -> dog
    a compound         of known words, or of one sound     thunderstorm -> thunder
    part of a phrase   SoundWorld alone: it was only ever trained on the whole phrase, and makes next to
                       nothing by itself                   dog -> dog bark
    else               left out, with a note: near sounds of SoundWorld by meaning (THINGS), or for a
                       mistyped word the known word that is nearest by letters

It is refused where no word names a sound of SoundWorld; in other data, whose words may be any, where
none but stop words are known. A frozen pretrained text encoder reads everything: it refuses nothing.

Public: check_prompt.
"""
from __future__ import annotations

import difflib

from parts.errors import UserError
from parts.soundworld import NAMES, SOUNDS, noun_phrases

# Words of SoundWorld's noun phrases that alone name no sound: they describe, place or count one.
QUALIFIERS = set("""a of on car church police computer electric electrical person voice door wood running
    flying blowing falling howling wailing rumbling breaking sound note notes hit hits beats strokes
    shots noises string gun""".split())

STOP_WORDS = set("""a an and are as at be by can for from has have hear heard i in into is it its my of
    on or over some sound that the their then there this to two was we while with""".split())
NEGATIONS = ("no", "not", "without")
LONGEST_WORD = 30  # letters; longer ones are not searched for words inside

# A word of SoundWorld: what else is read as it. ASSUMED, as is THINGS.
SYNONYMS = {
    "a": "one", "then": "before", "while": "during whilst",
    "distant": "remote distance", "low": "bass", "high": "shrill",
    "rain": "drizzle downpour rainy", "thunder": "lightning storm stormy",
    "wind": "breeze gust gale windy",
    "dog": "puppy hound", "bark": "woof", "bird": "sparrow nightingale", "chirping": "tweet twitter",
    "engine": "truck lorry motorcycle motorbike", "siren": "ambulance", "phone": "cellphone ringtone",
    "bell": "doorbell gong chime", "guitar": "ukulele banjo strum", "drum": "percussion",
    "glass": "smash", "singing": "song choir singer", "laughter": "giggle chuckle",
    "baby": "infant toddler", "robot": "android", "honk": "toot",
}

# A family of SoundWorld: things that it holds no sound of, so that the nearest can be named.
THINGS = {
    "weather": "water sea ocean wave river stream waterfall beach hail snow fire forest nature",
    "animals": "animal cat meow cow horse sheep pig chicken duck frog wolf lion bee insect mosquito owl",
    "vehicles": "train tram plane airplane jet boat ship bus bicycle traffic vehicle street",
    "alarms": "clock timer alert warning",
    "instruments": "piano violin cello trumpet saxophone xylophone harp organ orchestra music melody "
                   "instrument whistle",
    "impacts": "footstep step walk foot clap applause gunshot explosion bang hammer crash",
    "electronics": "static radio television microphone headphone microwave keyboard typing machine",
    "voices": "man woman men women people child children kid boy girl crowd speech speak talk whisper "
              "scream shout cough sneeze cry",
}


# --- forms of words

def _forms(word: str) -> list[str]:
    """The word, then what it may be a plural, possessive, -ing or -ed form of: "humming" -> humming,
    humm, humme, hum. By spelling alone, so some are no words."""
    forms = [word, word.removesuffix("'s")]
    word = forms[1]
    if word.endswith("ies"):
        forms.append(word[:-3] + "y")
    elif word.endswith("s") and not word.endswith("ss"):
        forms.append(word[:-1])
        if word.endswith(("ses", "xes", "zes", "ches", "shes")):
            forms.append(word[:-2])
    for suffix in ("ing", "ed"):
        stem = word.removesuffix(suffix)
        if stem != word and any(c in "aeiouy" for c in stem):
            forms += [stem, stem + "e"]
            if stem[-2:-1] == stem[-1:]:
                forms.append(stem[:-1])
    return [form for form in forms if len(form) >= 3]


def _by_form(words) -> dict[str, str]:
    """{form: the shortest of `words` that has it}."""
    found = {}
    for word in sorted(words, key=len):
        for form in _forms(word):
            found.setdefault(form, word)
    return found


def _look_up(word: str, table: dict[str, str]) -> str | None:
    """The entry of a table for a word or the first of its forms that is there."""
    return next((table[form] for form in _forms(word) if form in table), None)


def _inverted(table: dict[str, str]) -> dict[str, str]:
    """{one: "many of them"} -> {each of the many: the one}."""
    return {word: one for one, many in table.items() for word in many.split()}


# --- reading a prompt

class _Reader:
    """Reads words typed by a person as words of a vocabulary. words: parts.text.Words; soundworld: was
    the model trained on SoundWorld alone?"""

    def __init__(self, words, soundworld: bool):
        self.ids = words.ids
        self.by_form = _by_form(words.words)
        self.soundworld = soundworld
        if soundworld:
            phrases = [phrase for sound in SOUNDS for phrase in (*sound.one, *sound.many)]
            phrases = [[word for word in words.split(phrase) if word != "a"] for phrase in phrases]
            self.phrases = [phrase for phrase in phrases if set(phrase) <= set(self.ids)]
            self.naming = {word for phrase in self.phrases for word in phrase} - QUALIFIERS
            self.synonyms = {word: one for word, one in _inverted(SYNONYMS).items() if one in self.ids}
            self.things = _inverted(THINGS)
        else:
            self.phrases = []
            self.naming = set(self.ids) - STOP_WORDS
            self.synonyms = {}
            self.things = {}

    def read(self, word: str) -> list[str]:
        """The known words that a typed word is read as; [] where it is left out."""
        if word in self.ids:
            return [word]
        found = _look_up(word, self.by_form) or _look_up(word, self.synonyms)
        if found:
            return [found]
        if word in STOP_WORDS or word in NEGATIONS or _look_up(word, self.things):
            return []
        return self._compound(word)

    def _compound(self, word: str) -> list[str]:
        """The parts of a compound, of three letters or more: both where both are known, in SoundWorld
        also the one that names a sound."""
        if len(word) > LONGEST_WORD:
            return []
        splits = [(word[:k], word[k:]) for k in range(3, len(word) - 2)]
        pairs = [[self._known_part(part) for part in parts] for parts in splits]
        both = [pair for pair in pairs if all(pair)]
        if both or not self.soundworld:
            return both[0] if both else []
        return [part for pair in pairs for part in pair if part in self.naming][:1]

    def _known_part(self, part: str) -> str | None:
        """The word that a part of a compound, or its singular, is."""
        return next((word for word in (part, part.removesuffix("s")) if word in self.ids), None)

    def complete(self, word: str, present: set[str]) -> list[str]:
        """A known word, or the phrase of SoundWorld that it is a part of, where the prompt has no such
        phrase. present: all known words of the prompt."""
        phrases = [phrase for phrase in self.phrases if word in phrase]
        if word not in self.naming or not phrases or any(set(phrase) <= present for phrase in phrases):
            return [word]
        return phrases[0]

    def suggest(self, word: str) -> str:
        """What may be asked for instead of a word, in brackets; "" where nothing is near."""
        if word in NEGATIONS:
            return " (nothing can be excluded)"
        family = _look_up(word, self.things)
        known = _look_up(word, self.by_form)
        if self.soundworld and (family or known in QUALIFIERS - STOP_WORDS):
            near = self._phrases(family, known)
            return f" (near: {', '.join(near)})" if near else ""
        if self.read(word) or word in STOP_WORDS or not 3 <= len(word) <= LONGEST_WORD:
            return ""
        # A mistyped word mostly begins as it should.
        alike = [known for known in self.ids if known[0] == word[0] and known not in STOP_WORDS]
        close = difflib.get_close_matches(word, alike, 1, 0.8)
        return f" (did you mean {close[0]!r}?)" if close else ""

    def _phrases(self, family: str | None, word: str | None) -> list[str]:
        """Noun phrases that are known: the first of each sound of a family, or all with a word."""
        near = []
        for sound in SOUNDS:
            if sound.family == family:
                near += noun_phrases(sound)[:1]
            elif family is None:
                near += [phrase for phrase in noun_phrases(sound) if word in phrase.split()]
        return [phrase for phrase in near if all(part in self.ids for part in phrase.split())]


def _quoted(text: str, longest: int = LONGEST_WORD) -> str:
    """What was typed, of which the beginning will do."""
    return repr(text if len(text) <= longest else f"{text[:longest]}...")


def _suggestions(words, reader: _Reader) -> dict[str, str]:
    """{what may be asked for instead, in brackets or "": the words for which it may}."""
    groups = {}
    for word in words:
        groups.setdefault(reader.suggest(word), []).append(_quoted(word))
    return {suggestion: ", ".join(quoted) for suggestion, quoted in groups.items()}


def _instead(typed, reader: _Reader) -> str:
    """What may be asked for instead of a refused prompt: what is near its words, or all there is."""
    groups = _suggestions(typed, reader)
    near = [quoted + suggestion for suggestion, quoted in groups.items() if suggestion]
    if near:
        return "; ".join(near) + "; "
    sounds = [name for name in NAMES if name in reader.naming and reader.soundworld]
    return f"it knows {', '.join(sounds)}; " if sounds else ""


def check_prompt(prompt: str, words, run: str, soundworld: bool = False) -> tuple[str, list[str]]:
    """-> (the caption that the model is given, notes about it, a line each).

    words: text encoder of the run; soundworld: was it trained on SoundWorld alone? UserError, with what
    can be asked for, where no word names a sound (other data: where none but stop words are known)."""
    caption, notes = prompt, []
    if not getattr(words, "features", 0):                          # a vocabulary, no pretrained encoder
        caption, notes = _read_prompt(prompt, words, run, soundworld)
    beyond = words.beyond(caption)
    if beyond:
        notes.append(f"note: too long; its end is left out: {_quoted(beyond, 200)}")
    return caption, notes


def _read_prompt(prompt: str, words, run: str, soundworld: bool) -> tuple[str, list[str]]:
    """check_prompt for a vocabulary, but for the prompt's length."""
    reader = _Reader(words, soundworld)
    typed = words.split(prompt)
    read = {word: reader.read(word) for word in dict.fromkeys(typed)}
    present = {known for each in read.values() for known in each}
    if not present & reader.naming:
        what = "names a sound that" if soundworld else "but stop words is one that"
        raise UserError(f"--prompt {_quoted(prompt, 80)}: no word of it {what} this model knows; "
                        f"{_instead(read, reader)}all: python evaluate.py sounds {run}")

    notes = []
    for word, known in read.items():
        read[word] = [part for each in known for part in reader.complete(each, present)]
    changed = {word: known for word, known in read.items() if known and known != [word]}
    if changed:
        as_read = [f"{_quoted(word)} as {' '.join(known)!r}" for word, known in changed.items()]
        notes.append(f"note: read {', '.join(as_read)}")
    unknown = [word for word in read if not read[word]]
    if unknown:
        left_out = [quoted + suggestion for suggestion, quoted in _suggestions(unknown, reader).items()]
        notes.append(f"note: unknown words are left out: {'; '.join(left_out)}")
    return " ".join(known for word in typed for known in read[word]), notes
