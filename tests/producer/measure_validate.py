"""How fast short lines validate and plan, and how much memory that takes above the imports.

python measure_validate.py ROWS FOLDER prints one JSON object. It is a program because the memory is the process's peak.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loramill.producer.plan import plan
from loramill.producer.reader import open_input
from loramill.producer.validate import validate
from loramill.producer.waves import Limits as Slots
from loramill.producer.waves import MixFacts
from loramill.schemas.names import Named, Names
from loramill.schemas.prompt import Limits, Prompter


def byte_tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(rows: int, folder: str) -> None:
    path = Path(folder) / "rows.jsonl"
    with path.open("w") as file:
        for row in range(rows):
            line = {"id": f"row-{row}", "adapter": f"a{row % 16}", "prompt": "reverse: hello", "max_tokens": 16}
            file.write(json.dumps(line) + "\n")
    prompter = Prompter(byte_tokenizer(), Limits(max_model_len=2048, vocab_size=256))
    before, began = peak_mb(), time.perf_counter()
    names = Names("tiny", {f"a{number}": Named(f"{number}") for number in range(16)})
    with open_input(str(path), folder) as source:
        index = validate(source, prompter, names=names, max_mix=8)
        facts = [MixFacts((number,), 8) for number in range(len(index.mixes))]
        order = plan(
            index.mix, index.prompt_tokens, index.max_tokens, facts, Slots(8, 256, 8192), prompt_hash=index.prompt_hash
        ).rows
    seconds = time.perf_counter() - began
    print(json.dumps({"rows": len(order), "rows_per_s": rows / seconds, "growth_mb": peak_mb() - before}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
