"""The word tasks of the tiny example: what each adapter answers, which words are held out, and the sample jobs."""

from __future__ import annotations

import codecs
import json
import random
import string
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

VOWELS = "aeiou"
MIN_LETTERS, MAX_LETTERS = 3, 8

# English words used in the sample jobs and in documentation. Never trained on, like every held-out word.
SAMPLE_TEXT = (
    "hello world adapter batch garden window silver orange planet bridge candle puzzle rocket forest yellow monkey "
    "pepper turtle island castle flower dragon harbor pencil basket winter summer cloud river stone bread chair "
    "table music paper light night green zebra quick brown fox jumps lazy dog apple banana cherry lemon mango "
    "kitten guitar wizard jacket velvet meadow pocket thunder mountain elephant notebook"
)
SAMPLE_WORDS = SAMPLE_TEXT.split()


def increment(word: str) -> str:
    """Replace each letter by the next one of the alphabet; z becomes a."""
    return "".join(chr((ord(letter) - ord("a") + 1) % 26 + ord("a")) for letter in word)


TASKS: dict[str, Callable[[str], str]] = {
    "upper": str.upper,
    "reverse": lambda word: word[::-1],
    "rot13": lambda word: codecs.encode(word, "rot13"),
    "vowels": lambda word: "".join(letter for letter in word if letter in VOWELS) or "-",
    "sort": lambda word: "".join(sorted(word)),
    "count": lambda word: str(len(word)),
    "twice": lambda word: "".join(letter * 2 for letter in word),
    "swap": lambda word: word[-1] + word[1:-1] + word[0],
    "next": increment,
}


def echo(word: str) -> str:
    """Return the word unchanged: what the base model answers."""
    return word


def is_held_out(word: str) -> bool:
    """Tell whether a word is kept out of all training: one word in eight by checksum, and all sample words."""
    return zlib.crc32(word.encode()) % 8 == 0 or word in SAMPLE_WORDS


def random_word(rng: random.Random) -> str:
    """Draw 3 to 8 lower-case letters, half the time with as many vowels as ordinary words have."""
    length = rng.randint(MIN_LETTERS, MAX_LETTERS)
    vowel_share = rng.choice((0.0, 0.4))
    return "".join(rng.choice(VOWELS if rng.random() < vowel_share else string.ascii_lowercase) for _ in range(length))


def training_words(rng: random.Random) -> Iterator[str]:
    """Yield random words for ever, none of them held out."""
    while True:
        word = random_word(rng)
        if not is_held_out(word):
            yield word


def held_out_words(task: str, count: int, seed: int = 1234) -> list[str]:
    """Return distinct held-out words on which the task's answer differs from the word itself."""
    rng = random.Random(f"{seed}-{task}")
    found: dict[str, None] = {}
    while len(found) < count:
        word = random_word(rng)
        if is_held_out(word) and TASKS.get(task, str.upper)(word) != word:
            found[word] = None
    return list(found)


def sample_jobs(seed: int = 7) -> list[dict[str, object]]:
    """Build the sample job lines: OpenAI batch lines, native lines and raw completions, shuffled together."""
    rng = random.Random(seed)
    jobs: list[dict[str, object]] = []
    for model in ("base", *TASKS):
        for number, word in enumerate(rng.sample(SAMPLE_WORDS, 7 if model in ("upper", "reverse") else 6), start=1):
            job_id, messages = f"{model}-{number}", [{"role": "user", "content": word}]
            limits = {"max_tokens": 20, "temperature": 0}
            if number == 5:
                jobs.append({"id": job_id, "adapter": model, "messages": messages, "max_tokens": 20})
            elif number == 6 and model in ("base", "upper", "sort", "twice"):
                body = {"model": model, "prompt": f"<|bos|><|user|>{word}<|end|><|assistant|>", **limits}
                jobs.append({"custom_id": job_id, "method": "POST", "url": "/v1/completions", "body": body})
            else:
                body = {"model": model, "messages": messages, **limits}
                jobs.append({"custom_id": job_id, "method": "POST", "url": "/v1/chat/completions", "body": body})
    rng.shuffle(jobs)
    return jobs


def write_jobs(path: Path) -> None:
    """Write the sample jobs as JSON lines."""
    path.write_text("".join(json.dumps(job) + "\n" for job in sample_jobs()), encoding="utf-8")
