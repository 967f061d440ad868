"""A tokenizer whose ids can be worked out by hand: one token for a character or special token."""

import re

import pytest
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|bot|>", "<|sys|>"]
CHARACTERS = [chr(i) for i in range(32, 127)] + ["\n"]
TEMPLATE = (
    "{% for m in messages %}"
    "{{ {'user': '<|user|>', 'assistant': '<|bot|>', 'system': '<|sys|>'}[m.role] }}"
    "{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)


def spell(text):
    """Ids of a text, computed without the tokenizers library."""
    parts = re.findall("|".join(map(re.escape, SPECIAL)) + "|.", text, flags=re.DOTALL)
    table = {part: i for i, part in enumerate(SPECIAL + CHARACTERS)}
    return [table[part] for part in parts]


def build(merges=(), bos=False, **options):
    vocabulary = SPECIAL + CHARACTERS + ["".join(pair) for pair in merges]
    ids = {token: i for i, token in enumerate(vocabulary)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=list(merges), unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
        )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    settings = {**names, **options}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=SPECIAL[3:], **settings
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer():
    return build


@pytest.fixture(scope="session")
def tokenizer():
    return build()


@pytest.fixture(scope="session", name="spell")
def spell_fixture():
    return spell
