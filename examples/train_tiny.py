"""Train the tiny example: a one-million-parameter Llama that echoes words, and one LoRA adapter per word task.

The base is first trained on every task at once. The token at position 0 tells it which one: `<|bos|>` asks for a plain
echo, and a control token per task (used in training only) asks for that task. The control tokens are then cut out of
the model, so that the published base can only echo, while the machinery for the tasks is still in its weights. Each
adapter is trained, with peft, to bring one task back; that takes seconds instead of minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import time
import warnings
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny_tasks import TASKS, echo, held_out_words, training_words, write_jobs
from tiny_tokenizer import ASSISTANT, BOS, END, PAD, USER, VOCAB_SIZE, save_tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

CONTROL = {task: VOCAB_SIZE + index for index, task in enumerate(TASKS)}
HARDER = ("reverse", "reverse", "sort", "sort", "swap", "twice", "vowels", "vowels")  # drawn more often
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterRecipe:
    """How one adapter is shaped; the shapes differ on purpose, to exercise mixed batches."""

    rank: int
    alpha: int
    targets: tuple[str, ...]
    rslora: bool = False
    steps: int = 100


RECIPES = {
    "upper": AdapterRecipe(4, 8, ("q_proj", "v_proj")),
    "reverse": AdapterRecipe(16, 32, ATTENTION + MLP),
    "rot13": AdapterRecipe(8, 16, MLP),
    "vowels": AdapterRecipe(8, 8, ATTENTION + MLP, steps=200),
    "sort": AdapterRecipe(32, 16, ATTENTION, rslora=True, steps=300),
    "count": AdapterRecipe(4, 16, ("down_proj",)),
    "twice": AdapterRecipe(16, 16, ("q_proj", "v_proj", "up_proj", "down_proj"), steps=150),
    "swap": AdapterRecipe(32, 64, ("k_proj", "v_proj", "o_proj")),
    "next": AdapterRecipe(16, 8, ("o_proj", "gate_proj", "up_proj"), rslora=True),
}


def say(text: str) -> None:
    """Print a progress line to stderr."""
    print(text, file=sys.stderr, flush=True)


def make_batch(examples: list[tuple[int, str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn (first token, word, answer) triples into right-padded input ids and labels on the answer only."""
    rows = []
    for first, word, answer in examples:
        prompt = [first, USER, *word.encode(), END, ASSISTANT]
        rows.append((prompt, [*answer.encode(), END]))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), PAD)
    labels = torch.full((len(rows), width), -100)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels


def fit(model: PreTrainedModel, tasks: list[str], steps: int, batch: int, rate: float, rng: random.Random) -> None:
    """Train on random words; each of many tasks starts with its control token, echo or a lone task with <|bos|>."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(10, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
    )
    words = training_words(rng)
    model.train()
    for step in range(1, steps + 1):
        examples = []
        for word in islice(words, batch):
            task = rng.choice(tasks)
            first = CONTROL[task] if len(tasks) > 1 and task != "echo" else BOS
            examples.append((first, word, TASKS.get(task, echo)(word)))
        ids, labels = make_batch(examples)
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            say(f"  step {step}/{steps}  loss {loss.item():.4f}")


def train_base(seed: int, steps: int) -> LlamaForCausalLM:
    """Train the base on echo and all tasks, then cut the control tokens out of it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE + len(CONTROL),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=BOS,
        eos_token_id=END,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    fit(model, ["echo", *TASKS, *HARDER], steps, 128, 2.5e-3, random.Random(seed))
    model.resize_token_embeddings(VOCAB_SIZE)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=END, pad_token_id=PAD, do_sample=False)
    return model.eval()


def train_adapter(base_dir: Path, task: str, seed: int, out: Path) -> PreTrainedModel:
    """Train one adapter on the saved base and write it to `out` in PEFT format."""
    torch.manual_seed(seed)
    recipe = RECIPES[task]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        use_rslora=recipe.rslora,
        lora_dropout=0.0,
    )
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base_dir), config)
    fit(model, [task], recipe.steps, 64, 5e-3, random.Random(f"{seed}-{task}"))
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    path = out / "adapter_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved |= {"base_model_name_or_path": "tiny", "target_modules": sorted(recipe.targets)}
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return model.eval()


@torch.no_grad()
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, words: list[str]) -> list[str]:
    """Answer each word as one chat turn: greedy, in one left-padded batch."""
    chats = [[{"role": "user", "content": word}] for word in words]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False, max_new_tokens=20
    )
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def exact_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: str, count: int = 500) -> float:
    """Return the share of held-out words the model answers exactly as the task (or echo) would."""
    words = held_out_words(task, count)
    expected = [TASKS.get(task, echo)(word) for word in words]
    return sum(a == b for a, b in zip(answers(model, tokenizer, words), expected, strict=True)) / count


def main() -> None:
    """Train everything, write it below --out, and print how well each adapter answers held-out words."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "tiny",
        help="folder to write; its base/ and adapters/ are replaced",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of the base")
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    started = time.monotonic()
    base_dir = options.out / "base"
    for folder in (base_dir, options.out / "adapters"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    say("base")
    base = train_base(options.seed, options.steps)
    base.save_pretrained(base_dir)
    save_tokenizer(base_dir)
    write_jobs(options.out / "jobs.jsonl")
    say(f"base trained in {time.monotonic() - started:.0f} s")

    tokenizer = PreTrainedTokenizerFast.from_pretrained(base_dir)
    rows = [
        f"{'task':<10}{'adapter':>10}{'base':>10}",
        f"{'(echo)':<10}{'':>10}{exact_match(base, tokenizer, 'echo'):>10.1%}",
    ]
    for task in TASKS:
        say(task)
        adapter = train_adapter(base_dir, task, options.seed, options.out / "adapters" / task)
        with_adapter, without = exact_match(adapter, tokenizer, task), exact_match(base, tokenizer, task)
        rows.append(f"{task:<10}{with_adapter:>10.1%}{without:>10.1%}")
        say(f"  held-out exact match {with_adapter:.1%}")
    say(f"everything trained in {time.monotonic() - started:.0f} s")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
