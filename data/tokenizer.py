"""A checkpoint's tokenizer.json, without the library defaults that silently change token ids.

The begin-of-sequence ids are those that the checkpoint's own post-processor puts before a text
(Llama-2 `<s>`, Llama-3 `<|begin_of_text|>`). They are found once and then prepended here, so that
no library version can drop or double them; anything appended after a text (EOS) is left out.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from runtime.errors import TextError, UserError, check_text, shown

INSTRUCTED = "{instruction}:{text}\n"  # the one template with instructions (paper, official code)
CHUNK = 512  # texts tokenised per call: bounds the memory of the library's Encoding objects


def check_texts(texts) -> list[str]:
    """The texts as a list; TextError if they are not a sequence of texts, with the index of what is
    not a text.

    A list, a tuple, an array or a column of texts will do; a str is not read as its characters, nor
    a dict as its keys, and a set has no order.
    """
    if (isinstance(texts, str | bytes | bytearray | Mapping) or getattr(texts, "ndim", 1) != 1
            or not (hasattr(texts, "__len__") and hasattr(texts, "__getitem__"))):
        raise TextError(f"texts is {shown(texts)}, of the type {type(texts).__name__}; a list of "
                        f"texts is expected: [text] for a single one, list(texts) for others")
    texts = list(texts)
    for i, text in enumerate(texts):
        if isinstance(text, list | tuple):
            raise TextError(f"texts[{i}] is {shown(text)}, a {type(text).__name__}; each text is a "
                            f"str, and an instruction is given once beside them: "
                            f"encode([text, ...], instruction=...)")
        check_text(text, f"texts[{i}]")
    return texts


def bare_instruction(text: str) -> str:
    """An instruction from a file or a flag, without the colon that the template adds."""
    return text.strip().removesuffix(":")


def choose_template(
    template: str, document_template: str, instruction: str = "", document: bool = False
) -> str:
    """The template in which texts with (or without) an instruction, or documents, are read.

    UserError if it has no place for the instruction.
    """
    check_text(instruction, "instruction")
    own = document_template if document and document_template else ""
    if not instruction:
        return "{text}" if "{instruction}" in (own or template) else own or template
    template = own or (INSTRUCTED if template == "{text}" else template)
    if "{instruction}" not in template:
        raise UserError(f"instruction {instruction[:60]!r}: the template {template[:60]!r} has no "
                        f"place for one; leave the instruction out")
    return template


def check_special_tokens(tokenizer: "Tokenizer", templates: tuple[str, ...], new: bool = True):
    """UserError if a template has a special token like </s> that the tokenizer does not know, or
    (if `new`) something that looks like a placeholder and is not."""
    for template in templates:
        if new and (odd := re.search(r"\{(?!text\}|instruction\})\w*\}|\\n", template)):
            raise UserError(f"template {template!r}: {odd[0]} stays as it is, only {{text}} and "
                            f"{{instruction}} are filled in; leave it out"
                            + ", or for the end of a line write $'...\\n...'" * (odd[0] == r"\n"))
        for token in re.findall(r"<[^<>\s]+>", template):
            found = tokenizer.backend.token_to_id(token)
            if found is None or found >= tokenizer.vocab_size:
                raise UserError(f"template {template!r}: {token} is no token of {tokenizer.file} "
                                f"that the model knows; write its own end-of-text token")


class Tokens(NamedTuple):
    """Texts as a model reads them, one entry each."""

    ids: list[np.ndarray]  # int32, BOS first
    tails: list[int]  # number of tokens from the text's last occurrence in its template on
    cut: list[bool]  # whether the text was longer than the limit


class Tokenizer:
    """Texts -> int32 arrays of token ids that begin with BOS.

    A special token (`special` in tokenizer.json: </s>, <|im_end|>) in a text is read as `literal`,
    its characters, or `parsed`, the token itself, as in transformers. In a template it is always
    the token.
    """

    def __init__(self, folder: Path, vocab_size: int, bos_token_id: int | None = None, bos=-1,
                 special_tokens="literal"):
        """Read folder/tokenizer.json; the model's table has `vocab_size` rows.

        bos: if not negative, the id to put before each text in place of the checkpoint's own.
        Raises UserError if the file is missing or damaged, if its vocabulary has ids that the model
        lacks, or if neither its post-processor nor `bos_token_id` (config.json) says what BOS is.
        """
        self.file, self.vocab_size = Path(folder) / "tokenizer.json", vocab_size
        if not self.file.is_file():
            raise UserError(f"{self.file}: missing; save the fast tokenizer beside the weights")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(self.file))
        except BaseException as error:
            raise UserError(f"{self.file}: not a tokenizer.json ({reason_of(error)}); fetch it "
                            f"again")
        self.backend.no_truncation()
        self.backend.no_padding()
        added = self.backend.get_added_tokens_decoder()
        ids = set(self.backend.get_vocab(with_added_tokens=True).values())
        if (largest := max(ids - added.keys(), default=-1)) >= vocab_size:
            raise UserError(f"{self.file}: token id {largest} is beyond the model's vocabulary of "
                            f"{vocab_size}; is it another model's tokenizer?")
        # a pad token has often been added beyond the table, and occurs in no text
        self.has_ids_beyond = max(ids, default=-1) >= vocab_size
        try:
            self.bos = [bos] if bos >= 0 else self._find_bos(bos_token_id)
        except BaseException as error:
            raise UserError(f"{self.file}: cannot tokenize ({reason_of(error)}); fetch it again")
        if any(not 0 <= i < vocab_size for i in self.bos):
            raise UserError(f"{self.file}: the BOS ids {self.bos} are not all in the model's "
                            f"vocabulary of {vocab_size}; fix them, --bos, or bos_token_id "
                            f"in config.json")
        self.backend.encode_special_tokens = literal = special_tokens == "literal"
        # what `frame` looks for: nothing if a text's special tokens are parsed like a template's
        self.special = {t.content: (i, t) for i, t in added.items() if literal and t.special}
        longest_first = sorted(self.special, key=len, reverse=True)
        self.in_template = re.compile("|".join(
            rf"(?<!\w){re.escape(name)}(?!\w)" if self.special[name][1].single_word
            else re.escape(name) for name in longest_first))
        self.stand_ins: dict[int, int] = {}  # id of a stand-in -> id of its special token

    def _find_bos(self, bos_token_id: int | None) -> list[int]:
        plain = self.backend.encode("a", add_special_tokens=False).ids
        full = self.backend.encode("a").ids
        for start in range(len(full) - len(plain), 0, -1):
            if full[start : start + len(plain)] == plain:
                return full[:start]
        if bos_token_id is None:
            raise UserError(f"{self.file}: its post-processor adds no BOS and config.json names no "
                            f"bos_token_id; set bos_token_id in config.json")
        return [bos_token_id]

    def read(self, texts: list[str], template: str, max_tokens: int, instruction="") -> Tokens:
        """Each text in its template, at most max_tokens with BOS: a longer text is cut.

        TextError unless given a list of texts.
        """
        texts = check_texts(texts)
        if max_tokens <= len(self.bos):
            raise UserError(f"{max_tokens} tokens leave no room for a text beside BOS; raise the "
                            f"limit")
        if template != "{text}":
            return self.encode_prompted(texts, template, max_tokens, instruction)
        ids = self.encode(texts)
        cut = [len(i) > max_tokens for i in ids]
        ids = [i[:max_tokens].copy() if long else i for i, long in zip(ids, cut)]
        return Tokens(ids, [len(i) for i in ids], cut)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """One int32 array per text: BOS, then the tokens of the text."""
        arrays = []
        for start in range(0, len(texts), CHUNK):
            chunk = texts[start : start + CHUNK]
            encodings = self._encode(self.backend.encode_batch_fast, chunk, start)
            arrays += [self._ids(e, text, start + i)
                       for i, (e, text) in enumerate(zip(encodings, chunk))]
        return arrays

    def _encode(self, encode_batch: Callable, strings: list[str], start: int) -> list:
        """The library's encodings; UserError names the first of texts[start:] that it fails on."""
        try:
            return encode_batch(strings, add_special_tokens=False)
        except BaseException as error:
            reason = reason_of(error)
            for i, string in enumerate(strings if len(strings) > 1 else []):
                self._encode(encode_batch, [string], start + i)
            raise UserError(f"{self.file}: cannot tokenize texts[{start}] {strings[0][:60]!r} "
                            f"({reason}); change the text, or fetch the file again")

    def _ids(self, encoding: tokenizers.Encoding, text: str, i: int) -> np.ndarray:
        """BOS and the ids of a text, int32; UserError for an id that the model has no row for."""
        ids = encoding.ids
        if self.stand_ins:
            ids = [self.stand_ins.get(id, id) for id in ids]
        if self.has_ids_beyond and max(ids, default=-1) >= self.vocab_size:
            token = next(id for id in ids if id >= self.vocab_size)
            raise UserError(f"{self.file}: texts[{i}] {text[:60]!r} has the token "
                            f"{self.backend.id_to_token(token)!r} of the id {token}, beyond the "
                            f"model's vocabulary of {self.vocab_size}; take it out of the text")
        return np.array(self.bos + ids, dtype=np.int32)

    def frame(self, template: str, instruction: str = "") -> list[str]:
        """The pieces of a template around its `{text}`s, with the instruction filled in.

        The instruction is data like the text: what it has in braces is not filled in, and special
        tokens in it are as literal as in a text. The template's own are replaced by stand-ins,
        which the backend reads as tokens even where it reads special tokens as characters.
        """
        if self.special:
            template = self.in_template.sub(lambda match: self._stand_in(match[0]), template)
        pieces = template.split("{text}")
        return [p.replace("{instruction}", instruction) for p in pieces] if instruction else pieces

    def _stand_in(self, token: str) -> str:
        """A string that occurs in no text (Unicode reserves U+FDD0 for a program's own use), added
        as a token that is split off like the special token it stands for."""
        found, like = self.special[token]
        name = f"\ufdd0{found}\ufdd0"
        self.backend.add_tokens([tokenizers.AddedToken(
            name, lstrip=like.lstrip, rstrip=like.rstrip, normalized=like.normalized)])
        self.stand_ins[self.backend.token_to_id(name)] = found
        return name

    def encode_prompted(
        self, texts: list[str], template: str, max_tokens: int, instruction: str = ""
    ) -> Tokens:
        """The template with each text in place of its `{text}`s.

        If that is more than max_tokens, the text is cut, never the template. Raises UserError if
        the template alone leaves no room for a text.
        """
        pieces, (arrays, tails, cut) = self.frame(template, instruction), Tokens([], [], [])
        for start in range(0, len(texts), CHUNK):
            chunk = texts[start : start + CHUNK]
            encodings = self._encode(self.backend.encode_batch,
                                     [text.join(pieces) for text in chunk], start)
            for i, (text, encoding) in enumerate(zip(chunk, encodings), start):
                cut.append(len(self.bos) + len(encoding.ids) > max_tokens)
                if cut[-1]:
                    text, encoding = self._cut(text, pieces, max_tokens, template)
                first = len(text.join(pieces[:-1]))  # where the last copy of the text begins
                arrays.append(self._ids(encoding, text, i))
                tails.append(sum(end > first for _, end in encoding.offsets))
        return Tokens(arrays, tails, cut)

    def _cut(
        self, text: str, pieces: list[str], max_tokens: int, template: str
    ) -> tuple[str, tokenizers.Encoding]:
        """The longest beginning of the text, in whole tokens, that fits between the pieces."""

        def encode(string: str) -> tokenizers.Encoding:
            return self.backend.encode(string, add_special_tokens=False)

        ends, copies = [end for _, end in encode(text).offsets], len(pieces) - 1
        frame = len(self.bos) + len(encode("".join(pieces)).ids)
        about = (max_tokens - frame) // copies + 2  # where pieces meet, tokens may merge
        for kept in range(min(len(ends), about), 0, -1):
            encoding = encode(text[: ends[kept - 1]].join(pieces))
            if len(self.bos) + len(encoding.ids) <= max_tokens:
                return text[: ends[kept - 1]], encoding
        raise UserError(f"max_tokens={max_tokens} leaves no room for a text in the prompt "
                        f"{template[:60]!r}... of {frame} tokens; use a larger one")

    def decode(self, ids) -> str:
        """The text of a sequence of token ids, special tokens left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)


def reason_of(error: BaseException) -> BaseException:
    """The error if it is the library's, which raises plain Exception or panics; any other is raised
    again."""
    if type(error).__name__ not in ("Exception", "PanicException"):
        raise error
    return error
