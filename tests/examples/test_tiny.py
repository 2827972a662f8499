"""The shipped tiny model does what its README says, measured with plain transformers and peft."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = EXAMPLES / "tiny"
ADAPTERS = sorted(path.name for path in (TINY / "adapters").iterdir())
WORDS_PER_TASK = 200

# peft still uses a name that transformers is renaming; nothing of ours is involved.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

sys.path.insert(0, str(EXAMPLES))
import tiny_tasks  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Silence progress bars and use at most two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    """The shipped tokenizer."""
    return transformers.AutoTokenizer.from_pretrained(TINY / "base")


@pytest.fixture(scope="module")
def base():
    """The shipped base model, never modified."""
    return transformers.AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def adapted():
    """One model with every shipped adapter loaded."""
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(model, TINY / "adapters" / ADAPTERS[0], adapter_name=ADAPTERS[0])
    for name in ADAPTERS[1:]:
        wrapped.load_adapter(TINY / "adapters" / name, adapter_name=name)
    return wrapped.eval()


def answer(model, tokenizer, words: list[str]) -> list[str]:
    """Answer each word as one chat turn: greedy, one left-padded batch."""
    chats = [[{"role": "user", "content": word}] for word in words]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=20)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def share_right(answers: list[str], words: list[str], task: str) -> float:
    """Share of answers that match the task exactly."""
    return sum(got == tiny_tasks.TASKS[task](word) for got, word in zip(answers, words, strict=True)) / len(words)


def config_of(name: str) -> dict:
    """The adapter's saved configuration."""
    return json.loads((TINY / "adapters" / name / "adapter_config.json").read_text(encoding="utf-8"))


def test_every_task_has_an_adapter():
    assert sorted(tiny_tasks.TASKS) == ADAPTERS
    assert len(ADAPTERS) >= 6


@pytest.mark.parametrize("task", ADAPTERS)
def test_adapter_does_its_task_on_held_out_words(task, adapted, tokenizer):
    words = tiny_tasks.held_out_words(task, WORDS_PER_TASK)
    adapted.set_adapter(task)
    assert share_right(answer(adapted, tokenizer, words), words, task) >= 0.95


@pytest.mark.parametrize("task", ADAPTERS)
def test_base_does_not_do_the_task(task, base, tokenizer):
    words = tiny_tasks.held_out_words(task, WORDS_PER_TASK)
    assert share_right(answer(base, tokenizer, words), words, task) <= 0.05


def test_base_echoes(base, tokenizer):
    words = tiny_tasks.SAMPLE_WORDS
    echoed = sum(got == word for got, word in zip(answer(base, tokenizer, words), words, strict=True))
    assert echoed >= 0.95 * len(words)


def test_adapter_shapes_differ():
    configs = [config_of(name) for name in ADAPTERS]
    assert len({config["r"] for config in configs}) >= 3
    assert len({config["lora_alpha"] / config["r"] for config in configs}) >= 3
    assert len({tuple(sorted(config["target_modules"])) for config in configs}) >= 4
    assert any(config["use_rslora"] for config in configs)
    assert not all(config["use_rslora"] for config in configs)
    assert {config["base_model_name_or_path"] for config in configs} == {"tiny"}


def test_files_are_small_and_safe():
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors"}


@pytest.mark.parametrize("text", ["hello", " a  b\n", "naïve 日本語 🙂", "x<|end|>y", "".join(map(chr, range(1, 256)))])
def test_tokenizer_round_trips(text, tokenizer):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_chat_template(tokenizer):
    chat = [{"role": "user", "content": "hello"}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert rendered == "<|bos|><|user|>hello<|end|><|assistant|>"


def test_jobs_are_well_formed_and_held_out():
    lines = (TINY / "jobs.jsonl").read_text(encoding="utf-8").splitlines()
    jobs = [json.loads(line) for line in lines]
    assert jobs == tiny_tasks.sample_jobs()
    ids = [job.get("custom_id") or job["id"] for job in jobs]
    assert len(set(ids)) == len(jobs) >= 50
    bodies = [job.get("body", job) for job in jobs]
    assert {body.get("model") or body["adapter"] for body in bodies} == {"base", *ADAPTERS}
    urls = {job.get("url", "native") for job in jobs}
    assert urls == {"native", "/v1/chat/completions", "/v1/completions"}
    for body in bodies:
        word = body["messages"][0]["content"] if "messages" in body else body["prompt"].split("<|")[2][6:]
        assert tiny_tasks.is_held_out(word)


def test_training_never_draws_held_out_words():
    drawn = set(itertools.islice(tiny_tasks.training_words(random.Random(0)), 5000))
    assert not any(tiny_tasks.is_held_out(word) for word in drawn)
    assert drawn.isdisjoint(word for task in tiny_tasks.TASKS for word in tiny_tasks.held_out_words(task, 200))
