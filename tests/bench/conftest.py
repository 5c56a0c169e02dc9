"""A tokenizer that knows every word of the tasks, each as one token with the space before it."""

import re
import string
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench import real_tasks, real_words
from regard import demo

SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant{{ '\n' }}"
)


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    sources = [Path(str(module.__file__)).read_text("utf-8").replace("\\n", " ") for module in (real_words, real_tasks)]
    found = sorted(set(re.findall(r"[^\W\d]+", " ".join([*sources, demo.text(), "user assistant"]))))
    listed = dict.fromkeys([*SPECIAL, *string.printable, *found, *(f" {word}" for word in found)])
    known = Tokenizer(models.WordLevel({word: number for number, word in enumerate(listed)}, unk_token=SPECIAL[0]))
    known.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[^\W\d]+|\d|\s|[^\w\s]"), "isolated")
    known.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=known, unk_token=SPECIAL[0], eos_token=SPECIAL[2])
    made.add_special_tokens({"additional_special_tokens": SPECIAL[1:2]})
    made.chat_template = TEMPLATE
    return made
