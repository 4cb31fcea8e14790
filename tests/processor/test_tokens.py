"""Ids against SentencePiece and `tokenizers`; streams against decoding everything at once."""

import json
import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_tokenizer import IMAGE_TOKEN_ID, mistral_tokenizer, sentencepiece, tokenizer_json
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece

from minivlm.errors import InputError
from minivlm.processor.tokens import REPLACEMENT, Tokenizer, read_json

MISTRAL = Tokenizer(mistral_tokenizer(), pad_token="<pad>")
PROMPT = "[INST] <image>\nWhat is shown in this image? [/INST]"
PROMPT_IDS = [1, 733, 16289, 28793, 28705, 32000, 28705, 13, 3195, 349, 4894, 297, 456, 3469, 28804]
PROMPT_IDS += [733, 28748, 16289, 28793]
# fmt: off
TEXTS = [
    "", " ", "  ", "\n", "\n\n", "\t", "a", " a", "a ", "  a  b ", "▁", "▁a", "a▁b",
    "Hello, world!", "HELLO", "don't", "1234567890", "3.14159", "def f(x):\n    return x  # two\n",
    "a\r\nb", "naïve café", "Straße", "中文字符", "日本語テキスト", "한국어", "العربية", "עברית",
    "हिन्दी", "ไทย",
    "Ελληνικά", "русский", "🎉", "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "a🎉b",
    "𝔘𝔫𝔦", "\u200b", "\ufeff", "\ufffd", "e\u0301", "\x00", "\x7f", "[INST] hi [/INST]", "<0x41>",
    "<|im_start|>", "<b>", "a" * 300, " " * 40, "https://example.org/a?b=c&d=%20",
    "{\"a\": [1, 2]}",
]
# fmt: on


def byte_level_tokenizer():
    """A byte-level BPE (GPT-2's kind) with every byte and a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, "Ġa", "th", "the"])}
    backend = tokenizers.Tokenizer(BPE(vocabulary, [("Ġ", "a"), ("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<image>"])
    return backend


def metaspace_tokenizer():
    """Llama's newer kind: Metaspace instead of a normalizer, no byte fallback."""
    vocabulary = {symbol: i for i, symbol in enumerate(["<unk>", "▁", "a", "b", "▁a", "ab", "▁ab"])}
    backend = tokenizers.Tokenizer(BPE(vocabulary, [("▁", "a"), ("a", "b"), ("▁", "ab")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<s>", "</s>", "<image>"])
    return backend


def byte_tokenizer():
    """Byte fallback with hardly any other token, so that runs of bytes are long; no Strip, as in Yi."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "é"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<s>", "</s>", "<image>"])
    return backend


KINDS = {
    "mistral": MISTRAL,
    "byte level": Tokenizer(byte_level_tokenizer()),
    "metaspace": Tokenizer(metaspace_tokenizer()),
    "bytes": Tokenizer(byte_tokenizer()),
}


def streamed(tokenizer, ids, skip_special=True):
    stream = tokenizer.stream(skip_special)
    return [*(stream.push(token_id) for token_id in ids), stream.finish()]


def test_the_prompt_of_the_published_checkpoint():
    """The ids that llava-v1.6-mistral-7b was trained on: text after a special token gets its own blank."""
    assert MISTRAL.encode(PROMPT) == PROMPT_IDS
    assert MISTRAL.decode(PROMPT_IDS, skip_special=False) == (
        "<s> [INST] <image> \nWhat is shown in this image? [/INST]"
    )
    assert MISTRAL.decode(PROMPT_IDS) == "[INST]  \nWhat is shown in this image? [/INST]"
    assert (MISTRAL.bos_token_id, MISTRAL.eos_token_id, MISTRAL.image_token_id) == (1, 2, 32000)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_sentencepiece(text):
    """checklist 22: the oracle is SentencePiece, since AutoTokenizer rebuilds some tokenizers differently."""
    ids = sentencepiece().encode(text)
    assert MISTRAL.encode(text) == [1, *ids]
    assert MISTRAL.decode(ids) == sentencepiece().decode(ids)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_ids_equal_sentencepiece_for_any_text(text):
    """checklist 22"""
    if not any(special in text for special in ("<unk>", "<s>", "</s>", "<image>", "<pad>")):
        ids = sentencepiece().encode(text)
        assert MISTRAL.encode(text, add_bos=False) == ids
        assert MISTRAL.decode(ids) == sentencepiece().decode(ids)


def test_special_tokens_in_a_text():
    """As in Hugging Face they are parsed, unless the caller says no."""
    assert MISTRAL.encode("hi</s>there", add_bos=False) == [12014, 2, 736]
    plain = MISTRAL.encode("hi</s>there<image>", add_bos=False, parse_special=False)
    assert plain == sentencepiece().encode("hi</s>there<image>") and 2 not in plain and 32000 not in plain
    assert MISTRAL.encode("hi</s>there", add_bos=False) == [12014, 2, 736]  # the switch did not stick


def test_bos_exactly_once():
    assert MISTRAL.encode("a").count(1) == 1
    assert MISTRAL.encode("<s>a") == [1, *MISTRAL.encode("a", add_bos=False)]
    assert MISTRAL.encode("") == [1] and MISTRAL.encode("", add_bos=False) == []
    assert KINDS["bytes"].encode("a") == [KINDS["bytes"].backend.token_to_id("a")]  # its file adds none


@pytest.mark.parametrize("text", [" yes", "yes", "\nyes", "</s> [INST] Sure? [/INST]", " A <image>\nB", ""])
def test_a_continuation_gets_no_blank_of_its_own(text):
    whole = MISTRAL.encode("Is it?" + text)
    assert whole == MISTRAL.encode("Is it?") + MISTRAL.encode_after(text)


def test_truncation_and_padding_of_the_file_are_switched_off():
    """checklist 10: a tokenizer.json saved from training would cut image tokens off."""
    backend = mistral_tokenizer()
    backend.enable_truncation(8)
    backend.enable_padding(length=64)
    assert Tokenizer(backend).encode(PROMPT) == PROMPT_IDS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip_special", [True, False])
def test_a_stream_equals_decoding_everything(kind, skip_special):
    """Random ids, as no model would write them: runs of bad bytes, specials, ids without a token."""
    tokenizer, rng = KINDS[kind], random.Random(kind)
    size = tokenizer.backend.get_vocab_size() + 3
    bytes_and_specials = [*sorted(tokenizer.byte_ids), *sorted(tokenizer.special_ids)] or range(size)
    for _ in range(400):
        pools = rng.choices([range(size), range(min(size, 300)), bytes_and_specials], k=rng.randint(0, 30))
        ids = [rng.choice(pool) for pool in pools]
        assert "".join(streamed(tokenizer, ids, skip_special)) == tokenizer.decode(ids, skip_special)


@pytest.mark.parametrize("kind", ["mistral", "byte level", "bytes"])
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT), max_size=30))
def test_a_stream_never_emits_half_a_character(kind, text):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text, add_bos=False, parse_special=False)
    pieces = streamed(tokenizer, ids)
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) == tokenizer.decode(ids)


def test_what_a_stream_holds_back():
    """A run of byte tokens waits for the token that ends it; other tokens come at once, blanks included."""
    party = [MISTRAL.backend.token_to_id(f"<0x{byte:02X}>") for byte in "🎉".encode()]
    mark = MISTRAL.backend.token_to_id("!")
    assert streamed(MISTRAL, [*party, mark]) == ["", "", "", "", "🎉!", ""]
    assert streamed(MISTRAL, party[:3]) == ["", "", "", REPLACEMENT * 3]
    assert streamed(MISTRAL, MISTRAL.encode("a cat", add_bos=False)) == ["a", " cat", ""]
    byte_level = KINDS["byte level"]
    assert streamed(byte_level, byte_level.encode("é!")) == ["", "é", "!", ""]


@pytest.mark.parametrize("kind", ["mistral", "byte level"])
def test_a_stream_behind_other_ids_keeps_a_first_blank(kind):
    tokenizer = KINDS[kind]
    before, ids = tokenizer.encode("a", add_bos=False), tokenizer.encode_after(" cat")
    stream = tokenizer.stream(before=before)
    text = "".join([*map(stream.push, ids), stream.finish()])
    assert text == " cat"


def test_a_stream_decodes_a_bounded_window(monkeypatch):
    longest = 0
    decode = Tokenizer.decode

    def counting(self, ids, skip_special=True):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(self, ids, skip_special)

    ids = MISTRAL.encode("The cat sat on the mat. " * 50, add_bos=False)
    monkeypatch.setattr(Tokenizer, "decode", counting)
    streamed(MISTRAL, ids)
    assert len(ids) > 300 and longest == 2


def write_folder(folder, config=None, special=None, tokenizer=None):
    (folder / "tokenizer.json").write_text(tokenizer_json() if tokenizer is None else tokenizer)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if special is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


SPECIAL = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<pad>"}


@pytest.mark.parametrize("config, special", [(SPECIAL, None), (None, SPECIAL), ({"pad_token": None}, SPECIAL)])
def test_special_tokens_of_a_folder(tmp_path, config, special):
    """checklist 20: the pad token is not the image token."""
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, config, special), IMAGE_TOKEN_ID)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 32001)
    assert tokenizer.image_token == "<image>" and tokenizer.encode(PROMPT) == PROMPT_IDS


@pytest.mark.parametrize(
    "config, image_token_id, message",
    [
        (SPECIAL, 40000, "no id 40000, the model's image token"),
        (SPECIAL, 1000, "is not an added token"),
        ({**SPECIAL, "pad_token": "<image>"}, 32000, "is also the bos, eos or pad token"),
        ({**SPECIAL, "eos_token": "<end>"}, 32000, "special token '<end>' is not in tokenizer.json"),
        ({**SPECIAL, "eos_token": 7}, 32000, "eos_token is 7, expected a string"),
        ({"added_tokens_decoder": {"32005": {"content": "<x>"}}}, 32000, "has '<x>' as id 32005"),
        ({"added_tokens_decoder": [1]}, 32000, "added_tokens_decoder is a list"),
        ({}, 32000, r"tokenizer_config.json: not there or empty, as special_tokens_map.json"),
        ({"eos_token": "</s>"}, 32000, r"post-processor adds ids \[1\], expected only None"),
    ],
)
def test_bad_folders_are_refused(tmp_path, config, image_token_id, message):
    with pytest.raises(InputError, match=message) as error:
        Tokenizer.from_folder(write_folder(tmp_path, config), image_token_id)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": {"type": "Unheard"}}', '{"version": "1.0"}'])
def test_a_broken_tokenizer_json_is_refused(tmp_path, text):
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Tokenizer.from_folder(write_folder(tmp_path, SPECIAL, tokenizer=text), 32000)


def test_a_folder_without_tokenizer_json_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_folder(tmp_path, 32000)


def test_tokenizers_that_cannot_be_followed_are_refused():
    backend = mistral_tokenizer()
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 1), ("</s>", 2)])
    with pytest.raises(InputError, match=r"post-processor adds ids \[1, 2\]"):
        Tokenizer(backend)
    backend = mistral_tokenizer()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(InputError, match="decoder WordPiece is not supported"):
        Tokenizer(backend)
    backend = tokenizers.Tokenizer(WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    backend.add_special_tokens([AddedToken("<image>"), AddedToken("<s>"), AddedToken("</s>")])
    with pytest.raises(InputError, match="no decoder"):
        Tokenizer(backend)


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(InputError, match="text: character 1 is half of a surrogate pair"):
        MISTRAL.encode("a\ud800")


def test_read_json(tmp_path):
    path = tmp_path / "a.json"
    assert read_json(path) == {}
    for text in ("{", "[1]", "\udc80"):
        path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(InputError, match=r"a\.json: (not JSON|expected a JSON object|cannot be read)"):
            read_json(path)
