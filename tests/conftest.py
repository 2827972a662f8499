"""Fixtures that several rooms share."""

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Models of the tests are too small for a second thread: where others want the cores as well, waiting for it took a
# third of a command's time and more. Read when torch is imported, here and in what the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if TYPE_CHECKING:
    from tests.servers import RedisServer

# Without a device the Triton kernels run in Triton's interpreter; it must be asked for before triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

try:
    from hypothesis import HealthCheck, settings
except ImportError:
    pass  # a lent GPU may not have it: what needs it is skipped there
else:
    # The first example pays for building tables, and on a busy machine any of them can be slow.
    settings.register_profile("loramill", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("loramill")


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """A real transformers tokenizer: one token a byte (256), `<s>` put before text, `</s>`, and no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


@pytest.fixture(scope="session")
def tiny_base(byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama (2 layers, context 256), the byte tokenizer and a chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-base"
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_adapter(tiny_base: Path) -> Callable[..., Path]:
    """Makes an adapter for tiny_base as the real peft saves it: random, and strong enough to change answers."""

    def make(folder: Path, *, seed: int = 0, rank: int = 4, noop: bool = False, **settings: Any) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        targets = ["q_proj", "v_proj", "down_proj"]
        config = LoraConfig(r=rank, lora_alpha=64, target_modules=targets, init_lora_weights=noop, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft uses names that transformers has deprecated
            get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_grown(tiny_base: Path) -> Callable[..., Path]:
    """Makes an adapter for tiny_base whose training added `<tool>` (258) and the end of sequence `<end>` (259), and
    padded the vocabulary to `size`; its tokenizer is beside it, with `template` if that is given."""

    def make(folder: Path, *, size: int = 262, template: str | None = None, **settings: Any) -> Path:
        from transformers import AutoTokenizer

        from tests.worker.merging import save_trained

        save_trained(folder, tiny_base, grow_to=size, **({"r": 4, "target_modules": ["q_proj", "v_proj"]} | settings))
        tokenizer = AutoTokenizer.from_pretrained(tiny_base)
        tokenizer.add_tokens(["<tool>"])
        tokenizer.add_special_tokens({"eos_token": "<end>"})
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_adapters(make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapters `one`, `two` and `three` for tiny_base."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two", "three")):
        make_adapter(root / name, seed=seed)
    return root


@pytest.fixture(scope="session")
def need_redis() -> None:
    """A missing redis-server fails the test; who has none says LORAMILL_NO_REDIS=1, but not in CI."""
    from tests.servers import MISSING, has_redis

    if not has_redis():
        if os.environ.get("LORAMILL_NO_REDIS") == "1" and not os.environ.get("CI"):
            pytest.skip(MISSING)
        pytest.fail(MISSING, pytrace=False)


@pytest.fixture(scope="session")
def redis_server(need_redis: None, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[RedisServer]":
    """One for all tests that take nothing away from it; each uses a key prefix of its own."""
    from tests.servers import RedisServer

    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def new_redis(need_redis: None, tmp_path: Path) -> "Iterator[Callable[..., RedisServer]]":
    """Starts servers that a test may do anything to; the arguments are RedisServer's."""
    from tests.servers import RedisServer

    started: list[RedisServer] = []

    def start(**settings: Any) -> RedisServer:
        started.append(RedisServer(tmp_path / f"redis-{len(started)}", **settings).start())
        return started[-1]

    yield start
    for server in started:
        server.resume()
        server.kill()
