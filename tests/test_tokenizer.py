"""data/tokenizer.py: golden ids, templates and prompts, batches by number of tokens."""

import json
import random

import numpy as np
import pytest
import tokenizers
from helpers import ECHO, EOL, TEXT, TEXTS, K, edit_json, refused, trained_encoder
from helpers import write_tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from data.tokenizer import INSTRUCTED, Tokenizer, check_special_tokens, choose_template
from model import EncoderConfig, load_encoder, plain_encoder, save_encoder
from runtime.errors import TextError, UserError


def save(tokenizer, folder):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def like_llama_2(folder, template="<s> $A"):
    """SentencePiece in spirit: a metaspace before the text, byte fallback, `<s>` first."""
    special, fallback = ["<unk>", "<s>", "</s>"], [f"<0x{i:02X}>" for i in range(256)]
    vocab = [*special, *fallback, "▁", "a", "b", "▁a", "ab"]
    tokenizer = tokenizers.Tokenizer(models.BPE(
        {token: i for i, token in enumerate(vocab)}, [("▁", "a"), ("a", "b")],
        unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    save(tokenizer, folder)
    return len(vocab)


def like_llama_3(folder):
    """Byte level, `<|begin_of_text|>` at the end of the vocabulary, two post-processors."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "ab"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b")], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    bos = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 257)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    save(tokenizer, folder)
    return 259, vocab


# ---------------------------------------------------------------------------------------------
# Ids
# ---------------------------------------------------------------------------------------------


def test_a_llama_2_tokenizer_gives_the_golden_ids(tmp_path):
    size = like_llama_2(tmp_path)
    tokenizer = Tokenizer(tmp_path, size)
    assert tokenizer.bos == [1]
    texts = ["a", "ab", "b", " a", "a!", ""]
    golden = [[1, 262], [1, 262, 261], [1, 259, 261], [1, 259, 262], [1, 262, 3 + 0x21], [1]]
    arrays = tokenizer.encode(texts)
    assert [array.tolist() for array in arrays] == golden
    assert all(array.dtype == np.int32 for array in arrays)
    assert tokenizer.decode(golden[1]) == "ab"


def test_a_llama_3_tokenizer_gives_the_golden_ids(tmp_path):
    size, vocab = like_llama_3(tmp_path)
    tokenizer = Tokenizer(tmp_path, size)
    assert tokenizer.bos == [257]
    golden = [[257, 256], [257, vocab["b"], vocab["a"]], [257, vocab["Ġ"], 256], [257]]
    assert [a.tolist() for a in tokenizer.encode(["ab", "ba", " ab", ""])] == golden


def test_an_end_token_of_the_post_processor_is_left_out(tmp_path):
    tokenizer = Tokenizer(tmp_path, like_llama_2(tmp_path, "<s> $A </s>"))
    assert tokenizer.bos == [1]
    assert tokenizer.encode(["ab"])[0].tolist() == [1, 262, 261]


@pytest.mark.parametrize("template", [None, "$A </s>"], ids=["none", "end token only"])
def test_without_a_bos_in_the_post_processor_config_json_names_it(template, tmp_path):
    write_tokenizer(tmp_path, template=template)
    tokenizer = Tokenizer(tmp_path, 320, bos_token_id=2)
    assert tokenizer.bos == [2] and tokenizer.encode([""])[0].tolist() == [2]
    with pytest.raises(UserError, match="bos_token_id") as info:
        Tokenizer(tmp_path, 320)
    assert str(tmp_path / "tokenizer.json") in str(info.value)


def test_the_post_processor_takes_precedence_over_config_json(tmp_path):
    write_tokenizer(tmp_path)
    assert Tokenizer(tmp_path, 320, bos_token_id=2).bos == [1]


def test_a_bos_of_the_encoders_own_replaces_the_checkpoints(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path, 320, bos_token_id=2, bos=0)
    assert tokenizer.bos == [0] and tokenizer.encode([""])[0].tolist() == [0]
    assert Tokenizer(tmp_path, 320, bos=319).bos == [319]
    with pytest.raises(UserError, match=r"BOS ids \[320\] are not all .* fix them, --bos, or"):
        Tokenizer(tmp_path, 320, bos=320)


def test_ids_equal_those_of_transformers_and_a_cut_keeps_bos(tiny):
    ours = Tokenizer(tiny, 320)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tiny / "tokenizer.json"))
    assert [a.tolist() for a in ours.encode(TEXTS)] == theirs(TEXTS).input_ids
    cut = ours.read(TEXTS, "{text}", 5).ids
    assert [a.tolist() for a in cut] == [i[:5] for i in theirs(TEXTS).input_ids]
    assert [ours.decode(a) for a in ours.encode(TEXTS)] == TEXTS


def test_texts_keep_their_order_across_chunks(tiny):
    ours = Tokenizer(tiny, 320)
    texts = [str(i) for i in range(4096 + 5)]
    assert [ours.decode(a) for a in ours.encode(texts)] == texts


def test_truncation_and_padding_stored_in_the_file_have_no_effect(tiny, tmp_path):
    stored = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    stored.enable_truncation(4)
    stored.enable_padding(length=16)
    save(stored, tmp_path)
    assert len(stored.encode(TEXT).ids) == 16 and stored.encode(TEXT).attention_mask.count(1) == 4
    plain, ours = Tokenizer(tiny, 320), Tokenizer(tmp_path, 320)
    assert ours.bos == plain.bos
    for a, b in zip(ours.encode(TEXTS), plain.encode(TEXTS)):
        assert np.array_equal(a, b)


# ---------------------------------------------------------------------------------------------
# Templates: texts with instructions, documents, prompts
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template, document_template, asked, expected", [
    ("{text}", "", {}, "{text}"), ("q: {text}", "", {}, "q: {text}"),
    (INSTRUCTED, "", {}, "{text}"), (INSTRUCTED, "", {"document": True}, "{text}"),
    (INSTRUCTED, "", {"instruction": "Find it"}, INSTRUCTED),
    ("{text}", "", {"instruction": "Find it"}, INSTRUCTED),
    ("<{instruction}> {text}", "", {"instruction": "x"}, "<{instruction}> {text}"),
    ("q: {text}", "d: {text}", {"document": True}, "d: {text}"),
    ("q: {text}", "d: {text}", {"document": False}, "q: {text}"),
    (INSTRUCTED, "d {instruction}: {text}", {"document": True, "instruction": "Find it"},
     "d {instruction}: {text}"),
    (INSTRUCTED, "d: {text}", {"document": False, "instruction": "Find it"}, INSTRUCTED),
    (INSTRUCTED, "d {instruction}: {text}", {"document": True}, "{text}"),
])
def test_instruction_and_role_choose_the_template(template, document_template, asked, expected):
    assert choose_template(template, document_template, **asked) == expected


def test_an_instruction_that_is_not_utf8_is_refused():
    refused(lambda: choose_template("{text}", "", "half \ud83d"), "instruction", "not a text")


@pytest.mark.parametrize("instruction", [None, 3, b"Find it", ["Find it"], ("Find it", "x"), True])
def test_an_instruction_that_is_no_text_is_refused(instruction, tiny):
    encoder = plain_encoder(tiny)
    for ask in (encoder.encode, encoder.tokenize, lambda *a: next(encoder.batches(*a))):
        with pytest.raises(TypeError, match=f"instruction is .*{type(instruction).__name__}; a "
                                            f"text"):
            ask(["x"], instruction)


def test_an_instruction_for_documents_with_a_template_of_their_own_is_refused(tiny):
    """It would not be read."""
    encoder = plain_encoder(tiny, EncoderConfig(0, "last", "causal", 64, INSTRUCTED, "d: {text}"))
    refused(lambda: encoder.encode(["x"], "Find it", document=True), "'Find it'", "'d: {text}'",
            "no place for one")
    assert encoder.encode(["x"], document=True).shape == (1, 32)


@pytest.mark.parametrize("text", ["a b", "{text}", "an {instruction} of {text}", "", "{", "\\1"])
@pytest.mark.parametrize("instruction", [
    "Sort {text} by topic", "{instruction}", "{text}{text}", "{instruction} {text}", "{", "}{0}",
    "two\nlines", "%s", r"\1 \g<0>", "{text", "{{text}}", "{document}",
])
@pytest.mark.parametrize("template", [INSTRUCTED,
                                      "q {instruction} {text} and {text} {instruction}"])
def test_an_instruction_is_data_and_no_template(template, instruction, text, tiny):
    encoder = plain_encoder(tiny, EncoderConfig(0, "echo", "causal", 300, template))
    (ids,), (tail,), _ = encoder.tokenize([text], instruction)
    if template == INSTRUCTED:
        expected, after = f"{instruction}:{text}\n", "\n"
    else:
        expected = f"q {instruction} {text} and {text} {instruction}"
        after = f" {instruction}"
    assert encoder.tokenizer.decode(ids) == expected
    last = encoder.tokenizer.decode(ids[len(ids) - tail :])
    assert last.endswith(text + after) and len(last) <= len(text + after) + 2


# ---------------------------------------------------------------------------------------------
# What is no list of texts
# ---------------------------------------------------------------------------------------------


class Column:
    """A column of a table: it has a length and places, and is no list."""

    def __init__(self, *values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        return self.values[i]


@pytest.mark.parametrize("texts", [
    "owls", "", b"owls", bytearray(b"owls"), {"a": 1}, {"a", "b"}, frozenset("ab"), None, 3, np.nan,
    iter(["a"]), (c for c in "ab"), {"a": 1}.keys(), np.array("owls"), np.array([["a", "b"]]),
    np.str_("owls"),
], ids=lambda texts: type(texts).__name__)
@pytest.mark.parametrize("instruction", ["", "q"])
def test_what_is_no_list_of_texts_is_refused(texts, instruction, tiny):
    encoder = plain_encoder(tiny)
    for ask in (encoder.encode, encoder.tokenize, lambda *a: next(encoder.batches(*a))):
        with pytest.raises(TextError, match=r"^texts is .*; a list of texts is expected: \[text\]"):
            ask(texts, instruction)


@pytest.mark.parametrize("texts", [
    ("a", "b"), np.array(["a", "b"]), np.array(["a", "b"], dtype=object), Column("a", "b"),
    [np.str_("a"), "b"],
], ids=lambda texts: type(texts).__name__)
def test_any_sequence_of_texts_is_read_like_a_list(texts, tiny):
    encoder = plain_encoder(tiny)
    for instruction in ("", "Find it"):
        expected = encoder.encode(["a", "b"], instruction)
        assert np.array_equal(encoder.encode(texts, instruction), expected)
    read = encoder.tokenize(texts)
    assert [ids.tolist() for ids in read.ids] == [ids.tolist() for ids in
                                                  encoder.tokenize(["a", "b"]).ids]
    assert sum(len(batch[0]) for batch in encoder.batches(texts, progress=True)) == 2


@pytest.mark.parametrize("nothing", [[], (), np.array([], dtype=str)], ids=repr)
def test_no_texts_have_no_embeddings(nothing, tiny):
    for template in ("{text}", INSTRUCTED):
        encoder = plain_encoder(tiny, EncoderConfig(0, "mean", "causal", template=template))
        for instruction in ("", "Find it"):
            found = encoder.encode(nothing, instruction)
            assert found.shape == (0, 32) and found.dtype == np.float32


@pytest.mark.parametrize("odd, said", [
    (["instruction", "text"], "a list; each text is a str, and an instruction is given once"),
    (("instruction", "text"), "a tuple; each text is a str, and an instruction is given once"),
    (None, "None, of the type NoneType"), (float("nan"), "nan, of the type float"),
    (3, "3, of the type int"), (b"text", "b'text', of the type bytes"),
    ({"text": "a"}, "of the type dict"), (np.array(["a"]), "of the type ndarray"),
    ("half \ud83d", "'half \\ud83d': not a text in UTF-8"),
    ("x" * 10_000 + "\udc80", "\\udc80': not a text in UTF-8"),
], ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("template", ["{text}", INSTRUCTED])
def test_an_element_that_is_no_text_is_named_by_its_index(odd, said, template, tiny):
    encoder = plain_encoder(tiny, EncoderConfig(0, "mean", "causal", template=template))
    for instruction in ("", "Find it"):
        for ask in (encoder.encode, encoder.tokenize):
            with pytest.raises((TypeError, ValueError)) as info:
                ask(["a", "b", odd, None], instruction)
            assert isinstance(info.value, UserError) and isinstance(info.value, TextError)
            assert str(info.value).startswith("texts[2] ") and said in str(info.value)
            assert len(str(info.value)) < 300
            str(info.value).encode()


# ---------------------------------------------------------------------------------------------
# Special tokens: literal in texts and instructions, tokens in templates
# ---------------------------------------------------------------------------------------------


def llama_3_alphabet(folder):
    """like_llama_3, with every letter of these tests in its vocabulary."""
    return like_llama_3(folder)[0]


SPECIAL = {  # a tokenizer, BOS and one of its special tokens
    "gpt-2": (lambda folder: write_tokenizer(folder) or 320, 1, "</s>", 2),
    "llama-2": (like_llama_2, 1, "</s>", 2),
    "llama-3": (llama_3_alphabet, 257, "<|end_of_text|>", 258),
}


@pytest.fixture(params=SPECIAL)
def special(request, tmp_path):
    """make(special_tokens) -> a Tokenizer; transformers' tokenizer, a special token, and its id."""
    write, _, token, number = SPECIAL[request.param]
    size = write(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    return (lambda way: Tokenizer(tmp_path, size, special_tokens=way)), theirs, token, number


def with_tokens(token: str) -> list[str]:
    """Texts that have a special token in them, and some that nearly have one."""
    return [f"writes {token} after", token, f"{token}{token}", f" {token} ", f"a{token}",
            "<s>a</s>",
            token[:-1], token[1:], token.upper(), f"é{token}漢字", *TEXTS]


def test_a_special_token_in_a_text_is_its_letters_as_with_split_special_tokens(special):
    make, theirs, token, number = special
    texts = with_tokens(token)
    literal, parsed = make("literal"), make("parsed")
    expected = theirs(texts, split_special_tokens=True).input_ids
    assert [ids.tolist() for ids in literal.encode(texts)] == expected
    assert [ids.tolist() for ids in literal.read(texts, "{text}", 999).ids] == expected
    assert not any(number in ids for ids in expected)
    assert [ids.tolist() for ids in parsed.encode(texts)] == theirs(texts).input_ids
    assert number in parsed.encode(texts)[0]


@pytest.mark.parametrize("template", [
    "{text}", "query: {text}@", "@{text}", "{text}@@", "a @ {text} b {text}@", "{text}{text}",
    "{text}\n@ ",
])
def test_a_text_without_special_tokens_has_the_ids_that_it_had(template, special):
    """Those of the whole filled template, its special tokens parsed, as ever."""
    make, theirs, token, number = special
    template = template.replace("@", token)
    draw = random.Random(1)
    texts = TEXTS + ["".join(draw.choices("ab  \n<>/s|_é漢.", k=20)) for _ in range(50)]
    filled = [template.replace("{text}", text) for text in texts]
    expected, before = theirs(filled).input_ids, make("parsed")
    for way in ("literal", "parsed"):
        found = make(way).read(texts, template, 4096)
        assert [ids.tolist() for ids in found.ids] == expected
        assert found.tails == before.read(texts, template, 4096).tails
        assert token not in template or all(number in ids for ids in found.ids)
    for room in (20, 25, 40):  # cut, too
        try:
            old = before.read(texts, template, room)
        except UserError:
            continue
        new = make("literal").read(texts, template, room)
        assert [i.tolist() for i in new.ids] == [i.tolist() for i in old.ids]
        assert new.tails == old.tails and new.cut == old.cut


def test_a_template_has_tokens_and_its_text_letters(special):
    """RepLLaMA's 'passage: {text}</s>' with a text about </s>."""
    make, theirs, token, number = special
    literal = make("literal")
    texts = with_tokens(token)
    for text, ids in zip(texts, literal.read(texts, f"b: {{text}}{token}", 999).ids):
        expected = theirs(f"b: {text}", split_special_tokens=True).input_ids
        assert ids.tolist() == [*expected, number]
        assert ids.tolist().count(number) == 1
    (ids,), (tail,), (cut,) = literal.read([token * 40], f"b: {{text}}{token}", 30)
    assert cut and len(ids) <= 30 and ids[-1] == number and ids.tolist().count(number) == 1
    # nor is one made where a text meets its template
    for template, text in ((f"{token[:2]}{{text}}", token[2:]), (f"{{text}}{token[2:]}{token}",
                                                                 token[:2])):
        (ids,) = literal.read([text], template, 999).ids
        assert ids.tolist().count(number) == template.count(token)


def test_special_tokens_of_an_instruction_are_letters(special):
    make, theirs, token, number = special
    (ids,) = make("literal").read(["a"], INSTRUCTED, 99, f"b {token}").ids
    assert ids.tolist() == theirs(f"b {token}:a\n", split_special_tokens=True).input_ids
    (ids,) = make("parsed").read(["a"], INSTRUCTED, 99, f"b {token}").ids
    assert ids.tolist() == theirs(f"b {token}:a\n").input_ids and number in ids
    (ids,) = make("literal").read(["a"], f"{{instruction}}{token}{{text}}", 99, f"b {token}").ids
    assert ids.tolist().count(number) == 1


def test_the_longest_special_token_of_a_template_is_taken_and_spaces_that_it_eats(tmp_path):
    write_tokenizer(tmp_path, 300)
    stored = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stored.add_special_tokens(["</s></s>", tokenizers.AddedToken("<sep>", lstrip=True, rstrip=True),
                               tokenizers.AddedToken("end", single_word=True)])
    stored.add_tokens(["<think>"])
    save(stored, tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path, 320)
    texts = ["a <sep> b", "</s></s></s>", "the end", "bend end"]
    for template in ("x <sep> {text} </s></s></s>", "{text} <sep> y", "{text} end", "bend {text}"):
        for text in ("a", " a ", "d", ""):
            (ids,) = tokenizer.read([text], template, 99).ids
            assert ids.tolist() == theirs(template.replace("{text}", text)).input_ids
    assert [ids.tolist() for ids in tokenizer.encode(texts)] == theirs(
        texts, split_special_tokens=True).input_ids
    # an added token that is not special is a word like others
    assert theirs.convert_tokens_to_ids("<think>") in tokenizer.encode(["a <think> b"])[0]


def test_an_encoder_keeps_how_it_reads_special_tokens(tiny, tmp_path):
    texts = ["The tokenizer writes </s> after each document.", "a text"]
    made = {}
    for way in ("literal", "parsed"):
        encoder = trained_encoder(tiny, EncoderConfig(K, max_tokens=64, special_tokens=way))
        save_encoder(encoder, tmp_path / way)
        assert json.loads((tmp_path / way / "encoder.json").read_text())["special_tokens"] == way
        made[way] = load_encoder(tmp_path / way).encode(texts)
        assert np.array_equal(made[way], encoder.encode(texts))
    assert np.abs(made["literal"] - made["parsed"])[0].max() > 1e-3
    assert np.array_equal(made["literal"][1], made["parsed"][1])
    edit_json(tmp_path / "parsed/encoder.json", drop=["special_tokens"])  # of an earlier version
    assert np.array_equal(load_encoder(tmp_path / "parsed").encode(texts), made["parsed"])
    edit_json(tmp_path / "parsed/encoder.json", special_tokens="letters")
    refused(lambda: load_encoder(tmp_path / "parsed"), "encoder.json", "special_tokens='letters'",
            "literal or parsed")


def test_a_special_token_that_the_tokenizer_lacks_is_refused(tiny):
    tokenizer = Tokenizer(tiny, 320)
    check_special_tokens(tokenizer, ("{text}</s>", "1 < 2 and 3 > 2 {text}"))
    refused(lambda: check_special_tokens(tokenizer, ("{text}</s>", "{text}<|eot|>")),
            "'{text}<|eot|>'", "<|eot|> is no token", str(tiny / "tokenizer.json"))


def test_only_the_text_is_filled_into_a_template(tiny):
    texts = ["a {text} b", "{0} {x}", "%s"]
    templated = trained_encoder(tiny, EncoderConfig(K, template="query: {text}\n", max_tokens=64))
    plain = trained_encoder(tiny).encode([f"query: {text}\n" for text in texts])
    assert np.abs(templated.encode(texts) - plain).max() <= 1e-6


@pytest.mark.parametrize("template", ["{text}", INSTRUCTED])
def test_an_instruction_precedes_its_text_and_without_one_the_text_stands_alone(template, tiny):
    texts = ["A text.", "", "{instruction}", "two\nlines"]
    encoder = trained_encoder(tiny, EncoderConfig(K, template=template, max_tokens=64))
    plain = trained_encoder(tiny)
    told = plain.encode([f"Find it:{text}\n" for text in texts])
    assert np.abs(encoder.encode(texts, "Find it") - told).max() <= 1e-6
    assert np.abs(encoder.encode(texts, instruction="Find it") - told).max() <= 1e-6
    assert np.abs(encoder.encode(texts) - plain.encode(texts)).max() <= 1e-6
    assert np.abs(told - plain.encode(texts)).max() > 1e-2


@pytest.mark.parametrize("template", ["query: {text}", ECHO, EOL])
def test_a_template_without_a_place_for_an_instruction_refuses_one(template, tiny):
    encoder = plain_encoder(tiny, EncoderConfig(0, "last", "causal", template=template))
    assert encoder.encode(["x"]).shape == (1, 32)
    with pytest.raises(UserError, match="instruction 'Find it'.*no place for one"):
        encoder.encode(["x"], "Find it")


def test_cutting_a_long_text_leaves_instruction_and_newline_whole(tiny):
    config = EncoderConfig(K, template=INSTRUCTED, max_tokens=40)
    encoder = trained_encoder(tiny, config)
    ids, _, cut = encoder.tokenize([TEXT, "short"], "Find it")
    assert len(ids[0]) == 40 and encoder.tokenizer.decode(ids[1]) == "Find it:short\n"
    assert cut == [True, False]
    said = encoder.tokenizer.decode(ids[0])
    assert said.startswith("Find it:The quick") and said.endswith("\n")
    kept = said.removeprefix("Find it:").removesuffix("\n")
    assert TEXT.startswith(kept) and len(kept) > 10
    assert np.abs(encoder.encode([TEXT], "Find it") - encoder.encode([kept], "Find it")).max() == 0


@pytest.mark.parametrize("prompt, after", [
    (ECHO, ""), (EOL, '" means in one word:"'), (INSTRUCTED, "\n"), ("{text} and {text}!", "!"),
])
def test_a_filled_prompt_is_tokenized_as_one_text_with_the_last_occurrence_as_tail(
    prompt, after, tiny
):
    tokenizer = Tokenizer(tiny, 320)
    arrays, tails, cut = tokenizer.encode_prompted(TEXTS, prompt, 4096)
    whole = tokenizer.encode([prompt.replace("{text}", text) for text in TEXTS])
    assert cut == [False] * len(TEXTS)
    for text, ids, expected, tail in zip(TEXTS, arrays, whole, tails):
        assert np.array_equal(ids, expected) and ids.dtype == np.int32
        last = tokenizer.decode(ids[len(ids) - tail :])
        assert last in (text + after, f" {text}{after}") and tail < len(ids)


def test_a_llama_2_tokenizer_gives_the_golden_tails(tmp_path):
    tokenizer = Tokenizer(tmp_path, like_llama_2(tmp_path))
    arrays, tails, _ = tokenizer.encode_prompted(["a", "ab", "b", "é", ""], "b {text}b {text}", 99)
    space, b = [259], [261]
    first = [1, 259, 261]
    golden = [[*first, 262, *b, 262], [*first, 262, *b, *b, 262, *b],
              [*first, *space, *b, *b, *space, *b],
              [*first, *space, 3 + 0xC3, 3 + 0xA9, *b, *space, 3 + 0xC3, 3 + 0xA9],
              [*first, *space, *b, *space]]
    assert [array.tolist() for array in arrays] == golden
    assert tails == [1, 2, 1, 2, 0]


def longest_fit(tokenizer, text, prompt, room):
    """The ids with the longest beginning of the text, in its own tokens, that fit; None if none."""
    ends = [end for _, end in tokenizer.backend.encode(text, add_special_tokens=False).offsets]
    for string in [text, *(text[:end] for end in reversed(ends))]:
        (ids,) = tokenizer.encode([prompt.replace("{text}", string)])
        if len(ids) <= room:
            return ids.tolist()
    return None


@pytest.mark.parametrize("prompt", [ECHO, EOL, INSTRUCTED.replace("{instruction}", "Find it")])
@pytest.mark.parametrize("like", ["gpt-2", "llama-2"])
def test_a_long_text_is_cut_no_more_than_needed_and_the_prompt_never(prompt, like, tiny, tmp_path):
    if like == "gpt-2":
        tokenizer = Tokenizer(tiny, 320)
    else:
        tokenizer = Tokenizer(tmp_path, like_llama_2(tmp_path))
    draw = random.Random(0)
    texts = [TEXT, "ümläut 漢字 " * 9, "ab" * 50, " a" * 50] + [
        "".join(draw.choices("ab  \n漢é.", k=60)) for _ in range(12)]
    frame = len(tokenizer.encode([prompt.replace("{text}", "")])[0])
    before, after = prompt.partition("{text}")[0], prompt.rpartition("{text}")[2]
    for room in range(frame, frame + 60, 7):
        for text in texts:
            expected = longest_fit(tokenizer, text, prompt, room)
            try:
                (ids,), (tail,), (cut,) = tokenizer.encode_prompted([text], prompt, room)
            except UserError as error:
                assert expected is None and f"max_tokens={room}" in str(error)
                continue
            assert ids.tolist() == expected and len(ids) <= room and 0 < tail < len(ids)
            (whole,) = tokenizer.encode([prompt.replace("{text}", text)])
            assert cut == (len(whole) > room)
            said = tokenizer.decode(ids)
            assert said.startswith(before.strip()) and said.endswith(after)


def test_only_texts_that_are_too_long_are_cut(tiny):
    tokenizer = Tokenizer(tiny, 320)
    texts = ["short", TEXT, "", "a model"]
    arrays, tails, cut = tokenizer.encode_prompted(texts, EOL, 80)
    for i in (0, 2, 3):
        (alone,), (tail,), _ = tokenizer.encode_prompted([texts[i]], EOL, 4096)
        assert np.array_equal(arrays[i], alone) and tails[i] == tail
    assert 75 <= len(arrays[1]) <= 80 and cut == [False, True, False, False]


@pytest.mark.parametrize("template", ["{text}", "query: {text}\n", ECHO])
def test_a_text_of_just_the_limit_is_whole_and_one_token_more_is_cut(template, tiny):
    """The limit counts BOS and the template."""
    tokenizer = Tokenizer(tiny, 320)
    texts = ["x" * n for n in range(1, 40)]  # one token each
    whole = tokenizer.encode([template.replace("{text}", text) for text in texts])
    sizes = [len(ids) for ids in whole]
    limit = sizes[20]
    ids, tails, cut = tokenizer.read(texts, template, limit)
    assert cut == [size > limit for size in sizes] and cut.count(False) == 21
    for found, expected, long in zip(ids, whole, cut):
        assert long or np.array_equal(found, expected)
        assert not long or np.array_equal(found, ids[20])
        assert len(found) <= limit and found[0] == 1 and found.dtype == np.int32
    assert template != "{text}" or tails == [len(found) for found in ids]


def test_a_cut_text_does_not_keep_the_whole_one_in_memory(tiny):
    (ids,), _, (cut,) = Tokenizer(tiny, 320).read([TEXT * 50], "{text}", 8)
    assert cut and len(ids) == 8 and ids.base is None


@pytest.mark.parametrize("max_tokens", [1, 0, -5])
def test_a_limit_of_bos_alone_is_refused(max_tokens, tiny):
    refused(lambda: Tokenizer(tiny, 320).read(["x"], "{text}", max_tokens),
            f"{max_tokens} tokens leave no room for a text beside BOS")
    assert len(Tokenizer(tiny, 320).read(["x"], "{text}", 2).ids[0]) == 2


@pytest.mark.parametrize("template, asked", [
    ("{text}", {}), ("query: {text}", {}), (INSTRUCTED, {"instruction": "Find it"}),
    ("{text}", {"max_tokens": 21}), (INSTRUCTED, {"instruction": "x", "max_tokens": 33}),
    ("{text}", {"document": True, "max_tokens": 30}),
])
def test_what_an_encoder_reads_of_a_text_does_not_depend_on_k(template, asked, tiny):
    read = []
    for k in (1, 2, 16):
        encoder = plain_encoder(tiny, EncoderConfig(k, template=template, max_tokens=40))
        read.append(encoder.tokenize([TEXT, "short", TEXT[:60]], **asked))
    limit = asked.get("max_tokens", 40)
    for ids, tails, cut in read:
        assert [i.tolist() for i in ids] == [i.tolist() for i in read[0].ids]
        assert (tails, cut) == (read[0].tails, read[0].cut) and cut[:2] == [True, False]
        assert limit - 4 <= len(ids[0]) <= limit and (len(ids[0]) == limit or template != "{text}")


@pytest.mark.parametrize("text", [TEXT, "x", ""])
def test_a_prompt_that_leaves_no_room_is_a_user_error(text, tiny):
    encoder = plain_encoder(tiny, EncoderConfig(0, "last", "causal", 20, EOL))
    with pytest.raises(UserError, match="max_tokens=20 leaves no room for a text in the prompt"):
        encoder.encode([text])


def test_prompted_texts_keep_their_order_across_chunks(tiny):
    tokenizer = Tokenizer(tiny, 320)
    texts = [str(i) for i in range(512 + 5)]
    arrays, tails, _ = tokenizer.encode_prompted(texts, "a {text} b {text}", 99)
    assert [tokenizer.decode(a) for a in arrays] == [f"a {t} b {t}" for t in texts]
    assert len(tails) == len(texts)


# ---------------------------------------------------------------------------------------------
# Bad files
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, fragment", [
    (None, "missing"), (b"", "not a tokenizer.json"), (b"{", "not a tokenizer.json"),
    (b"[]", "not a tokenizer.json"), (b'{"model": {"type": "X"}}', "not a tokenizer.json"),
    (b"\xff\xfe", "not a tokenizer.json"),
], ids=["no file", "empty", "cut off", "a list", "unknown model", "binary"])
def test_a_bad_tokenizer_file_is_refused_by_name(content, fragment, tiny_copy):
    path = tiny_copy / "tokenizer.json"
    path.unlink() if content is None else path.write_bytes(content)
    refused(lambda: plain_encoder(tiny_copy), str(path), fragment)


def test_ids_beyond_the_models_vocabulary_are_refused(checkpoint):
    folder = checkpoint(tokens=330)
    refused(lambda: plain_encoder(folder), str(folder / "tokenizer.json"), "329", "320")


@pytest.mark.parametrize("size", [319, 320])
def test_the_first_id_beyond_the_table_is_refused(size, tiny):
    """The tokenizer has 320 ids, the largest is 319."""
    if size == 320:
        assert Tokenizer(tiny, size).bos == [1]
    else:
        refused(lambda: Tokenizer(tiny, size), "token id 319 is beyond")


# ---------------------------------------------------------------------------------------------
# Tokens without a row in the table, and a library that fails
# ---------------------------------------------------------------------------------------------


def add_pad(folder, token="[PAD]", special=True, template=None):
    """Give the tokenizer in `folder`, of 320 ids, one more that the model's table does not have."""
    stored = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    stored.add_tokens([tokenizers.AddedToken(token, special=special)])
    assert stored.token_to_id(token) == 320
    save(stored, folder)
    return folder


@pytest.mark.parametrize("special", [True, False])
def test_a_pad_token_beyond_the_table_is_none_of_the_texts_concern(special, checkpoint):
    folder = checkpoint()
    expected = plain_encoder(folder).encode(TEXTS)
    encoder = plain_encoder(add_pad(folder, special=special))
    assert np.array_equal(encoder.encode(TEXTS), expected)
    literal = encoder.encode(["a", "[PAD]"]) if special else None
    assert literal is None or np.isfinite(literal).all()


@pytest.mark.parametrize("template", ["{text}", "query: {text}"])
@pytest.mark.parametrize("special", [True, False])
def test_a_text_with_a_token_beyond_the_table_is_named(special, template, checkpoint):
    folder = add_pad(checkpoint(), special=special)
    config = EncoderConfig(0, "mean", "causal", template=template, special_tokens="parsed")
    encoder = plain_encoder(folder, config)
    refused(lambda: encoder.encode(["a", "b", "a [PAD] here", "[PAD]"]),
            str(folder / "tokenizer.json"), "texts[2] 'a [PAD] here' has the token '[PAD]'",
            "of the id 320, beyond the model's vocabulary of 320", "take it out")


def test_a_template_with_a_token_beyond_the_table_is_refused(checkpoint):
    tokenizer = Tokenizer(add_pad(checkpoint(), "<pad>"), 320)
    refused(lambda: check_special_tokens(tokenizer, ("{text}<pad>",)), "<pad> is no token")


class PanicException(BaseException):
    """As the library's, which is no Exception either."""


@pytest.mark.parametrize("error", [PanicException("no entry found"), Exception("Missing [UNK]")])
@pytest.mark.parametrize("template", ["{text}", "query: {text}"])
def test_a_library_that_fails_at_a_text_is_one_line(error, template, tiny):
    tokenizer = Tokenizer(tiny, 320)
    backend, failed = tokenizer.backend, []

    class Failing:
        def __getattr__(self, name):
            return getattr(backend, name)

        def batch(self, strings, **options):
            if any("bad" in string for string in strings):
                failed.append(len(strings))
                raise error
            return backend.encode_batch(strings, **options)

        encode_batch = encode_batch_fast = batch

    tokenizer.backend = Failing()
    refused(lambda: tokenizer.read(["a"] * 600 + ["a bad one", "bad"], template, 50),
            str(tiny / "tokenizer.json"), "cannot tokenize texts[600]", "a bad one", str(error))
    assert failed == [90, 1]
    assert len(tokenizer.read(["a"] * 600, template, 50).ids) == 600


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), SystemExit(3)])
def test_what_is_not_the_librarys_is_raised_as_it_is(error, tiny, monkeypatch):
    tokenizer = Tokenizer(tiny, 320)

    class Stopped:
        def encode_batch_fast(self, *_, **__):
            raise error

    tokenizer.backend = Stopped()
    with pytest.raises(type(error)):
        tokenizer.encode(["a"])


def test_a_vocabulary_that_cannot_spell_a_text_is_one_line(tmp_path):
    """The library raises plain Exception at the first word that is not in it."""
    stored = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="[UNK]"))
    stored.pre_tokenizer = pre_tokenizers.Whitespace()
    save(stored, tmp_path)
    tokenizer = Tokenizer(tmp_path, 2, bos=0)
    assert tokenizer.encode(["a b"])[0].tolist() == [0, 0, 1]
    refused(lambda: tokenizer.encode(["a", "a word"]), "cannot tokenize texts[1] 'a word'", "UNK")


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "\u3000", "\x00", "\ufeff", "\u200b"])
def test_a_text_of_nothing_or_of_blanks_has_an_embedding(text, tiny):
    for config in (EncoderConfig(0, "mean", "causal"), EncoderConfig(0, "echo", "causal", 64, ECHO),
                   EncoderConfig(0, "last", "causal", 64, INSTRUCTED)):
        encoder = plain_encoder(tiny, config)
        for instruction in ["Find it"] * ("{instruction}" in config.template) + [""]:
            assert np.isfinite(encoder.encode([text], instruction)).all()
