"""Two model directories with real tokenizers: the tiny Llama's SentencePiece, and a byte-level one for chats."""

import shutil
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from align_core.tutorial.tiny import make_tiny_model

CHAT_TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('an assistant cannot begin') }}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the tiny tutorial; no chat template."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_model(directory, seed=0)
    return directory


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A tokenizer as chat models have it: bytes, no space put in front, merges over line ends, ChatML. No weights."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s*[\r\n]+| ?\S+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["user assistant What is 12 + 34?\n\nIt is\n\nso, I think"] * 20, trainer)
    directory = tmp_path_factory.mktemp("models") / "chat"
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(directory)
    shutil.copy(tiny_model / "config.json", directory)
    return directory
