"""What a reply to a question says: our reader, and those of two programs that evaluate many benchmarks.

Ours reads what stands between answer tags, and takes a letter only where one is plainly given. The others are
pure functions that say what the published parsers say, with their quirks. The official parser of a benchmark
stands in that benchmark's file. Tests hold all of them against one table of replies.
"""
import re

# Options beyond it are no letters of any benchmark.
LETTERS = "ABCDEFGH"


# ---- tags ------------------------------------------------------------------------------------------
def last_answer(text: str) -> str:
    """What stands in the last complete pair of answer tags, stripped; "" without one."""
    before, closed, _ = text.rpartition("</answer>")
    _, opened, answer = before.rpartition("<answer>")
    return answer.strip() if opened and closed else ""


def official_text(text: str) -> str:
    """What official parsers are given: the answer, or without answer tags all that follows the reasoning.

    They were written for replies without reasoning. All are wrong on it.
    """
    if "<answer>" in text and "</answer>" in text:
        return last_answer(text)
    return text.rpartition("</think>")[2].strip()


# ---- ours ------------------------------------------------------------------------------------------
NAMED = re.compile(
    r"\b(?:answer|option|choice)\s*(?:is\b|:)\s*\(?([A-Z])(?:\)|\s*(?:[.,;:\n]|$))", re.IGNORECASE)


def read_letter(answer: str, options: list[str]) -> str:
    """The letter that an answer gives, or "" where it gives none, or more than one.

    options: texts without letters. An option's text as the whole answer means its letter.
    """
    letters = LETTERS[:len(options)]
    text = answer.replace("*", "").strip(" \t\r\n()[]{}.:")
    leading = re.match(r"([A-Za-z])(?:[.):]|$)", text)
    if leading:
        letter = leading[1].upper()
        return letter if letter in letters else ""
    named = {letter.upper() for letter in NAMED.findall(text)}
    if named:
        return min(named) if len(named) == 1 and named <= set(letters) else ""
    same = [letter for letter, option in zip(letters, options) if words(option) == words(text)]
    return same[0] if len(same) == 1 and words(text) else ""


def words(text: str) -> str:
    """A text without case, punctuation and the width of its spaces."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def read_yes_no(answer: str) -> str:
    """"Yes" or "No", the first such word of an answer; "" without one."""
    match = re.search(r"\b(?:yes|no)\b", answer, re.IGNORECASE)
    return match[0].capitalize() if match else ""


# ---- lmms-eval -------------------------------------------------------------------------------------
# Marks at the end of a reply and at its start that are cut off, one kind after the other.
MARKS = (",", ".", "!", "?", ";", ":", "'", '"')
PHRASES = ("answer is", "option is", "choice is", "i choose", "i select", "i pick")


def strip_marks(reply: str) -> str:
    text = reply.strip()
    for mark in MARKS:
        text = text.strip(mark)
    return text


def lmms_letter(reply: str, letters: str = "ABCD") -> str:
    """lmms-eval's shared extractor (early 2026): the best form of a letter, and of that form the last place.

    Quirk: a letter at the end beats the one that "the answer is" names.
    """
    text = strip_marks(reply)
    if not text:
        return ""
    found = [lmms_form(f" {text} ", letter) for letter in letters]
    best = max(range(len(letters)), key=found.__getitem__)
    return letters[best] if found[best] > (-1, -1) else ""


def lmms_form(padded, letter) -> tuple:
    """(rank, place) of the best form of a letter in a reply between two spaces; (-1, -1): nowhere."""
    text = padded.strip()
    if text.startswith(letter) and not text[1:2].isalpha():
        return 10, 0
    if text.endswith(letter) and not text[-2].isalpha():
        return 9, len(padded) - 1
    after = []
    for phrase in PHRASES:
        start = padded.lower().find(phrase)
        if start >= 0:
            after.append(padded.find(letter, start + len(phrase)))
    if after and max(after) >= 0:
        return 7, max(after)
    for rank, form in ((6, f"({letter})"), (5, f"{letter}."), (4, f"{letter}:"), (3, f"{letter})"),
                       (2, f"{letter} "), (0, letter)):
        if form in padded:
            return rank, padded.rfind(form)
    return -1, -1


def lmms_accepts(reply: str, letter: str) -> bool:
    """lmms-eval on MVBench: a letter with a point at the start, else the first of A to E that is a word."""
    leading = re.match(r"\s*([A-E])\.\s*\S", reply, re.IGNORECASE)
    found = leading or re.search(r"\b([A-E])\b", reply, re.IGNORECASE)
    return bool(found) and found[1].upper() == letter


# ---- VLMEvalKit ------------------------------------------------------------------------------------
def vlmeval_letter(reply: str, options: list[str]) -> str:
    """VLMEvalKit without a judge: the one letter that is a word among the last four, else the letter that
    "answer is" names, else the one option whose text is in the reply.

    Quirk: a reply with several such letters is not searched for texts.
    """
    letters = LETTERS[:len(options)]
    split = re.sub(r"[.()\[\],:;!*#{}]", " ", reply).split()
    alone = [letter for letter in letters if letter in split]
    if len(alone) == 1 and split.index(alone[0]) > len(split) - 5:
        return alone[0]
    named = re.search(r"answer\s+is\s+\**([ABCD])", reply, re.IGNORECASE)
    if named and named[1].upper() in letters:
        return named[1].upper()
    if len(alone) > 1 or len(reply) > 2 * sum(map(len, options)):
        return ""
    inside = [letter for letter, option in zip(letters, options) if option.lower() in reply.lower()]
    return inside[0] if len(inside) == 1 else ""
