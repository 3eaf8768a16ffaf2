"""What a person types as a prompt: which words the model knows, and what is said of the others.

Public: check_prompt.
"""
from __future__ import annotations

from parts.errors import UserError


def check_prompt(prompt: str, words, run: str) -> list[str]:
    """Notes about a prompt, a line each; UserError where no word of it is known. words: text encoder of the
    run."""
    unknown = words.unknown(prompt)
    if all(word in unknown for word in words.split(prompt)):
        raise UserError(f"--prompt {prompt!r}: this model knows none of these words; see: "
                        f"python evaluate.py sounds {run}")
    notes = []
    for word, near in unknown.items():
        suggestion = f" (did you mean {' or '.join(near)}?)" if near else ""
        notes.append(f"note: unknown word {word!r} is left out{suggestion}")
    return notes
