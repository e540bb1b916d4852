"""Multiple-choice questions made open-ended, choices and instructions stripped (paper, §4.3): functions of text."""

from __future__ import annotations

import re

_LETTERED = re.compile(r"\(?\b([A-Za-z])\s*[).:]\s*(.+?)(?=(?:[\s,;]*\(?\b[A-Za-z]\s*[).:]\s)|$)", re.DOTALL)
# Only whole sentences: "What did he choose as his word?" is a question and stays one.
_INSTRUCTION = re.compile(
    r"(?:(?<=[.?!:\n])|^)\s*(?:hint:\s*)?(?:please\s+)?(?:answer|respond|reply|choose|select|pick)\b[^.?!\n]*"
    r"(?:letter|option|choice|choices|word|phrase|one of|following|yes or no|directly)[^.?!\n]*[.?!]?",
    re.IGNORECASE,
)
_OPTIONS = re.compile(r"\n?\s*(?:options|choices)\s*:", re.IGNORECASE)


def lettered(text: str) -> dict[str, str]:
    """``"(a) Open (b) Closed"`` or ``"A: 0, B: 1"`` as ``{"a": "Open", "b": "Closed"}``, letters in lower case."""
    found: dict[str, str] = {}
    for letter, content in _LETTERED.findall(text.strip()):
        expected = chr(ord("a") + len(found))
        if letter.lower() == expected:
            found[expected] = content.strip().rstrip(",;").strip()
    return found


def inline_choices(question: str) -> tuple[str, dict[str, str]]:
    """A question whose text ends in ``Options: A: …, B: …`` as the question alone and its choices by letter."""
    head, *tail = _OPTIONS.split(question, maxsplit=1)
    return head.strip(), lettered(tail[0]) if tail else {}


def strip_choices(question: str) -> str:
    """The question without a list of choices at its end."""
    head, _ = inline_choices(question)
    lines = head.splitlines()
    while lines and re.match(r"\s*\(?[A-Za-z]\s*[).:]\s*\S", lines[-1]):
        lines.pop()
    return "\n".join(lines).strip() or question.strip()


def strip_instructions(question: str) -> str:
    """The question without sentences that say how to answer ("Answer with the option's letter directly.")."""
    kept = _INSTRUCTION.sub("", question)
    return re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", "\n", kept)).strip() or question.strip()


def true_choice(answer: str, choices: dict[str, str]) -> str:
    """The text of the true choice: ``"(b)"``, ``"B"`` or ``"B. Closed"`` with its choices is ``"Closed"``; a text that
    is a choice is that one."""
    if answer.strip() in choices.values():
        return answer.strip()
    found = re.fullmatch(r"\s*(?:\(([A-Za-z])\)|([A-Za-z])[.:)]|([A-Za-z])\s*$)\s*.*", answer, re.DOTALL)
    letter = next((part for part in found.groups() if part), "").lower() if found else ""
    return choices.get(letter, answer.strip())
